"""The plan of one engine step: which requests are sparse, and where their blocks lie. Host only, once a step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Hashable
from typing import Any

import numpy as np

from vllm_flashprefill.config import BLOCK_SIZE, FlashPrefillConfig
from vllm_flashprefill.routing import DenseReason, is_decode, request_dense_reason


@dataclasses.dataclass(frozen=True)
class SparseRequest:
    """One sequence whose prefill is sparse, and the chunk of it to attend to. Lengths are in tokens.

    Attributes:
        index: its row in the batch, so in the block table too.
        query_start: its first token in the packed queries.
        query_len: its tokens in this step.
        context_len: tokens already in the KV cache before this step.
        prompt_len: tokens of its whole prefill, later chunks included.
        batch: its index along the batch dimension of the queries, and of keys and values that are not paged.
        kv_start: its first token in keys and values that are not paged.
    """

    index: int
    query_start: int
    query_len: int
    context_len: int
    prompt_len: int
    batch: int = 0
    kv_start: int = 0

    @property
    def seq_len(self) -> int:
        return self.context_len + self.query_len

    @property
    def ends_prompt(self) -> bool:
        return self.seq_len >= self.prompt_len

    @property
    def query_slice(self) -> slice:
        return slice(self.query_start, self.query_start + self.query_len)

    @property
    def query_blocks(self) -> range:
        """The blocks that its chunk touches; the last is the sequence's last."""
        return range(self.context_len // BLOCK_SIZE, -(-self.seq_len // BLOCK_SIZE))

    @property
    def visible_blocks(self) -> int:
        """Key blocks that one head's query blocks of this chunk could attend to, over those query blocks."""
        blocks = self.query_blocks
        return len(blocks) * (blocks.start + blocks.stop + 1) // 2


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one step's batch does.

    Attributes:
        sparse: the sparse requests, in batch order.
        dense: rows in the batch of the other requests, int64, in batch order; without those that have no tokens, which
            pad a batch to the size of a CUDA graph.
        dense_tokens: tokens of this step that stay dense, by reason.
        schedules: what GPUs were given of it, by the step's first layer.
        checked: what tensors are like that were found right for it, by layers before.
    """

    sparse: tuple[SparseRequest, ...]
    dense: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, dtype=np.int64))
    dense_tokens: dict[DenseReason, int] = dataclasses.field(default_factory=dict)
    schedules: dict[Hashable, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)
    checked: set[Hashable] = dataclasses.field(default_factory=set, init=False, repr=False, compare=False)

    # Each layer of the step asks.
    @functools.cached_property
    def num_sparse_tokens(self) -> int:
        return sum(request.query_len for request in self.sparse)

    @functools.cached_property
    def num_tokens(self) -> int:
        return self.num_sparse_tokens + sum(self.dense_tokens.values())

    @functools.cached_property
    def visible_blocks(self) -> int:
        return sum(request.visible_blocks for request in self.sparse)

    @functools.cached_property
    def longest_sparse(self) -> int:
        """Tokens of the longest sequence that is sparse in this step, which has some."""
        return max(request.seq_len for request in self.sparse)


# What a step's work is counted in: tokens of a model with so many heads a GPU. The other parts of its layers take as
# long for a token as attention over so many others (Llama-3.1-8B).
WORK_HEADS, WORK_CONTEXT = 32, 24_576

# Of so many, each is asked about by itself. Of more, decodes and short prompts are found together; what remains is
# few, or is sparse and so described one by one anyway.
FEW_REQUESTS = 4

# Of a step that is vLLM's own and is not counted.
EMPTY_PLAN = StepPlan(())


def plan_step(
    query_start_loc: np.ndarray,
    seq_lens: np.ndarray,
    config: FlashPrefillConfig,
    prompt_lens: np.ndarray | None = None,
    is_prefilling: np.ndarray | None = None,
    append_heads: int | None = None,
) -> StepPlan:
    """Split a step's requests into sparse and dense.

    Args:
        query_start_loc: [num_reqs + 1] integers, each request's first token in the packed queries.
        seq_lens: [num_reqs] integers, tokens of each request up to and including this step.
        prompt_lens: [num_reqs] integers, tokens of each request's whole prefill; as of `request_dense_reason` where
            it is not given.
        is_prefilling: [num_reqs] bool, likewise.
        append_heads: query heads a GPU; None where short appends are no dearer than others, as on a CPU.

    Raises:
        ValueError: arrays that do not describe a batch.
    """
    query_start_loc, seq_lens = np.asarray(query_start_loc), np.asarray(seq_lens)
    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    if query_lens.shape != seq_lens.shape:
        raise ValueError(f"query_start_loc has {len(query_lens)} requests, seq_lens has {len(seq_lens)}")
    context_lens = seq_lens - query_lens
    # Of two integers, one of them negative, the bits of either make a negative one.
    if len(seq_lens) and np.minimum.reduce(query_lens | context_lens) < 0:
        raise ValueError("query_start_loc must not decrease, nor a request have more queries than tokens")

    is_dense = query_lens.astype(bool)
    dense_tokens: dict[DenseReason, int] = {}
    if len(seq_lens) <= FEW_REQUESTS:
        rows = is_dense.nonzero()[0]
    else:
        decodes = is_decode(query_lens, context_lens, prompt_lens, config, is_prefilling)
        rows = (is_dense & ~decodes).nonzero()[0]
        num_tokens = int(query_start_loc[-1] - query_start_loc[0])
        if not len(rows):
            return StepPlan((), is_dense.nonzero()[0], {DenseReason.DECODE: num_tokens} if num_tokens else {})
        dense_tokens[DenseReason.DECODE] = num_tokens - int(np.add.reduce(query_lens[rows]))
        if len(rows) > FEW_REQUESTS:
            known_lens = (seq_lens if prompt_lens is None else np.maximum(prompt_lens, seq_lens))[rows]
            is_short = known_lens < config.min_sparse_tokens
            dense_tokens[DenseReason.SHORT_PROMPT] = int(np.add.reduce(query_lens[rows[is_short]]))
            rows = rows[~is_short]

    sparse: list[SparseRequest] = []
    known = (query_start_loc, query_lens, context_lens, prompt_lens, is_prefilling)
    columns = (itertools.repeat(None) if x is None else x[rows].tolist() for x in known)
    for row, start, query_len, context_len, prompt_len, prefills_on in zip(rows.tolist(), *columns, strict=False):
        reason = request_dense_reason(query_len, context_len, prompt_len, config, prefills_on)
        if reason is None:
            prompt_len = max(prompt_len or 0, context_len + query_len)
            sparse.append(SparseRequest(row, start, query_len, context_len, prompt_len))
            is_dense[row] = False
        else:
            dense_tokens[reason] = dense_tokens.get(reason, 0) + query_len
    # A chunk that does not end its prompt is of many tokens, however few of them are in this step.
    if sparse and append_heads and all(request.context_len and request.ends_prompt for request in sparse):
        if step_work(query_lens, seq_lens, append_heads) < config.min_append_tokens:
            dense_tokens[DenseReason.SHORT_APPEND] = sum(request.query_len for request in sparse)
            is_dense[[request.index for request in sparse]] = True
            sparse = []
    counted = {reason: tokens for reason, tokens in dense_tokens.items() if tokens}
    return StepPlan(tuple(sparse), is_dense.nonzero()[0], counted)


def step_work(query_lens: np.ndarray, seq_lens: np.ndarray, num_heads: int) -> float:
    """What dense attention and the rest of a model take for a step, in tokens that have no others before them.

    Args:
        query_lens, seq_lens: [num_reqs] integers, tokens of each request in this step, and up to its end.
        num_heads: query heads a GPU, as which a model's other parts are taken to grow.
    """
    return float((query_lens * (1.0 + seq_lens / WORK_CONTEXT)).sum()) * num_heads / WORK_HEADS
