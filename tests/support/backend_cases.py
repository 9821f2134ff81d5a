"""Random batches for vLLM's FlashAttention classes and ours beside each other, and what must hold for each batch.

On the GPU vLLM's classes are what it serves with; a CPU test puts PyTorch in place of their kernels.
"""

import contextlib
import functools
import importlib
import inspect
import itertools
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from vllm_flashprefill.api import flash_prefill_paged
from vllm_flashprefill.backend import builder as builder_module
from vllm_flashprefill.backend import stats
from vllm_flashprefill.backend.device_counts import device_counts
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.patches.registration import installed_vllm

MAX_TOKENS = 8192
LAYER = "model.layers.1.self_attn.attn"
# Compiled into the kernels, so the same for all batches.
KEPT = {"num_sink_blocks": 0, "num_window_blocks": 1}
# Free slots hold this: finite, since vLLM's kernels multiply it by a probability of 0, and not to be missed.
GARBAGE = 30_000.0
K_SCALE, V_SCALE = 0.05, 0.03
EDGES = (1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 255, 256, 257, 384, 385, 511, 512, 513, 640)
KINDS = {
    "decode": 0.18,
    "drafts": 0.12,
    "last few": 0.05,
    "short": 0.1,
    "whole": 0.2,
    "first chunk": 0.08,
    "chunk": 0.08,
    "last chunk": 0.09,
    "prefix hit": 0.1,
}


@dataclass(frozen=True)
class Shape:
    """What an attention layer and its cache are made for."""

    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    page_size: int
    kv_cache_dtype: str = "auto"

    @property
    def scale(self):
        return self.head_size**-0.5

    @property
    def quantised(self):
        return self.kv_cache_dtype != "auto"

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.") + ("-e4m3" if self.quantised else "")
        return f"{self.heads}/{self.kv_heads}x{self.head_size}-{dtype}-pages{self.page_size}"


@dataclass
class Request:
    """One request of a step, in tokens.

    Attributes:
        query_len, context_len: of this step, and in the cache before it.
        rest: what the model runner knows beyond this step; negative where drafted tokens are not known yet.
        shares: (an earlier row, its first pages that are this one's too).
        refused: drafted tokens that the host still counts where it may, and the device no longer.
    """

    kind: str
    query_len: int
    context_len: int = 0
    rest: int = 0
    shares: tuple[int, int] = (0, 0)
    refused: int = 0

    @property
    def seq_len(self):
        return self.context_len + self.query_len


@dataclass
class Batch:
    """A step; `random_batch(seed, page_size)` makes it again."""

    seed: int
    page_size: int
    requests: list[Request]
    padding: int
    heads_first: bool
    fused_qkv: bool
    full_graphs: bool
    alpha: float
    num_dense_tail_blocks: int
    min_sparse_tokens: int

    def config(self, alpha):
        options = {name: getattr(self, name) for name in ("num_dense_tail_blocks", "min_sparse_tokens")}
        return FlashPrefillConfig(alpha=alpha, **KEPT, **options)


def random_batch(seed, page_size, longest=6000):
    """Mostly up to 700 tokens a request, with a tail up to the longest; at most MAX_TOKENS of all requests."""
    rng = np.random.default_rng(seed)

    def length(most=longest):
        kind = rng.random()
        if kind < 0.2:
            tokens = rng.choice(EDGES)
        elif kind < 0.9:
            tokens = rng.integers(1, 701)
        else:
            tokens = rng.integers(701, 2001) if kind < 0.97 else rng.integers(2001, 6001)
        return min(int(tokens), most)

    def request(kind):
        match kind:
            case "decode":
                return Request(kind, 1, length())
            case "drafts":
                drafts = int(rng.integers(1, 8))
                return Request(kind, 1 + drafts, length(), -drafts, refused=int(rng.choice([0, 1, drafts])))
            case "last few":
                return Request(kind, int(rng.integers(2, 9)), length())
            case "short":
                return Request(kind, int(rng.integers(1, 128)))
            case "first chunk":
                return Request(kind, length(), 0, length())
            case "chunk":
                return Request(kind, length(), length(), length())
            case "last chunk":
                return Request(kind, length(), length())
            case "prefix hit" if any(r.seq_len >= page_size for r in requests):
                row = int(rng.choice([n for n, r in enumerate(requests) if r.seq_len >= page_size]))
                pages = int(rng.integers(1, requests[row].seq_len // page_size + 1))
                own = int(rng.choice([0, 0, 1, 100]))
                rest = int(rng.choice([0, 0, 300]))
                return Request(kind, length(), pages * page_size + own, rest, (row, pages))
        return Request("whole", length())

    requests = []
    for kind in rng.choice(list(KINDS), size=rng.integers(1, 7), p=list(KINDS.values())):
        new = request(str(kind))
        if sum(r.seq_len for r in [*requests, new]) <= MAX_TOKENS:
            requests.append(new)
    return Batch(
        seed,
        page_size,
        requests or [Request("whole", 400)],
        padding=int(rng.integers(0, 10)),
        heads_first=bool(rng.random() < 0.3),
        fused_qkv=bool(rng.random() < 0.5),
        full_graphs=bool(rng.random() < 0.5),
        alpha=float(rng.choice([0.1, 0.3, 0.6, 1.0])),
        num_dense_tail_blocks=int(rng.choice([0, 1, 2])),
        min_sparse_tokens=int(rng.choice([1, 100, 250, 400])),
    )


@functools.cache
def vllm_config(heads, kv_heads, head_size, dtype, kv_cache_dtype, full_graphs):
    from vllm.engine.arg_utils import EngineArgs

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": heads * head_size,
        "head_dim": head_size,
        "intermediate_size": 512,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "max_position_embeddings": MAX_TOKENS,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=MAX_TOKENS,
            max_num_batched_tokens=MAX_TOKENS,
            max_num_seqs=64,
            enforce_eager=not full_graphs,
        ).create_engine_config()


class Side:
    """A builder and an impl of one backend, made as vLLM makes them."""

    def __init__(self, backend, own_builder, shape, device, full_graphs):
        from vllm.config import set_current_vllm_config
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        config = vllm_config(
            shape.heads, shape.kv_heads, shape.head_size, shape.dtype, shape.kv_cache_dtype, full_graphs
        )
        spec = dict(
            block_size=shape.page_size,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            dtype=torch.uint8 if shape.quantised else shape.dtype,
            use_mla=False,
        )
        spec = {name: value for name, value in spec.items() if name in FullAttentionSpec.__dataclass_fields__}
        arguments = dict(kv_cache_spec=FullAttentionSpec(**spec), layer_names=[LAYER], vllm_config=config)
        known = inspect.signature(own_builder.__init__).parameters
        arguments = {name: value for name, value in arguments.items() if name in known}
        with set_current_vllm_config(config):
            self.impl = backend.get_impl_cls()(
                num_heads=shape.heads,
                head_size=shape.head_size,
                scale=shape.scale,
                num_kv_heads=shape.kv_heads,
                alibi_slopes=None,
                sliding_window=None,
                kv_cache_dtype=shape.kv_cache_dtype,
            )
            one, k_scale, v_scale = (
                torch.full((1,), x, dtype=torch.float32, device=device)
                for x in ((1, K_SCALE, V_SCALE) if shape.quantised else (1, 1, 1))
            )
            self.layer = SimpleNamespace(
                layer_name=LAYER, impl=self.impl, _q_scale=one, _k_scale=k_scale, _v_scale=v_scale
            )
            # Where the builder finds what to compile the kernels for.
            layers = config.compilation_config.static_forward_context
            layers[LAYER] = self.layer
            try:
                self.builder = backend.get_builder_cls()(**arguments, device=device)
            finally:
                del layers[LAYER]


class Pair:
    """Our side and vLLM's own for one shape, and what is seen of vLLM's classes while `watched`."""

    def __init__(self, shape, device, full_graphs):
        name = f"vllm_flashprefill.patches.vllm_{installed_vllm().replace('.', '_')}_cuda"
        backend = importlib.import_module(name).FlashPrefillCUDABackend
        own = backend.__mro__[1]
        self.shape, self.device = shape, device
        self.own_impl, self.own_builder = own.get_impl_cls(), own.get_builder_cls()
        self.vllms = Side(own, self.own_builder, shape, device, full_graphs)
        self.ours = Side(backend, self.own_builder, shape, device, full_graphs)
        assert self.ours.impl.may_be_sparse is not shape.quantised

    def set_config(self, config):
        self.ours.impl.flashprefill_config = self.ours.builder.flashprefill_config = config

    @contextlib.contextmanager
    def watched(self):
        """The arguments of each call of vLLM's own `forward`, and each metadata its builder made with its fields."""
        seen = SimpleNamespace(calls=[], built=[])
        forward, build = self.own_impl.forward, self.own_builder.build
        parameters = inspect.signature(forward)

        def watched_forward(*args, **kwargs):
            seen.calls.append(parameters.bind(*args, **kwargs).arguments)
            return forward(*args, **kwargs)

        def watched_build(*args, **kwargs):
            metadata = build(*args, **kwargs)
            seen.built.append((metadata, dict(vars(metadata))))
            return metadata

        with (
            mock.patch.object(self.own_impl, "forward", watched_forward),
            mock.patch.object(self.own_builder, "build", watched_build),
        ):
            yield seen


def host_may_count_more():
    """Whether this vLLM tells the host an upper bound of lengths only."""
    from vllm.v1.attention.backends.utils import CommonAttentionMetadata

    return "seq_lens_cpu_upper_bound" in CommonAttentionMetadata.__dataclass_fields__


class Step:
    """A batch's tensors: a cache that holds the contexts, with NaN where this step's keys and values go."""

    def __init__(self, batch, pair):
        self.batch, self.pair, self.device = batch, pair, pair.device
        shape, requests, page_size = pair.shape, batch.requests, batch.page_size
        rng = np.random.default_rng([batch.seed, 1])
        self.query_lens = np.array([r.query_len for r in requests])
        self.seq_lens = np.array([r.seq_len for r in requests])
        refused = host_may_count_more() * np.array([r.refused for r in requests])
        self.host_lens = self.seq_lens + refused
        self.known_lens = self.host_lens + [r.rest for r in requests]
        self.starts = np.cumsum([0, *self.query_lens])
        self.num_tokens = int(self.starts[-1])

        own_pages = [-(-n // page_size) - r.shares[1] for n, r in zip(self.host_lens, requests, strict=True)]
        pages = rng.permutation(sum(own_pages) + 3)
        # What follows a request's pages in vLLM's table are pages of requests that were there before.
        table = rng.integers(0, len(pages), (len(requests), max(-(-self.host_lens // page_size)) + 2), dtype=np.int32)
        num_slots = len(pages) * page_size
        theme_of_slot = np.zeros(num_slots, dtype=np.int64)
        context, written = np.zeros(num_slots, dtype=bool), np.zeros(num_slots, dtype=bool)
        slots, theme_of_query, block_of_query = [], [], []
        used = themes = query_blocks = 0
        for row, (request, count) in enumerate(zip(requests, own_pages, strict=True)):
            other, shared = request.shares
            table[row, :shared] = table[other, :shared]
            table[row, shared : shared + count] = pages[used : used + count]
            used += count
            position = np.arange(request.seq_len)
            slot = table[row, position // page_size].astype(np.int64) * page_size + position % page_size
            own = position >= shared * page_size
            theme_of_slot[slot[own]] = themes + position[own] // 128
            themes += request.seq_len // 128 + 1
            context[slot[: request.context_len]] = True
            written[slot[request.context_len :]] = True
            slots.append(slot)
            # Each query block of each head is drawn to a block that it sees.
            for block in range(request.context_len // 128, (request.seq_len - 1) // 128 + 1):
                seen = rng.integers(0, block + 1, shape.heads)
                theme_of_query.append(theme_of_slot[slot[seen * 128]])
            block_of_query.append(query_blocks + position[request.context_len :] // 128 - request.context_len // 128)
            query_blocks = len(theme_of_query)
        new_slots = np.concatenate([slot[-r.query_len :] for slot, r in zip(slots, requests, strict=True)])

        def to_device(array):
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

        self.slots = [to_device(slot) for slot in slots]
        self.block_table = to_device(table)
        self.slot_mapping = to_device(np.concatenate([new_slots, np.full(batch.padding, -1)]))
        self.row_of_token = to_device(np.repeat(np.arange(len(requests)), self.query_lens))
        self.owned = to_device(context | written)

        generator = torch.Generator(self.device).manual_seed(batch.seed)

        def randn(*size):
            return torch.randn(size, generator=generator, device=self.device)

        kv_heads, group = shape.kv_heads, shape.heads // shape.kv_heads
        theme = randn(themes, kv_heads, shape.head_size)
        # What each slot of the cache holds once the step's tokens are in it.
        self.k = (randn(num_slots, kv_heads, shape.head_size) + 1.5 * theme[to_device(theme_of_slot)]).to(shape.dtype)
        self.v = randn(num_slots, kv_heads, shape.head_size).to(shape.dtype)
        head = torch.arange(shape.heads, device=self.device) // group
        drawn = theme[to_device(np.stack(theme_of_query)), head][to_device(np.concatenate(block_of_query))]
        q = (randn(self.num_tokens, shape.heads, shape.head_size) + 0.8 * drawn).to(shape.dtype)
        new = self.slot_mapping[: self.num_tokens]
        parts = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, batch.padding), value=math.nan)
                 for x in (q, self.k[new], self.v[new])]  # fmt: skip
        if batch.fused_qkv:
            parts = torch.cat(parts, dim=1).split([shape.heads, kv_heads, kv_heads], dim=1)
        self.query, self.key, self.value = parts

        self.cache = self.new_cache()
        empty = torch.where(to_device(written), math.nan, GARBAGE).to(shape.dtype)[:, None, None]
        in_context = to_device(context & ~written)[:, None, None]
        for view, x, scale in self.cache_parts():
            view.copy_(self.coded(torch.where(in_context, x, empty), scale).view(view.shape))

    def new_cache(self):
        """As vLLM makes it, in the layout asked for."""
        from vllm.v1.attention.backends import utils

        shape = self.pair.shape

        def set_layout(name):
            utils.set_kv_cache_layout(name)
            getattr(utils.get_kv_cache_layout, "cache_clear", lambda: None)()

        set_layout("HND" if self.batch.heads_first else "NHD")
        try:
            return self.pair.ours.builder.new_cache(
                len(self.k) // shape.page_size,
                shape.page_size,
                shape.kv_heads,
                shape.head_size,
                torch.uint8 if shape.quantised else shape.dtype,
                self.device,
            )
        finally:
            set_layout(None)

    def cache_parts(self):
        """(view of the cache [pages, page size, G, D], what it is to hold [slots, G, D], scale) of keys and values."""
        k_cache, v_cache = self.pair.ours.impl.paged_kv(self.cache)
        return (k_cache, self.k, K_SCALE), (v_cache, self.v, V_SCALE)

    def coded(self, x, scale):
        if not self.pair.shape.quantised:
            return x
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)

    def common(self, rows=None):
        """What the model runner tells builders of the batch, or of some of its requests as a batch of their own."""
        from vllm.v1.attention.backends.utils import CommonAttentionMetadata

        whole = rows is None
        rows = np.arange(len(self.seq_lens)) if whole else np.asarray(rows)
        tokens = np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows])
        starts = torch.from_numpy(np.cumsum([0, *self.query_lens[rows]])).int()
        seq_lens = torch.from_numpy(self.seq_lens[rows]).int()
        host_lens = torch.from_numpy(self.host_lens[rows]).int()
        query_lens = starts.diff()
        values = dict(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(self.device),
            seq_lens_cpu=host_lens,
            seq_lens_cpu_upper_bound=host_lens,
            num_computed_tokens_cpu=host_lens - query_lens,
            num_reqs=len(rows),
            num_actual_tokens=len(tokens),
            max_query_len=int(query_lens.max()),
            max_seq_len=int(host_lens.max()),
            block_table_tensor=self.block_table[torch.from_numpy(rows).to(self.device)],
            slot_mapping=self.slot_mapping if whole else self.slot_mapping[torch.from_numpy(tokens).to(self.device)],
            is_prefilling=torch.from_numpy(self.host_lens[rows] - self.query_lens[rows] < self.known_lens[rows] - 1),
        )
        fields = CommonAttentionMetadata.__dataclass_fields__
        return CommonAttentionMetadata(**{name: value for name, value in values.items() if name in fields})

    def build(self, side, common, rows=None):
        known = self.known_lens if rows is None else self.known_lens[rows]
        with mock.patch.object(builder_module, "prompt_lengths", lambda computed: known):
            return side.builder.build(0, common)

    def attend(self, side, metadata, common, tokens=slice(None), query=None):
        """What a layer does: write the cache where that is apart, then `forward` into an output full of NaN."""
        query = (self.query if query is None else query)[tokens]
        key, value = self.key[tokens], self.value[tokens]
        out = torch.full(query.shape, math.nan, dtype=self.pair.shape.dtype, device=self.device)
        if hasattr(side.impl, "do_kv_cache_update"):
            side.impl.do_kv_cache_update(side.layer, key, value, self.cache, common.slot_mapping)
        side.impl.forward(side.layer, query, key, value, self.cache, metadata, out)
        return out

    def run(self, side, rows=None):
        """(output, metadata) of the whole batch, padding included, or of some of its requests alone."""
        common = self.common(rows)
        tokens = slice(None)
        if rows is not None:
            (row,) = rows
            tokens = slice(int(self.starts[row]), int(self.starts[row + 1]))
        metadata = self.build(side, common, rows)
        return self.attend(side, metadata, common, tokens), metadata

    def pieces(self, out):
        return out[: self.num_tokens].split(self.query_lens.tolist())

    def exact(self, k=None, v=None):
        """Dense attention of the batch in float32, [tokens, H, D]."""
        k, v = self.k if k is None else k, self.v if v is None else v
        return torch.cat(
            [exact_attention(q, k[slot], v[slot], self.pair.shape.scale)
             for q, slot in zip(self.pieces(self.query), self.slots, strict=True)]
        )  # fmt: skip

    def errors(self, out, exact):
        """[2, requests] on the host: each request's error, and that of its worst head of a token; relative."""
        squares, total = (out[: self.num_tokens].float() - exact).square().sum(-1), exact.square().sum(-1)
        zeros = torch.zeros(len(self.seq_lens), device=self.device)
        sums = [zeros.index_add(0, self.row_of_token, x.sum(1)) for x in (squares, total)]
        worst = (squares / total.clamp_min(1e-20)).amax(1)
        worst = zeros.scatter_reduce(0, self.row_of_token, worst, "amax")
        return torch.stack([sums[0] / sums[1], worst]).sqrt().cpu().numpy()


def exact_attention(q, k, v, scale, most_logits=1 << 26):
    """Causal attention of the last tokens in float32, [T, H, D]."""
    num_tokens, num_heads, head_size = q.shape
    seq_len, kv_heads = k.shape[:2]
    k, v = k.float().permute(1, 2, 0), v.float().transpose(0, 1)
    at_once = max(1, most_logits // (num_heads * seq_len))
    position = torch.arange(seq_len, device=q.device)
    pieces = []
    for start in range(0, num_tokens, at_once):
        part = q[start : start + at_once].float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        group, rows = part.shape[1:3]
        logits = (torch.bmm(part.flatten(1, 2), k) * scale).view(kv_heads, group, rows, seq_len)
        last = seq_len - num_tokens + start + torch.arange(rows, device=q.device)
        logits.masked_fill_(position > last[:, None], -math.inf)
        out = torch.bmm(logits.softmax(dim=-1).view(kv_heads, group * rows, seq_len), v)
        pieces.append(out.view(kv_heads, group, rows, head_size).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(pieces)


def counted():
    """(sparse tokens, dense tokens by reason) of this process so far."""
    now = stats._to_stats(stats.recorder()._counters)
    return now.sparse_tokens, now.dense_tokens


def since(before):
    sparse, dense = counted()
    more = {name: n - before[1].get(name, 0) for name, n in dense.items()}
    return sparse - before[0], {name: n for name, n in more.items() if n}


def check(batch, pair):
    """Raises AssertionError, naming the batch, where something does not hold for it."""
    try:
        with torch.inference_mode():
            (check_quantised if pair.shape.quantised else check_batch)(batch, pair)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{pair.shape}\n{batch}") from error


def check_batch(batch, pair):
    """alpha 0 is vLLM's own attention; with any alpha each request gets in the batch what it gets alone."""
    step = Step(batch, pair)
    fill_scratch(pair.ours.impl._workspace)
    pair.set_config(batch.config(0.0))
    before = counted()
    with pair.watched() as seen:
        out, metadata = step.run(pair.ours)
    plan = metadata.flashprefill.plan
    dense_tokens = {reason.value: tokens for reason, tokens in plan.dense_tokens.items() if tokens}
    assert since(before) == (plan.num_sparse_tokens, dense_tokens)
    check_calls(seen, metadata)
    check_cache(step)
    assert out[step.num_tokens :].isnan().all(), "rows of padding are left alone"

    exact = step.exact()
    vllms, _ = step.run(pair.vllms)
    check_errors(step.errors(out, exact), step.errors(vllms, exact), pair.shape.dtype)
    if not plan.sparse:
        assert torch.equal(out[: step.num_tokens], vllms[: step.num_tokens]), "a step of vLLM's own"

    pair.set_config(batch.config(batch.alpha))
    together, _ = step.run(pair.ours)
    is_sparse = np.zeros(len(batch.requests), dtype=bool)
    is_sparse[[request.index for request in plan.sparse]] = True
    pieces = zip(step.pieces(together), step.pieces(out), is_sparse, strict=True)
    alone = torch.full_like(together, math.nan)
    same, finite = [], together[: step.num_tokens].isfinite().all()
    for row, (piece, at_alpha_0, sparse) in enumerate(pieces):
        alone_piece, _ = step.run(pair.ours, [row])
        step.pieces(alone)[row].copy_(alone_piece)
        same.append((piece == (alone_piece if sparse else at_alpha_0)).all())
    assert finite, "every row of a request is written"
    for row, equal in enumerate(torch.stack(same).tolist()):
        assert equal, f"request {row} is not, bit for bit, what it is " + (
            "alone" if is_sparse[row] else "at alpha 0, though it is dense"
        )
    # vLLM splits keys as the batch suits it.
    error, worst = step.errors(together, alone[: step.num_tokens].float())
    eps = torch.finfo(pair.shape.dtype).eps
    assert (error <= eps).all() and (worst <= 4 * eps).all(), f"alone: errors {error}, worst {worst}"
    assert together[step.num_tokens :].isnan().all(), "rows of padding are left alone"


def check_calls(seen, metadata):
    """vLLM's own `forward` runs once with what its builder made: of the step, or of its dense requests."""
    plan = metadata.flashprefill.plan
    (whole, _), *parts = seen.built
    assert whole is metadata
    assert len(parts) == (1 if plan.sparse and len(plan.dense) else 0)
    assert len(seen.calls) == (1 if len(plan.dense) else 0)
    for call in seen.calls:
        given, fields = (parts or seen.built)[0]
        assert call["attn_metadata"] is given
        now = vars(given)
        assert all(now[name] is value for name, value in fields.items())


def check_cache(step):
    """The step's keys and values are in their slots, and no other slot has changed."""
    for view, x, _ in step.cache_parts():
        expected = torch.where(step.owned[:, None, None], x, torch.tensor(GARBAGE, dtype=x.dtype, device=x.device))
        assert torch.equal(view, expected.view(view.shape)), "the cache is not what was to be written"


def check_errors(ours, vllms, dtype):
    """Ours at most twice vLLM's. The floors are half the error of one rounding, and two of them for one head."""
    eps = torch.finfo(dtype).eps
    for name, error, other, floor in zip(("error", "worst error"), ours, vllms, (eps / 8, eps), strict=True):
        assert (error <= 2 * other + floor).all(), f"{name} of each request: {error}, vLLM's {other}"


def check_quantised(batch, pair):
    """An e4m3 cache is vLLM's own; the kernels take it, with a query that is not quantised."""
    step = Step(batch, pair)
    impl = pair.ours.impl
    pair.set_config(batch.config(0.0))
    query = quantised_query(step.query, pair.vllms.impl)
    common = step.common()
    before = counted()
    with pair.watched() as seen:
        metadata = step.build(pair.ours, common)
        out = step.attend(pair.ours, metadata, common, query=query)
    plan = metadata.flashprefill.plan
    assert since(before) == (0, {"quantized_kv_cache": step.num_tokens})
    ((whole, fields),) = seen.built[:1]
    (call,) = seen.calls
    assert call["attn_metadata"] is whole is metadata
    assert all(vars(metadata)[name] is value for name, value in fields.items())
    vllms = step.attend(pair.vllms, step.build(pair.vllms, common), common, query=query)
    assert torch.equal(out[: step.num_tokens], vllms[: step.num_tokens])
    assert out[: step.num_tokens].isfinite().all() and out[step.num_tokens :].isnan().all()

    held = []
    for view, x, scale in step.cache_parts():
        values = view.view(torch.float8_e4m3fn).float().reshape(x.shape) * scale
        wrong = (values - x.float()).abs() > 0.07 * x.float().abs() + 0.002 * scale
        assert not (wrong & step.owned[:, None, None]).any(), "the cache is not what was to be written"
        held.append(values)
    direct = torch.full_like(step.query, math.nan)
    k_cache, v_cache = impl.paged_kv(step.cache)
    flash_prefill_paged(
        step.query, k_cache, v_cache, step.block_table, plan,
        config=batch.config(0.0), softmax_scale=pair.shape.scale, out=direct,
        block_counts=device_counts(pair.device).blocks,
        k_scale=pair.ours.layer._k_scale, v_scale=pair.ours.layer._v_scale,
    )  # fmt: skip
    eps = torch.finfo(pair.shape.dtype).eps
    error, worst = step.errors(direct, step.exact(*held))
    for request in plan.sparse:
        row = request.index
        assert error[row] <= eps and worst[row] <= 4 * eps, f"request {row}: error {error[row]}, worst {worst[row]}"
    pieces = step.pieces(direct)
    assert all(pieces[row].isnan().all() for row in plan.dense), "rows of dense requests are left alone"


def quantised_query(query, impl):
    """As vLLM's layer hands it to this impl."""
    takes = getattr(impl, "supports_quant_query_input", False)
    if not (takes() if callable(takes) else takes):
        return query
    return query.float().clamp(-448, 448).to(torch.float8_e4m3fn)


def fill_scratch(workspace):
    """Every float of it is NaN, every integer -1."""
    workspace.rewind()
    workspace.empty((workspace.num_bytes,), torch.uint8).fill_(255)


class PairCache(dict):
    """Pairs of a shape by whether vLLM is to use full CUDA graphs, made when first asked for."""

    def __init__(self, shape, device):
        super().__init__()
        self.shape, self.device = shape, device

    def __missing__(self, full_graphs):
        self[full_graphs] = Pair(self.shape, self.device, full_graphs)
        return self[full_graphs]


def run_batches(shape, device, seeds, longest=6000):
    """Check the batches of some seeds; returns (kept, visible) key blocks of all their sparse layers."""
    pairs = PairCache(shape, device)
    blocks = device_counts(device).blocks.clone()
    for seed in seeds:
        batch = random_batch(seed, shape.page_size, longest)
        check(batch, pairs[batch.full_graphs])
    return (device_counts(device).blocks - blocks).tolist()


def spread(shapes, num_batches):
    """[(shape, its seeds)], with every batch another seed."""
    return [(shape, range(n, num_batches, len(shapes))) for n, shape in enumerate(shapes)]


def shapes(heads, head_sizes, dtypes, page_sizes, kv_cache_dtype="auto"):
    return [
        Shape(*counts, head_size, dtype, page_size, kv_cache_dtype)
        for counts, head_size, dtype, page_size in itertools.product(heads, head_sizes, dtypes, page_sizes)
    ]
