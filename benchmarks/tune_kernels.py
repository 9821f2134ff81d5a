"""Time launch configurations of the select and the attention kernel; the best go into kernels/configs.py by hand."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools

from triton.testing import do_bench

from benchmarks.bench_kernels import Stages, alpha_for_density
from benchmarks.kernel_data import structured_qkv
from vllm_flashprefill.kernels import configs
from vllm_flashprefill.kernels.configs import AttentionConfig, SelectConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--density", type=float, default=0.049)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="only the committed attention configurations")
    parser.add_argument("--what", nargs="+", default=["select", "attention"])
    args = parser.parse_args()
    for tokens in args.tokens:
        q, k, v = structured_qkv(tokens, dim=args.head_size)
        stages = Stages(q, k, v, page_size=args.page_size)
        alpha_for_density(stages, args.density)
        density = stages.density()
        tflop = stages.kept_blocks() * 4 * 128 * 128 * args.head_size / 1e12
        print(f"{tokens} tokens, d{args.head_size}, page size {args.page_size}, density {density:.3%}", flush=True)
        if "select" in args.what:
            registers = {1: None, 2: None, 3: 168, 4: 128}
            for block_n, warps, num_stages, per_sm in itertools.product((64, 128), (4, 8), (1, 2, 3), registers):
                try:
                    limit = registers[per_sm] if warps == 4 else None
                    launch = SelectConfig(block_n, warps, num_stages, per_sm, limit)
                    ms = do_bench(functools.partial(stages.select, launch), return_mode="median", warmup=10, rep=40)
                    print(f"  {ms:8.3f} ms {launch}", flush=True)
                except Exception as error:
                    print(f"  failed {launch}: {type(error).__name__}", flush=True)
        stages.select()
        if "attention" in args.what:
            grid = itertools.product((True, False), (64, 128), (4, 8), (2, 3), (False, True))
            launches = [AttentionConfig(n, warps, num, tma=tma, by_head=by) for tma, n, warps, num, by in grid]
            launches += configs.ATTENTION_GLUON.values()
            if args.quick:
                tables = (configs.ATTENTION_GLUON, configs.ATTENTION_TMA, configs.ATTENTION)
                launches = [table["hopper", args.head_size] for table in tables if ("hopper", args.head_size) in table]
            for launch in launches:
                try:
                    ms = do_bench(functools.partial(stages.attend, launch), return_mode="median", warmup=20, rep=100)
                    print(f"  {ms:8.3f} ms {tflop / ms * 1e3:6.0f} TFLOP/s {dataclasses.asdict(launch)}", flush=True)
                except Exception as error:
                    print(f"  failed {launch}: {type(error).__name__}", flush=True)


if __name__ == "__main__":
    main()
