"""Time the prefill of Hugging Face models: transformers' sdpa beside "flashprefill"; append a row a length to a CSV.

Two models: SmolLM2-135M on real text, with its preset, and a Llama of the 8B shape with random weights. Random
weights have nothing to prune, so there alpha is searched for the published density: the time is that of a prompt
with so much to prune, the output means nothing. Each model is checked first: at alpha 0 its logits may differ from
sdpa's at most twice as much as those of sdpa's math backend do. A model whose check fails has no speedup.

    python -m benchmarks.bench_hf --model llama-8b --tokens 4096 32768
    python -m benchmarks.bench_hf --device cpu --model smollm2 --tokens 1024     a smoke run, which writes no row
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel_data import DENSITY
from benchmarks.shapes import LLAMA_8B
from scripts.generate import MODEL, make_prompts
from tools.rows import RESULTS, append_row, commit_name
from vllm_flashprefill import hf
from vllm_flashprefill.api import flash_prefill
from vllm_flashprefill.config import FlashPrefillConfig

TOKENS = {"smollm2": [2048, 4096, 8192], "llama-8b": [4096, 8192, 16384, 32768, 65536, 131072]}
CHECK_TOKENS = 2361
# A forward that takes longer is timed once, without a warm-up of its own.
PATIENCE_S = 6.0


class Bench:
    """A model, its prompts, and one forward over them by either implementation."""

    def __init__(self, name: str, device: str, layers: int | None):
        self.name, self.device = name, device
        if name == "smollm2":
            self.model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).to(device)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
        else:
            shape = {**LLAMA_8B, "num_hidden_layers": layers or LLAMA_8B["num_hidden_layers"]}
            with torch.device(device):
                self.model = transformers.LlamaForCausalLM._from_config(
                    transformers.LlamaConfig(**shape), dtype=torch.bfloat16
                )
        self.model.eval()
        self.layers = self.model.config.num_hidden_layers

    def prompt(self, tokens: int) -> torch.Tensor:
        if self.name == "smollm2":
            return torch.tensor([make_prompts(self.tokenizer, [tokens])[0].tokens], device=self.device)
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(self.model.config.vocab_size, (1, tokens), generator=generator).to(self.device)

    def forward(self, ids: torch.Tensor, implementation: str, logits_to_keep: int = 1) -> torch.Tensor:
        """Logits of the last tokens, the KV cache filled as `generate` does."""
        self.model.set_attn_implementation(implementation)
        with torch.inference_mode():
            return self.model(ids, use_cache=True, logits_to_keep=logits_to_keep).logits

    def check(self) -> str:
        ids = self.prompt(CHECK_TOKENS)
        register(alpha=0.0)
        before = hf.stats()
        got = self.forward(ids, "flashprefill", 128)
        done = hf.stats() - before
        assert done.sparse_tokens == self.layers * CHECK_TOKENS and done.density == 1.0, done
        dense = self.forward(ids, "sdpa", 128)
        with sdpa_kernel(SDPBackend.MATH):
            plain = self.forward(ids, "sdpa", 128)
        error, noise = (((x.float() - dense.float()).norm() / dense.float().norm()).item() for x in (got, plain))
        passed = error <= 2 * noise + 1e-4
        print(f"{self.name}: alpha 0 differs from sdpa by {error:.2e}, sdpa's math backend by {noise:.2e}", flush=True)
        return "passed" if passed else "failed"

    def alpha_for_density(self, ids: torch.Tensor, density: float) -> float:
        """The largest alpha found at which every fourth layer and the last together keep at least `density`."""
        captured = []

        def capture(q, k, v, **arguments):
            layer = len(captured)
            captured.append((q, k, v) if layer % 4 == 0 or layer == self.layers - 1 else None)
            return flash_prefill(q, k, v, **arguments)

        register(alpha=1.0)
        with mock.patch.object(hf.attention, "flash_prefill", capture):
            self.forward(ids, "flashprefill")
        inputs = [qkv for qkv in captured if qkv]
        low, high = 0.0, 1.0
        for _ in range(14):
            middle = (low + high) / 2
            counts = torch.zeros(2, dtype=torch.int64, device=ids.device)
            for q, k, v in inputs:
                flash_prefill(q, k, v, config=FlashPrefillConfig(alpha=middle, piece_size=0), block_counts=counts)
            kept, visible = counts.tolist()
            low, high = (middle, high) if kept >= density * visible else (low, middle)
        return low

    def default_alpha(self) -> float:
        config = self.model.config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return hf.attention.layer_config(config.model_type, head_size).alpha

    def median_ms(self, ids: torch.Tensor, implementation: str) -> float:
        def timed() -> float:
            synchronize(self.device)
            started = time.perf_counter()
            self.forward(ids, implementation)
            synchronize(self.device)
            return time.perf_counter() - started

        first = timed()
        runs = min(9, int(PATIENCE_S / first))
        return 1000 * (statistics.median(timed() for _ in range(runs)) if runs else first)


def register(alpha: float | None = None) -> None:
    hf.unregister()
    # Of random weights, rows of a query block have their best pieces in nearly every block: no density is reached.
    hf.register(min_sparse_tokens=0, piece_size=0, **({} if alpha is None else {"alpha": alpha}))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=list(TOKENS), default=list(TOKENS))
    parser.add_argument("--tokens", type=int, nargs="+", help="default: each model's own")
    parser.add_argument("--layers", type=int, help="layers of the 8B shape; default: 32")
    parser.add_argument("--alpha", type=float, help="default: searched for the 8B shape, SmolLM2's preset")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--csv", type=Path, help="default: results/hf.csv, on a GPU only")
    args = parser.parse_args()
    if args.csv is None and args.device == "cuda":
        args.csv = RESULTS / "hf.csv"
    commit = commit_name(args.commit)
    for name in args.model:
        if name == "smollm2" and not MODEL.exists():
            print(f"{name}: left out, {MODEL} is not there; scripts/fetch_model.py fetches it")
            continue
        bench = Bench(name, args.device, args.layers)
        check = bench.check()
        for tokens in args.tokens or TOKENS[name]:
            if tokens > bench.model.config.max_position_embeddings:
                print(f"{name}: {tokens} tokens are left out, they are more than it has positions for")
                continue
            ids = bench.prompt(tokens)
            alpha = args.alpha
            if alpha is None and name == "llama-8b":
                nearest = min(DENSITY, key=lambda known: abs(known - tokens))
                alpha = bench.alpha_for_density(ids, DENSITY[nearest])
            register(alpha=alpha)
            before = hf.stats()
            flash = bench.median_ms(ids, "flashprefill")
            done = hf.stats() - before
            if done.density is None:
                print(f"{name}: {tokens} tokens are left out, nothing of them can be pruned: {done}")
                continue
            assert not done.dense_tokens, done
            sdpa = bench.median_ms(ids, "sdpa")
            row = dict(
                date=datetime.date.today().isoformat(),
                gpu=torch.cuda.get_device_name() if args.device == "cuda" else "none",
                torch=torch.__version__,
                triton=triton_version(),
                transformers=transformers.__version__,
                commit=commit,
                model=name,
                layers=bench.layers,
                tokens=tokens,
                alpha=round(bench.default_alpha() if alpha is None else alpha, 5),
                density=round(done.density, 5),
                check=check,
                sdpa_ms=round(sdpa, 3),
                flash_ms=round(flash, 3),
                speedup=round(sdpa / flash, 2) if check == "passed" else None,
            )
            if args.csv:
                append_row(args.csv, row)
            print({key: row[key] for key in list(row)[6:]}, flush=True)
        hf.unregister()
        del bench
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
