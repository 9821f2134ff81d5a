"""Random batches for vLLM's FlashAttention classes and ours beside each other, and what must hold for each batch.

On the GPU vLLM's classes are what it serves with; a CPU test puts PyTorch in place of their kernels.
"""

import contextlib
import dataclasses
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from tests.support.batch_step import GARBAGE, Step
from tests.support.random_batch import random_batch
from tests.support.vllm_side import Side, counted, our_backend, recorded_forward
from vllm_flashprefill.backend.device_counts import device_counts


class Pair:
    """Our side and vLLM's own for one shape, and what is seen of vLLM's classes while `watched`.

    Attributes:
        options: of our side's config, beside a batch's.
    """

    def __init__(self, shape, device, full_graphs, options=None):
        self.options = options or {}
        backend = our_backend()
        own = backend.__bases__[-1]
        self.shape, self.device = shape, device
        self.own_impl, self.own_builder = own.get_impl_cls(), own.get_builder_cls()
        self.vllms = Side(own, self.own_builder, shape, device, full_graphs)
        self.ours = Side(backend, self.own_builder, shape, device, full_graphs)
        assert self.ours.impl.may_be_sparse

    @contextlib.contextmanager
    def watched(self):
        """The arguments of each call of vLLM's own `forward`, and each metadata its builder made with its fields."""
        built, build = [], self.own_builder.build

        def watched_build(*args, **kwargs):
            metadata = build(*args, **kwargs)
            built.append((metadata, dict(vars(metadata))))
            return metadata

        with recorded_forward(self.own_impl) as calls, mock.patch.object(self.own_builder, "build", watched_build):
            yield SimpleNamespace(calls=calls, built=built)


def check(batch, pair):
    """Raises AssertionError, naming the batch, where something does not hold for it."""
    try:
        with torch.inference_mode():
            check_batch(batch, pair)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{pair.shape}\n{batch}") from error


def check_batch(batch, pair):
    """alpha 0 is vLLM's own attention; with any alpha each request gets in the batch what it gets alone."""
    step = Step(batch, pair)
    fill_scratch(pair.ours.impl._workspace)
    pair.ours.set_config(dataclasses.replace(batch.config(0.0), **pair.options))
    with counted() as count, pair.watched() as seen:
        out, metadata = step.run(pair.ours)
    plan = metadata.flashprefill.plan
    dense_tokens = {reason.value: tokens for reason, tokens in plan.dense_tokens.items() if tokens}
    assert (count.stats.sparse_tokens, count.stats.dense_tokens) == (plan.num_sparse_tokens, dense_tokens)
    check_calls(seen, metadata)
    check_cache(step)
    assert out[step.num_tokens :].isnan().all(), "rows of padding are left alone"

    exact = step.exact()
    vllms, _ = step.run(pair.vllms)
    check_errors(step.errors(out, exact), step.errors(vllms, exact), pair.shape.dtype)
    if not plan.sparse:
        assert torch.equal(out[: step.num_tokens], vllms[: step.num_tokens]), "a step of vLLM's own"

    pair.ours.set_config(dataclasses.replace(batch.config(batch.alpha), **pair.options))
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
    # vLLM splits keys as the batch suits it, and rounds probabilities to e4m3 where the cache is.
    error, worst = step.errors(together, alone[: step.num_tokens].float())
    eps = torch.finfo(torch.float8_e4m3fn if pair.shape.quantised else pair.shape.dtype).eps
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
    for view, x, scale in step.cache_parts():
        expected = torch.where(step.owned[:, None, None], x, torch.tensor(GARBAGE, dtype=x.dtype, device=x.device))
        expected = step.coded(expected, scale)
        assert torch.equal(view, expected.view(view.shape)), "the cache is not what was to be written"


def check_errors(ours, vllms, dtype):
    """Ours at most twice vLLM's. The floors are half the error of one rounding, and two of them for one head."""
    eps = torch.finfo(dtype).eps
    for name, error, other, floor in zip(("error", "worst error"), ours, vllms, (eps / 8, eps), strict=True):
        assert (error <= 2 * other + floor).all(), f"{name} of each request: {error}, vLLM's {other}"


def fill_scratch(workspace):
    """Every float of it is NaN, every integer -1."""
    workspace.rewind()
    workspace.empty((workspace.num_bytes,), torch.uint8).fill_(255)


class PairCache(dict):
    """Pairs of a shape by whether vLLM is to use full CUDA graphs, made when first asked for."""

    def __init__(self, shape, device, options=None):
        super().__init__()
        self.shape, self.device, self.options = shape, device, options

    def __missing__(self, full_graphs):
        self[full_graphs] = Pair(self.shape, self.device, full_graphs, self.options)
        return self[full_graphs]


def run_batches(shape, device, seeds, longest=6000, options=None):
    """Check the batches of some seeds; returns (kept, visible) key blocks of all their sparse layers."""
    pairs = PairCache(shape, device, options)
    blocks = device_counts(device).blocks.sum(0)
    for seed in seeds:
        batch = random_batch(seed, shape.page_size, longest)
        check(batch, pairs[batch.full_graphs])
    return (device_counts(device).blocks.sum(0) - blocks).tolist()
