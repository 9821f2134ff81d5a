"""Time vLLM on one or several GPUs with FlashPrefill and with its default backend, in one run; append rows to a CSV.

Each backend gets an engine of its own, in a process of its own, one after the other. The model has random weights of
ordinary scale, which have nothing to prune, so the published density is imposed: once stage 3 has run, its lists are
replaced by equally many blocks, evenly spread (`FixedDensity`). That happens in this script alone; the package has
no such switch. Times are of prompts with so much to prune, the texts mean nothing. First the engines must agree at
alpha 0, or no speedup is given.

    python -m benchmarks.bench_vllm                                   TTFT, decoding and throughput, about 8 minutes
    python -m benchmarks.bench_vllm --layers 4 --tokens 8192 32768    a short run
    python -m benchmarks.bench_vllm --tensor-parallel 2 --no-decode --no-mixed
    python -m benchmarks.bench_vllm --append                          TTFT of new tokens after a cached prefix, no more
    python -m benchmarks.bench_vllm --kv-cache-dtype fp8 --compute-dtype fp8    both with a cache in e4m3, products too

TTFT is the time of a request for one token, in process, without prefix caching unless `--append` asks for it; its bound
is the time with attention left out altogether.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import LLAMA_8B, LLAMA_70B, QWEN3_30B_A3B
from evaluation.engine import configure
from tools.rows import RESULTS, append_row, commit_name
from vllm_flashprefill.config import COMPUTE_DTYPES

SHAPES = {"llama-8b": LLAMA_8B, "llama-70b": LLAMA_70B, "qwen3-30b-a3b": QWEN3_30B_A3B}
# What a shape does not say.
CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=1,
    torch_dtype="bfloat16",
)
TOKENS = [1, 16, 128, 512, 1024, 2048, 3072, 4096, 6144, 8192, 16384, 32768, 65536, 122880]
APPEND_TOKENS, CACHED = [256, 1024, 2048, 4096, 8192], [32768, 65536, 118784]
# Beyond these, in tokens: bounds, and prompts in chunks.
LONG = 32768
CHECK_TOKENS, CHECK_CHUNK = (700, 5000, 20_000), 1024
# By `--kv-cache-dtype` and `--compute-dtype`: the share of likeliest tokens that may be lost, and the difference of
# log-probabilities, beyond what chunks change in the default backend. With an fp8 cache that backend rounds
# probabilities to e4m3, which is 1.7 % of each layer's attention. FlashPrefill does not, or with fp8 products does in
# another order; chunks show little of that. In a random model of 8 layers that rounds likewise, the two move
# log-probabilities by 0.08 and 0.09, chunks by 0.025, and the fp8 cache itself by 0.19.
TOLERANCE = {("auto", "auto"): (0.15, 0.02), ("fp8", "auto"): (0.25, 0.10), ("fp8", "fp8"): (0.25, 0.14)}
# (requests at once, tokens of each prompt)
DECODE = [(1, 1024), (16, 1024), (64, 512)]
DECODE_TOKENS = 128
MIXED_PROMPTS = (2048, 30_000, 5000, 60_000, 12_000, 700, 20_000, 40_000)
ALWAYS_SPARSE_UP_TO = 8192


def write_tokenizer(folder: str, vocab_size: int) -> None:
    """A word for each token; vLLM 0.10.0 does not do without a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({f"w{token}": token for token in range(vocab_size)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0").save_pretrained(folder)


class Engine:
    """An in-process engine and what of it is changed between measurements."""

    def __init__(self, model: Path, max_model_len: int, args: argparse.Namespace):
        from vllm import LLM

        self.llm = LLM(
            str(model),
            load_format="dummy",
            enforce_eager=args.eager,
            tensor_parallel_size=args.tensor_parallel,
            pipeline_parallel_size=args.pipeline_parallel,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_model_len,
            enable_prefix_caching=args.append,
            gpu_memory_utilization=0.85,
            kv_cache_dtype=args.kv_cache_dtype,
            disable_log_stats=True,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.vocab_size = self.llm.llm_engine.vllm_config.model_config.get_vocab_size()
        self.max_model_len = self.chunk = max_model_len
        self.seeds = itertools.count(1)
        self.each(randomise)

    def each(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function returns that every worker calls, itself its first argument."""
        return self.llm.collective_rpc(function, args=args)

    def configure(self, **options: Any) -> None:
        """Change FlashPrefill's options of the running engine."""
        self.each(configure, options)

    def generate(self, prompts: list[list[int]], max_tokens: int, logprobs: int | None = None) -> list[Any]:
        from vllm import SamplingParams

        self.core.scheduler.max_num_scheduled_tokens = self.chunk
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs)
        params.detokenize = False
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    def first_logprobs(self) -> list[dict[str, float]]:
        """The likeliest first tokens of each prompt of the check, as JSON keeps them."""
        self.llm.reset_prefix_cache()
        outputs = self.generate([self.prompt(tokens) for tokens in CHECK_TOKENS], 1, logprobs=20)
        return [{str(t): lp.logprob for t, lp in output.outputs[0].logprobs[0].items()} for output in outputs]

    def prompt(self, tokens: int, seed: int = 0) -> list[int]:
        return np.random.default_rng((tokens, seed)).integers(2, self.vocab_size, tokens).tolist()

    def seconds(self, prompts: list[list[int]], max_tokens: int) -> float:
        started = time.perf_counter()
        self.generate(prompts, max_tokens)
        return time.perf_counter() - started

    def ttft_ms(self, tokens: int) -> float:
        prompt = [self.prompt(tokens)]
        self.seconds(prompt, 1)  # compiles what this length is the first to need
        times = [self.seconds(prompt, 1) for _ in range(2)]
        times += [self.seconds(prompt, 1) for _ in range(max(1, min(48, int(1.5 / min(times)))))]
        return 1000 * statistics.median(times)

    def append_ms(self, tokens: int, cached: int) -> float:
        """TTFT of so many new tokens after so many cached ones."""
        prefix = self.prompt(cached)
        self.generate([prefix], 1)
        # Whatever was asked for before, the new tokens must be new.
        times: list[float] = []
        while len(times) < 4 or (sum(times) < 1.5 and len(times) < 48):
            prompt = [prefix + self.prompt(tokens, seed=next(self.seeds))]
            started = time.perf_counter()
            outputs = self.generate(prompt, 1)
            times.append(time.perf_counter() - started)
            if outputs[0].num_cached_tokens != cached:
                sys.exit(f"error: {outputs[0].num_cached_tokens} of the {cached} tokens were in the cache")
        # The first one compiles what this length is the first to need.
        return 1000 * statistics.median(times[1:])

    def decode_ms(self, requests: int, tokens: int) -> float:
        """Milliseconds a step of `requests` decodes takes, on a context of `tokens` tokens."""
        prompts = [self.prompt(tokens, seed) for seed in range(requests)]
        self.seconds(prompts, 8)
        times = []
        for _ in range(5):
            short = self.seconds(prompts, 2)
            times.append((self.seconds(prompts, 2 + DECODE_TOKENS) - short) / DECODE_TOKENS)
        return 1000 * statistics.median(times)


def randomise(worker: Any) -> None:
    """vLLM's dummy weights are so small that attention makes no difference."""
    import torch

    weights = dict(worker.model_runner.model.named_parameters())
    generator = torch.Generator(next(iter(weights.values())).device).manual_seed(worker.rank)
    for name, weight in weights.items():
        if "norm" in name:
            weight.data.fill_(1.0)
        else:
            # With much larger ones two right implementations of attention would disagree: errors grow with depth.
            weight.data.normal_(0.0, 0.02, generator=generator)
    # What this and the profiling run left in PyTorch's allocator is in pieces too small for the longest prompts.
    torch.cuda.empty_cache()


def impls(worker: Any) -> list[Any]:
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return [layer.impl for layer in layers if hasattr(layer, "impl")]


def min_sparse_tokens(worker: Any) -> int:
    return impls(worker)[0].flashprefill_config.min_sparse_tokens


def fix_density(worker: Any) -> None:
    from vllm_flashprefill.kernels import pipeline

    pipeline.block_select = FixedDensity()


def leave_attention_out(worker: Any) -> None:
    def forward(impl, layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named):
        return output

    type(impls(worker)[0]).forward = forward


class FixedDensity:
    """In place of `block_select`: stage 3, then as many blocks for each query block as give the published density.

    Kept are the sinks, the window and blocks evenly spread between them. Query blocks of the dense tail keep all.
    `candidate_alpha` leaves as many blocks for the pieces to choose from as a real model has, and `alpha` as many for
    the second pass over them as are kept, or all that alpha 1 leaves: of random weights that can be twice as many.
    """

    def __init__(self) -> None:
        from benchmarks.kernel_data import DENSITY
        from vllm_flashprefill.kernels import block_select

        self.select = block_select.block_select
        self.points = sorted(DENSITY.items())
        self.schedule = self.lengths = None
        self.made: dict[tuple, Any] = {}

    def density(self, prompt_blocks: Any) -> Any:
        """Published densities; between their lengths interpolated as powers of the length, as which they fall."""
        lengths, densities = zip(*self.points, strict=True)
        return np.exp2(np.interp(np.log2(prompt_blocks * 128), np.log2(lengths), np.log2(densities)))

    def blocks_kept(self, prompt_blocks: int, tail: int, least: int) -> int:
        """The smallest number of blocks for each query block before the tail that gives at least the density."""
        visible = np.arange(1, prompt_blocks + 1)
        wanted = self.density(prompt_blocks) * visible.sum() - visible[prompt_blocks - tail :].sum()
        for kept in range(least, prompt_blocks + 1):
            if np.minimum(visible[: prompt_blocks - tail], kept).sum() >= wanted:
                return kept
        return prompt_blocks

    def __call__(self, q, mean, schedule, slab, *, config, lists, counts, parts, block_counts, **options: Any) -> None:
        def select(config, block_counts=None):
            self.select(
                q, mean, schedule, slab, config=config, lists=lists, counts=counts, parts=parts,
                block_counts=block_counts, **options,
            )  # fmt: skip

        if config.alpha == 0.0:
            select(config, block_counts)
            return
        # The lengths are read from the GPU in a step's first layer, the lists of a length made once.
        if schedule is not self.schedule:
            self.schedule, self.lengths = schedule, schedule.requests.cpu().numpy()
        key = (self.lengths.tobytes(), slab)
        if key not in self.made:
            *fixed, whole = self._lists(q.shape[2], schedule, slab, config, parts)
            self.made[key] = (*fixed, self._with_candidates(select, config, fixed[2], whole))
            # Nothing has joined the parts of what was selected there.
            schedule.counters.zero_()
        fixed_lists, fixed_counts, fixed_block_counts, fixed_parts, config = self.made[key]
        select(config)
        block_counts.add_(fixed_block_counts)
        lists[: len(fixed_lists)].copy_(fixed_lists)
        counts[: len(fixed_counts)].copy_(fixed_counts)
        if fixed_parts is not None:
            rows, counters = fixed_parts
            parts.rows[: len(rows)].copy_(rows)
            schedule.counters.copy_(counters)

    @staticmethod
    def _with_candidates(select, config, block_counts: Any, whole: int):
        """The config whose `candidate_alpha` leaves `CANDIDATES` times the blocks kept, and `alpha` these.

        whole: blocks of the lists that keep all, as those of the dense tail do; they have no candidates.
        """
        import torch

        from benchmarks.bench_kernels import CANDIDATES, largest

        if not config.piece_size:
            return config

        def keeps(config, wanted: float) -> bool:
            counted = torch.zeros_like(block_counts)
            select(config, counted)
            return counted[0].item() >= wanted

        kept, visible = block_counts.tolist()
        # With the least alpha all candidates are kept.
        every = dataclasses.replace(config, alpha=1e-30)
        candidates = min(visible, whole + CANDIDATES * (kept - whole))
        found = largest(every, "candidate_alpha", lambda tried: keeps(tried, candidates), 16)
        return largest(found, "alpha", lambda tried: keeps(tried, kept), 16)

    def _lists(self, heads: int, schedule, slab, config, parts):
        import torch

        requests = self.lengths
        items = schedule.items[slab.first_item : slab.first_item + slab.num_items].cpu().numpy()
        least = config.num_sink_blocks + config.num_window_blocks
        tail = config.num_dense_tail_blocks
        kept = [self.blocks_kept(int(row[7]) + tail, tail, least) for row in requests]
        lists = np.zeros((slab.list_slots * heads,), dtype=np.int32)
        counts = np.empty((len(items), heads), dtype=np.int32)
        for n, (request, block, slot) in enumerate(items):
            visible = block + 1
            count = visible if block >= requests[request][7] else min(kept[request], visible)
            counts[n] = count
            row = np.arange(count)
            if count < visible:
                middle = row[config.num_sink_blocks : count - config.num_window_blocks] - config.num_sink_blocks
                spread = middle * (visible - least) // max(len(middle), 1) + config.num_sink_blocks
                row = np.concatenate(
                    [row[: config.num_sink_blocks], spread, np.arange(visible - config.num_window_blocks, visible)]
                )
            lists[slot * heads : (slot + visible) * heads].reshape(heads, visible)[:, :count] = row
        device = schedule.requests.device
        full = counts[:, 0] == items[:, 1] + 1
        block_counts = torch.tensor([int(counts.sum()), slab.list_slots * heads], device=device)
        fixed_parts = None
        if slab.part_tiles:
            fixed_parts = tuple(x.to(device) for x in self._parts(counts.ravel().tolist(), slab, parts.max_parts))
        return (
            torch.from_numpy(lists).to(device),
            torch.from_numpy(counts.ravel()).to(device),
            block_counts,
            fixed_parts,
            int(counts[full].sum()),
        )

    @staticmethod
    def _parts(counts: list[int], slab, most: int):
        """The parts that `block_select` would have written for these lists, and the counters."""
        import torch

        from vllm_flashprefill.kernels.parts import split_list_ref

        rows, firsts = [], []
        for pair, count in enumerate(counts):
            split = split_list_ref(count, slab.part_tiles)
            fits = bool(split) and len(rows) + len(split) <= most
            firsts.append(len(rows) if fits else -1)
            rows += [(pair, *part) for part in split] if fits else []
        counters = [0, len(rows)]
        rows += [(-1, 0, 0)] * (most - len(rows))
        values = [x for row in rows for x in row] + firsts
        return torch.tensor(values, dtype=torch.int32), torch.tensor(counters, dtype=torch.int32)


def measure(backend: str, model: Path, out: Path, args: argparse.Namespace) -> None:
    """Write one backend's results by case as JSON, after each of them; times in milliseconds."""
    sparse = backend == "flashprefill"
    if sparse:
        import vllm_flashprefill

        # Short prompts are made sparse here, of which nearly everything is kept.
        vllm_flashprefill.register(max_density=1.0, compute_dtype=args.compute_dtype)
    started = time.perf_counter()
    # The check's prompts fit too: in shorter ones, chunks make no difference to compare with.
    longest = max(args.tokens) + (max(args.cached) if args.append else 0)
    engine = Engine(model, max(longest, *CHECK_TOKENS) + 1024, args)
    results: dict[str, Any] = {"start_s": round(time.perf_counter() - started, 1)}
    if sparse:
        results["min_sparse_tokens"] = engine.each(min_sparse_tokens)[0]
        engine.configure(alpha=0.0, min_sparse_tokens=0)
        before = vllm_flashprefill.stats()
    results["check"] = engine.first_logprobs()
    if not sparse:
        # What other chunks change in vLLM's own result is the noise.
        engine.chunk = CHECK_CHUNK
        results["noise"] = engine.first_logprobs()
        engine.chunk = engine.max_model_len
    if sparse:
        time.sleep(0.1)
        if (vllm_flashprefill.stats() - before).visible_blocks == 0:
            sys.exit("error: no layer of the check was sparse")
        engine.configure(alpha=0.1, min_sparse_tokens=results["min_sparse_tokens"])
        engine.each(fix_density)

    def timed(case: str, run) -> None:
        before = vllm_flashprefill.stats() if sparse else None
        results[case] = {"ms": run()}
        if sparse:
            time.sleep(0.1)
            results[case]["density"] = (vllm_flashprefill.stats() - before).density
        part = out.with_suffix(".part")
        part.write_text(json.dumps(results))
        part.replace(out)
        print(f"  {backend} {case}: {results[case]['ms']:.3f} ms", flush=True)

    if args.append:
        appends = list(itertools.product(args.tokens, args.chunk, args.cached))
        for kind in ("append", "bound") if sparse else ("append",):
            if kind == "bound":
                engine.each(leave_attention_out)
            for tokens, engine.chunk, cached in appends:
                timed(f"{kind} {tokens} {engine.chunk} {cached}", lambda t=tokens, c=cached: engine.append_ms(t, c))
        return
    for tokens in args.tokens:
        timed(f"ttft {tokens} 0", lambda tokens=tokens: engine.ttft_ms(tokens))
    if sparse:
        engine.configure(min_sparse_tokens=0)
        for tokens in args.tokens:
            if 1024 <= tokens <= ALWAYS_SPARSE_UP_TO:
                timed(f"always {tokens} 0", lambda tokens=tokens: engine.ttft_ms(tokens))
        engine.configure(min_sparse_tokens=results["min_sparse_tokens"])
    for chunk in args.chunk:
        engine.chunk = chunk
        for tokens in args.tokens:
            if tokens >= LONG:
                timed(f"ttft {tokens} {chunk}", lambda tokens=tokens: engine.ttft_ms(tokens))
    engine.chunk = min(8192, engine.chunk)
    for requests, tokens in args.decode:
        timed(f"decode {requests} {tokens}", lambda r=requests, t=tokens: engine.decode_ms(r, t))
    if args.mixed:
        prompts = [engine.prompt(tokens) for tokens in MIXED_PROMPTS if tokens <= max(args.tokens)]
        results["mixed_tokens"] = sum(map(len, prompts))
        timed("mixed", lambda: 1000 * min(engine.seconds(prompts, 32) for _ in range(2)))
    engine.chunk = engine.max_model_len
    if sparse:
        engine.each(leave_attention_out)
        for tokens in args.tokens:
            if tokens >= LONG:
                timed(f"bound {tokens} 0", lambda tokens=tokens: engine.ttft_ms(tokens))


def difference(found: list[dict[str, float]], expected: list[dict[str, float]]) -> tuple[float, float]:
    """Of the expected likeliest tokens: the share that is among those found, and how far their log-probs differ."""
    pairs = [(lp, a.get(token)) for a, b in zip(found, expected, strict=True) for token, lp in b.items()]
    shared = [abs(lp - other) for lp, other in pairs if other is not None]
    return len(shared) / len(pairs), statistics.mean(shared or [float("inf")])


def agree(default: dict[str, Any], flash: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether FlashPrefill at alpha 0 differs from the default backend by little more than that does from itself.

    Both have the same KV cache.
    """
    share, error = difference(flash["check"], default["check"])
    noise_share, noise = difference(default["noise"], default["check"])
    lost, more = TOLERANCE[args.kv_cache_dtype, args.compute_dtype]
    least, most = noise_share - lost, 2 * noise + more
    print(
        f"alpha 0: {share:.0%} of the likeliest tokens shared, log-probabilities differ by {error:.4f}; "
        f"the default backend in chunks of {CHECK_CHUNK}: {noise_share:.0%}, {noise:.4f}; "
        f"allowed are {least:.0%}, {most:.4f}",
        flush=True,
    )
    return share >= least and error <= most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--append", action="store_true", help="new tokens after a cached prefix, in place of prompts")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, help="of prompts, or new ones")
    parser.add_argument("--cached", type=int, nargs="+", default=CACHED, help="tokens of the prefixes of --append")
    parser.add_argument("--chunk", type=int, nargs="*", default=[8192], help="tokens of a chunk, beside whole prompts")
    parser.add_argument("--model", choices=SHAPES, default="llama-8b", help="whose shapes; the weights are random")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto", help="of both backends' caches")
    parser.add_argument("--compute-dtype", choices=COMPUTE_DTYPES, default="auto", help="FlashPrefill's option")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share each layer's heads")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="GPUs, or groups of them, with layers each")
    parser.add_argument("--eager", action="store_true", help="no compilation and no graphs: a quicker start")
    parser.add_argument("--no-decode", dest="decode", action="store_const", const=[], default=DECODE)
    parser.add_argument("--no-mixed", dest="mixed", action="store_false")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--csv", type=Path, default=RESULTS / "vllm.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tokens = args.tokens or (APPEND_TOKENS if args.append else TOKENS)
    if args.compute_dtype == "fp8" and args.kv_cache_dtype != "fp8":
        parser.error("--compute-dtype fp8 is for --kv-cache-dtype fp8")

    if args.worker:
        backend, model, out = args.worker.split(",")
        measure(backend, Path(model), Path(out), args)
        return

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        config = {**CONFIG, **SHAPES[args.model], "num_hidden_layers": args.layers}
        Path(folder, "config.json").write_text(json.dumps(config))
        write_tokenizer(folder, config["vocab_size"])
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        }
        environment.pop("FLASHPREFILL", None)
        try:
            for backend in ("default", "flashprefill"):
                out = found[backend] = Path(folder, f"{backend}.json")
                worker = ["--worker", f"{backend},{folder},{out}"]
                command = [sys.executable, "-m", "benchmarks.bench_vllm", *sys.argv[1:], *worker]
                subprocess.run(command, env=environment, check=True)
        finally:
            # What is there when one fails or the run is interrupted is right too.
            if len(found) == 2 and all(path.exists() for path in found.values()):
                write_rows(*(json.loads(path.read_text()) for path in found.values()), args)


def write_rows(default: dict[str, Any], flash: dict[str, Any], args: argparse.Namespace) -> None:
    import torch
    from vllm import __version__

    check = "passed" if agree(default, flash, args) else "failed"
    for case, value in default.items():
        kind, *numbers = case.split()
        if kind not in ("ttft", "append", "decode", "mixed") or case not in flash:
            continue
        first, second, cached = [*map(int, numbers), 0][:3] if numbers else (default["mixed_tokens"], 8192, 0)
        bound = {"ttft": f"bound {first} 0", "append": f"bound {first} {second} {cached}"}.get(kind)
        ours = flash[case]
        row = dict(
            date=datetime.date.today().isoformat(),
            gpu=torch.cuda.get_device_name(),
            vllm=__version__,
            torch=torch.__version__,
            commit=commit_name(args.commit),
            model=model_name(args),
            case=kind,
            requests=first if kind == "decode" else len(MIXED_PROMPTS) if kind == "mixed" else 1,
            tokens=second if kind == "decode" else first,
            cached=cached,
            chunk=0 if kind == "decode" else second,
            min_sparse_tokens=flash["min_sparse_tokens"],
            density=ours["density"] and round(ours["density"], 4),
            check=check,
            default_ms=round(value["ms"], 3),
            flash_ms=round(ours["ms"], 3),
            bound_ms=_rounded(flash.get(bound)),
            always_sparse_ms=_rounded(flash.get(f"always {first} {second}") if kind == "ttft" else None),
            speedup=round(value["ms"] / ours["ms"], 3) if check == "passed" else None,
        )
        append_row(args.csv, row)
        print({key: row[key] for key in list(row)[6:]}, flush=True)
    print(f"engine start: default {default['start_s']} s, FlashPrefill {flash['start_s']} s")
    if check == "failed":
        sys.exit("error: at alpha 0 FlashPrefill and the default backend disagree")


def model_name(args: argparse.Namespace) -> str:
    parts = [args.model, f"{args.layers} layers"]
    parts += [f"tensor parallel {args.tensor_parallel}"] * (args.tensor_parallel > 1)
    parts += [f"pipeline parallel {args.pipeline_parallel}"] * (args.pipeline_parallel > 1)
    parts += ["fp8 cache"] * (args.kv_cache_dtype == "fp8") + ["fp8 products"] * (args.compute_dtype == "fp8")
    return ", ".join(parts + ["eager"] * args.eager)


def _rounded(result: dict[str, float] | None) -> float | None:
    return result and round(result["ms"], 3)


if __name__ == "__main__":
    main()
