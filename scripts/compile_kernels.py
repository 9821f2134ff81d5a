"""Compile every kernel for a few GPU generations, without a GPU; print registers, spills and shared memory."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_flashprefill.kernels import block_mean, block_select, configs, sparse_attention

POINTERS = {
    "q_ptr": "T",
    "k_ptr": "T",
    "v_ptr": "T",
    "out_ptr": "T",
    "mean_ptr": "*fp16",
    "scores_ptr": "*fp32",
    "scale": "fp32",
    "log2_alpha": "fp32",
}


def compile_kernel(kernel, constants: dict, dtype: str, arch: int, **options):
    """Compile one kernel; arguments that are not in `constants` are typed by name."""
    signature, attributes = {}, {}
    params = {param.name: param for param in kernel.params}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("_desc"):
            signature[name] = f"tensordesc<{dtype}[{constants['BLOCK_N']},{constants['HEAD_SIZE']}]>"
            continue
        kind = POINTERS.get(name) or ("*i32" if name.endswith("_ptr") else params[name].annotation_type or "i32")
        signature[name] = f"*{dtype}" if kind == "T" else kind
        if not params[name].do_not_specialize and not name.startswith(("scale", "log2")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def usage(compiled, arch: int) -> str:
    ptxas = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/ptxas")
    suffix = "a" if arch >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", f"--gpu-name=sm_{arch}{suffix}", file.name, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", text).group(1)
    spills = re.search(r"(\d+) bytes spill stores", text).group(1)
    return f"{registers} registers, {spills} bytes spilled, {compiled.metadata.shared} bytes shared"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dtype", nargs="+", default=["bf16"])
    parser.add_argument("--head-size", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--page-size", type=int, nargs="+", default=[0, 16, 128])
    args = parser.parse_args()
    print(f"triton {triton.__version__}")
    failed = 0
    for arch, dtype, head_size in itertools.product(args.arch, args.dtype, args.head_size):
        generation = "ampere" if arch < 90 else "hopper" if arch < 100 else "blackwell"
        shape = dict(HEAD_SIZE=head_size, BLOCK=128)
        heads = dict(NUM_HEADS=32, GROUP=4)
        select = configs.SELECT[generation, head_size]
        cases = [
            (
                "block_select",
                block_select._block_select_kernel,
                dict(
                    **shape,
                    **heads,
                    BLOCK_N=select.block_n,
                    BLOCK_LIST=512,
                    NUM_SINK_BLOCKS=2,
                    NUM_WINDOW_BLOCKS=4,
                    NUM_STAGES=select.num_stages,
                ),
                dict(num_warps=select.num_warps),
            )
        ]
        for page_size in args.page_size:
            absent = {} if page_size else {"block_table_ptr": None}
            cases.append(
                (
                    f"block_mean page {page_size}",
                    block_mean._block_mean_kernel,
                    dict(**shape, **absent, PAGE_SIZE=page_size),
                    dict(num_warps=4),
                )
            )
            for table in (configs.ATTENTION, configs.ATTENTION_TMA):
                attention = table.get((generation, head_size))
                if attention is None or (attention.tma and page_size % attention.block_n):
                    continue
                no_descriptor = {} if attention.tma else {"k_desc": None, "v_desc": None}
                cases.append(
                    (
                        f"sparse_attention page {page_size}{' tma' if attention.tma else ''}",
                        sparse_attention._sparse_attention_kernel,
                        dict(
                            **shape,
                            **heads,
                            **absent,
                            **no_descriptor,
                            BLOCK_N=attention.block_n,
                            PAGE_SIZE=page_size,
                            USE_TMA=attention.tma,
                            BY_HEAD=attention.by_head,
                            NUM_STAGES=attention.num_stages,
                        ),
                        dict(num_warps=attention.num_warps),
                    )
                )
        for name, kernel, constants, options in cases:
            label = f"sm_{arch} {dtype} d{head_size} {name}"
            try:
                print(f"{label}: {usage(compile_kernel(kernel, constants, dtype, arch, **options), arch)}", flush=True)
            except Exception as error:
                failed += 1
                print(f"{label}: FAILED {type(error).__name__}: {str(error)[:500]}", flush=True)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
