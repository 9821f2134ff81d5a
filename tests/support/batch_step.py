import math
from unittest import mock

import numpy as np
import torch

from tests.support.attention import exact_attention
from tests.support.e4m3 import to_e4m3
from tests.support.vllm_side import common_fields, common_metadata, common_values
from vllm_flashprefill.backend import builder as builder_module
from vllm_flashprefill.backend.layer_routing import has_quantised_query
from vllm_flashprefill.key_values import dequantise, dequantise_queries

# Free slots hold this: finite, since vLLM's kernels multiply it by a probability of 0, and not to be missed.
GARBAGE = 30_000.0


class Step:
    """A batch's tensors: a cache that holds the contexts, with NaN where this step's keys and values go."""

    def __init__(self, batch, pair):
        self.batch, self.pair, self.device = batch, pair, pair.device
        shape, requests, page_size = pair.shape, batch.requests, batch.page_size
        rng = np.random.default_rng([batch.seed, 1])
        self.query_lens = np.array([r.query_len for r in requests])
        self.seq_lens = np.array([r.seq_len for r in requests])
        refused = ("seq_lens_cpu_upper_bound" in common_fields()) * np.array([r.refused for r in requests])
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
        if shape.quantised:
            self.k, self.v = (dequantise(self.coded(x, scale), scale) for x, scale in zip(
                (self.k, self.v), (pair.ours.layer._k_scale, pair.ours.layer._v_scale), strict=True))  # fmt: skip
        head = torch.arange(shape.heads, device=self.device) // group
        drawn = theme[to_device(np.stack(theme_of_query)), head][to_device(np.concatenate(block_of_query))]
        q = (randn(self.num_tokens, shape.heads, shape.head_size) + 0.8 * drawn).to(shape.dtype)
        new = self.slot_mapping[: self.num_tokens]
        parts = [torch.nn.functional.pad(x.to(shape.dtype), (0, 0, 0, 0, 0, batch.padding), value=math.nan)
                 for x in (q, self.k[new], self.v[new])]  # fmt: skip
        if batch.fused_qkv:
            parts = torch.cat(parts, dim=1).split([shape.heads, kv_heads, kv_heads], dim=1)
        self.query, self.key, self.value = parts
        self.exact_query = self.query
        if has_quantised_query(pair.ours.impl):
            # As vLLM's layer does, whatever the query was a part of.
            scale = pair.ours.layer._q_scale
            self.query = self.coded(self.query, scale, shape.heads // kv_heads).view(torch.float8_e4m3fn)
            self.exact_query = dequantise_queries(self.query, scale, kv_heads)

        self.cache = self.new_cache()
        empty = torch.where(to_device(written), math.nan, GARBAGE).to(shape.dtype)[:, None, None]
        in_context = to_device(context & ~written)[:, None, None]
        for view, x, scale in self.cache_parts():
            view.copy_(self.coded(torch.where(in_context, x.to(shape.dtype), empty), scale).view(view.shape))

    def new_cache(self):
        """As vLLM makes it, in the layout asked for."""
        from vllm.v1.attention.backends import utils

        shape = self.pair.shape

        def set_layout(name):
            if not hasattr(utils, "set_kv_cache_layout"):
                cache_config = self.pair.ours.builder.vllm_config.cache_config
                cache_config.kv_cache_layout = {"HND": "LBHNC", "NHD": "LBNHC", None: "LBNHC"}[name]
                return
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
        layer = self.pair.ours.layer
        return (k_cache, self.k, layer._k_scale), (v_cache, self.v, layer._v_scale)

    def coded(self, x, scale, heads_of_one=1):
        """[..., heads, D] as it lies in the cache. scale: one, or one for every so many heads."""
        if not self.pair.shape.quantised:
            return x
        scale = scale.repeat_interleave(heads_of_one) if scale.numel() > 1 else scale
        return to_e4m3(x, scale).view(torch.uint8)

    def common(self, rows=None):
        """What the model runner tells builders of the batch, or of some of its requests as a batch of their own."""
        if rows is None:
            rows, slot_mapping = np.arange(len(self.seq_lens)), self.slot_mapping
        else:
            tokens = np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows])
            slot_mapping = self.slot_mapping[torch.from_numpy(tokens).to(self.device)]
        starts = np.cumsum([0, *self.query_lens[rows]])
        block_table = self.block_table[torch.as_tensor(rows, device=self.device)]
        lens = (x[rows] for x in (self.seq_lens, self.host_lens, self.known_lens))
        values = common_values(starts, *lens, block_table, slot_mapping)
        if self.batch.said == "nothing":
            del values["is_prefilling"]
        return common_metadata(values)

    def build(self, side, common, rows=None):
        known = self.known_lens if rows is None else self.known_lens[rows]
        lengths = known if self.batch.said == "lengths" else None
        with mock.patch.object(builder_module, "prompt_lengths", lambda *_: lengths):
            return side.builder.build(0, common)

    def attend(self, side, metadata, common, tokens=slice(None)):
        """What a layer does: write the cache where that is apart, then `forward` into an output full of NaN."""
        query, key, value = (x[tokens] for x in (self.query, self.key, self.value))
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

    def exact(self):
        """Dense attention of the batch in float32, [tokens, H, D]."""
        sinks = getattr(self.pair.ours.impl, "sinks", None)
        return torch.cat(
            [exact_attention(q, self.k[slot], self.v[slot], self.pair.shape.scale, sinks=sinks)
             for q, slot in zip(self.pieces(self.exact_query), self.slots, strict=True)]
        )  # fmt: skip

    def errors(self, out, exact):
        """[2, requests] on the host: each request's error, and that of its worst head of a token; relative."""
        squares, total = (out[: self.num_tokens].float() - exact).square().sum(-1), exact.square().sum(-1)
        zeros = torch.zeros(len(self.seq_lens), device=self.device)
        sums = [zeros.index_add(0, self.row_of_token, x.sum(1)) for x in (squares, total)]
        worst = (squares / total.clamp_min(1e-20)).amax(1)
        worst = zeros.scatter_reduce(0, self.row_of_token, worst, "amax")
        return torch.stack([sums[0] / sums[1], worst]).sqrt().cpu().numpy()
