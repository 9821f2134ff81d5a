"""The CUDA classes on CPU tensors: vLLM's own FlashAttention classes around plain PyTorch in place of its kernels."""

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import vllm_version
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_flashprefill.backend import builder as builder_module
from vllm_flashprefill.backend import cuda_builder, stats
from vllm_flashprefill.backend.routing import DenseReason
from vllm_flashprefill.config import FlashPrefillConfig

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 64
SCALE = HEAD_SIZE**-0.5
DTYPE = torch.bfloat16
BARE = {"num_sink_blocks": 0, "num_window_blocks": 1, "num_dense_tail_blocks": 0, "min_sparse_tokens": 300}
EXACT = FlashPrefillConfig(alpha=0.0, **BARE)
SPARSE = FlashPrefillConfig(alpha=0.4, **{**BARE, "num_dense_tail_blocks": 1})
LAYER = "model.layers.1.self_attn.attn"

version_module = importlib.import_module(f"vllm_flashprefill.patches.vllm_{vllm_version().replace('.', '_')}_cuda")


@pytest.fixture(scope="session", autouse=True)
def model():
    """No model is needed here."""


@pytest.fixture(autouse=True)
def own_counters(monkeypatch):
    """Engines that other tests start in this process make theirs."""
    monkeypatch.setattr(stats, "_recorder", None)


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    from vllm.engine.arg_utils import EngineArgs

    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HEADS * HEAD_SIZE,
        "intermediate_size": 512,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config))
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=4096, max_num_batched_tokens=4096
    )
    return arguments.create_engine_config()


def write_cache(key, value, k_cache, v_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    page_size = k_cache.shape[1]
    for x, cache in ((key, k_cache), (value, v_cache)):
        slots = slot_mapping[slot_mapping >= 0]
        cache[slots // page_size, slots % page_size] = x[: len(slot_mapping)][slot_mapping >= 0]


def flash_attention(*, q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale, causal, **options):
    assert causal and q.shape[0] == cu_seqlens_q[-1]
    bounds = cu_seqlens_q.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        seq_len = int(seqused_k[row])
        pages = block_table[row, : math.ceil(seq_len / k.shape[1])].long()
        keys, values = (cache[pages].flatten(0, 1)[:seq_len] for cache in (k, v))
        out[start:end] = attend(q[start:end], keys, values)


def attend(q, k, v):
    """Causal attention of the last of the tokens, in float32."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    logits = SCALE * torch.einsum("thd,shd->hts", q.float(), k)
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return torch.einsum("hts,shd->thd", logits.masked_fill(hidden, -torch.inf).softmax(dim=-1), v).to(q.dtype)


class Calls(list):
    """Arguments by name of each call of vLLM's own `forward`."""


@pytest.fixture(scope="module")
def calls():
    from vllm.v1.attention.backends import flash_attn

    calls = Calls()
    forward = flash_attn.FlashAttentionImpl.forward

    def record(*args, **kwargs):
        calls.append(inspect.signature(forward).bind(*args, **kwargs).arguments)
        return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_attn.FlashAttentionImpl, "forward", record)
        patch.setattr(flash_attn, "reshape_and_cache_flash", write_cache, raising=False)
        patch.setattr(flash_attn, "flash_attn_varlen_func", flash_attention, raising=False)
        yield calls


@dataclass
class Request:
    """Tokens of this step, in the cache before it, and of the prompt after it."""

    query_len: int
    context_len: int = 0
    rest: int = 0
    seed: int = 0

    @property
    def seq_len(self):
        return self.context_len + self.query_len

    def tensors(self):
        """q [T, H, D], k [S, G, D], v; blocks of keys differ, so that there is something to prune."""
        generator = torch.Generator().manual_seed(1000 * self.seed + self.seq_len)
        blocks = -(-self.seq_len // 128)
        themes = torch.randn(blocks, KV_HEADS, HEAD_SIZE, generator=generator).repeat_interleave(128, dim=0)
        k = torch.randn(self.seq_len, KV_HEADS, HEAD_SIZE, generator=generator) + 1.5 * themes[: self.seq_len]
        v = torch.randn(self.seq_len, KV_HEADS, HEAD_SIZE, generator=generator)
        q = torch.randn(self.query_len, HEADS, HEAD_SIZE, generator=generator)
        q += 0.8 * themes[-self.query_len % len(themes)].repeat_interleave(HEADS // KV_HEADS, dim=0)
        return q.to(DTYPE), k.to(DTYPE), v.to(DTYPE)


@dataclass
class Step:
    """A batch as vLLM's model runner gives it to builder and impl."""

    requests: list
    page_size: int
    padding: int
    heads_first: bool = False

    def __post_init__(self):
        self.parts = [request.tensors() for request in self.requests]
        query_lens = [request.query_len for request in self.requests]
        self.num_tokens = sum(query_lens)
        self.starts = np.cumsum([0, *query_lens])
        counts = [-(-request.seq_len // self.page_size) for request in self.requests]
        order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(len(counts)))
        self.block_table = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
        shape = (2, len(order), self.page_size, KV_HEADS, HEAD_SIZE)
        self.kv_cache = torch.full(shape, torch.nan, dtype=DTYPE)
        if self.heads_first:
            self.kv_cache = self.kv_cache.transpose(2, 3).contiguous().transpose(2, 3)
        slots = []
        used = 0
        for row, (request, count) in enumerate(zip(self.requests, counts, strict=True)):
            self.block_table[row, :count] = order[used : used + count]
            positions = torch.arange(request.seq_len)
            slot = self.block_table[row, positions // self.page_size].long() * self.page_size
            slot += positions % self.page_size
            context = request.context_len
            for cache, x in zip(self.kv_cache, self.parts[row][1:], strict=True):
                cache[slot[:context] // self.page_size, slot[:context] % self.page_size] = x[:context]
            slots.append(slot[context:])
            used += count
        self.slot_mapping = torch.cat(slots)

    def inputs(self):
        """query, key, value with rows of padding, and an output full of NaN."""
        q = torch.cat([part[0] for part in self.parts])
        k, v = (torch.cat([part[n][-r.query_len :] for part, r in self.with_requests()]) for n in (1, 2))
        padded = [torch.cat([x, x.new_full((self.padding, *x.shape[1:]), torch.nan)]) for x in (q, k, v)]
        return *padded, torch.full_like(padded[0], torch.nan)

    def with_requests(self):
        return list(zip(self.parts, self.requests, strict=True))

    def common(self, **changes):
        from vllm.v1.attention.backends.utils import CommonAttentionMetadata

        seq_lens = torch.tensor([r.seq_len for r in self.requests], dtype=torch.int32)
        starts = torch.from_numpy(self.starts).int()
        values = dict(
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens.clone(),
            num_computed_tokens_cpu=torch.tensor([r.context_len for r in self.requests], dtype=torch.int32),
            num_reqs=len(self.requests),
            num_actual_tokens=self.num_tokens,
            max_query_len=max(r.query_len for r in self.requests),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=self.block_table,
            slot_mapping=self.slot_mapping,
            **changes,
        )
        fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
        return CommonAttentionMetadata(**{name: value for name, value in values.items() if name in fields})

    def pieces(self, out):
        return list(out[: self.num_tokens].split([r.query_len for r in self.requests]))


class Classes:
    """A builder and an impl of this vLLM, made as vLLM makes them."""

    def __init__(self, vllm_config, config, page_size=16, **changes):
        from vllm.config import set_current_vllm_config
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        backend = version_module.FlashPrefillCUDABackend
        spec = dict(block_size=page_size, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=DTYPE, use_mla=False)
        spec = {name: value for name, value in spec.items() if name in FullAttentionSpec.__dataclass_fields__}
        arguments = dict(kv_cache_spec=FullAttentionSpec(**spec), layer_names=[LAYER], vllm_config=vllm_config)
        known = inspect.signature(backend.__mro__[1].get_builder_cls().__init__).parameters
        impl = dict(
            num_heads=HEADS,
            head_size=HEAD_SIZE,
            scale=SCALE,
            num_kv_heads=KV_HEADS,
            alibi_slopes=None,
            sliding_window=None,
            kv_cache_dtype="auto",
        )
        with set_current_vllm_config(vllm_config):
            self.impl = backend.get_impl_cls()(**{**impl, **changes})
            self.builder = backend.get_builder_cls()(
                **{name: value for name, value in arguments.items() if name in known}, device=torch.device("cpu")
            )
        self.impl.flashprefill_config = self.builder.flashprefill_config = config
        one = torch.ones(1)
        self.layer = SimpleNamespace(layer_name=LAYER, _q_scale=one, _k_scale=one, _v_scale=one)

    def build(self, step, common_prefix_len=0, **changes):
        with pytest.MonkeyPatch.context() as patch:
            prompts = np.array([r.seq_len + r.rest for r in step.requests])
            patch.setattr(builder_module, "prompt_lengths", lambda computed: prompts)
            return self.builder.build(common_prefix_len, step.common(**changes))

    def forward(self, step, metadata, *scales):
        query, key, value, output = step.inputs()
        returned = self.impl.forward(self.layer, query, key, value, step.kv_cache, metadata, output, *scales)
        assert returned is output
        return output

    def run(self, step):
        return self.forward(step, self.build(step))


@contextlib.contextmanager
def counted():
    """The statistics of what happens inside, once it is over."""
    result = SimpleNamespace()
    before = stats._to_stats(stats.recorder()._counters)
    yield result
    result.stats = stats._to_stats(stats.recorder()._counters) - before


def assert_dense(step, out):
    for (q, k, v), got in zip(step.parts, step.pieces(out), strict=True):
        torch.testing.assert_close(got, attend(q, k, v), rtol=2e-2, atol=1e-2)
    assert out[step.num_tokens :].isnan().all(), "padding is left alone"


seeds = st.integers(0, 50)
decodes = st.builds(Request, st.just(1), st.integers(1, 700), seed=seeds)
shorts = st.builds(Request, st.integers(1, 299), seed=seeds)
wholes = st.builds(Request, st.integers(300, 700), seed=seeds)
chunks = st.builds(Request, st.integers(1, 500), st.integers(1, 600), st.integers(1, 500), seed=seeds)
steps = st.builds(
    Step,
    st.lists(st.one_of(decodes, shorts, wholes, chunks), min_size=1, max_size=5),
    page_size=st.sampled_from([16, 48, 128]),
    padding=st.integers(0, 3),
    heads_first=st.booleans(),
)
modest = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@modest
@given(steps)
def test_alpha_0_is_dense_whatever_the_batch(vllm_config, calls, step):
    classes = Classes(vllm_config, EXACT, step.page_size)
    calls.clear()
    metadata = classes.build(step)
    plan = metadata.flashprefill.plan
    with counted() as count:
        out = classes.forward(step, metadata)
    assert_dense(step, out)
    assert len(calls) == (1 if len(plan.dense) else 0)
    assert count.stats.sparse_tokens == plan.num_sparse_tokens
    assert count.stats.kept_blocks == count.stats.visible_blocks == HEADS * plan.visible_blocks
    assert count.stats.dense_tokens == {reason.value: n for reason, n in plan.dense_tokens.items() if n}


@modest
@given(steps)
def test_each_request_gets_in_a_batch_what_it_gets_alone(vllm_config, calls, step):
    classes = Classes(vllm_config, SPARSE, step.page_size)
    with counted() as together:
        pieces = step.pieces(classes.run(step))
    with counted() as apart:
        for request, piece in zip(step.requests, pieces, strict=True):
            alone = Step([request], step.page_size, 0, step.heads_first)
            assert torch.equal(alone.pieces(classes.run(alone))[0], piece)
    assert together.stats == apart.stats


def test_the_cases_prune(vllm_config, calls):
    with counted() as count:
        Classes(vllm_config, SPARSE).run(Step([Request(1, 400), Request(700, seed=3), Request(400, 256, 300)], 16, 2))
    assert count.stats.sparse_tokens == 1100
    assert 0.3 < count.stats.density < 0.95


def test_a_request_reads_pages_that_another_of_the_step_writes(vllm_config, calls):
    """A prefix hit on a prompt that is in the same step, by a sparse and by a dense request."""
    step = Step([Request(500), Request(600, 128), Request(1, 128)], 16, 0)
    first = step.parts[0]
    for row in (1, 2):
        _q, k, v = step.parts[row]
        k[:128], v[:128] = first[1][:128], first[2][:128]
        step.kv_cache[:, step.block_table[row, :8].long()] = torch.nan
        step.block_table[row, :8] = step.block_table[0, :8]
    assert_dense(step, Classes(vllm_config, EXACT).run(step))


def test_a_step_with_no_sparse_request_is_vllms_own(vllm_config, calls):
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(1, 400), Request(200), Request(1, 5)], 16, 3)
    metadata = classes.build(step)
    before = dict(vars(metadata))
    calls.clear()
    query, key, value, output = step.inputs()
    with counted() as count:
        classes.impl.forward(classes.layer, query, key, value, step.kv_cache, metadata, output=output)
    (call,) = calls
    assert call["query"] is query and call["key"] is key and call["value"] is value and call["output"] is output
    assert call["attn_metadata"] is metadata and vars(metadata) == before
    assert_dense(step, output)
    assert count.stats.dense_tokens == {"decode": 2, "short_prompt": 200}


@pytest.mark.parametrize("together", [True, False])
def test_the_dense_requests_of_a_mixed_step_go_to_vllm_once(vllm_config, calls, together):
    classes = Classes(vllm_config, EXACT)
    requests = [Request(1, 400), Request(200), Request(600), Request(1, 30)]
    step = Step(requests[: 3 if together else 4], 16, 2)
    metadata = classes.build(step)
    dense_metadata = metadata.flashprefill.dense_metadata
    assert type(dense_metadata) is type(metadata) and not hasattr(dense_metadata, "flashprefill")
    assert isinstance(metadata.flashprefill.dense_rows, slice) == together
    calls.clear()
    assert_dense(step, classes.forward(step, metadata))
    (call,) = calls
    assert call["attn_metadata"] is dense_metadata
    assert len(call["query"]) == dense_metadata.num_actual_tokens == step.num_tokens - 600
    assert (call["key"] is None) == (vllm_version() != "0.10.0")


def test_a_profile_run_is_vllms_own(vllm_config, calls):
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(600)], 16, 0)
    calls.clear()
    with counted() as count:
        classes.forward(step, None)
    assert len(calls) == 1
    assert count.stats == stats.Stats()


def test_a_quantised_output_is_refused_by_vllm(vllm_config, calls):
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(600)], 16, 0)
    with pytest.raises(NotImplementedError, match="output quantization"):
        classes.forward(step, classes.build(step), torch.ones(1))


def test_cascade_attention(vllm_config, calls, monkeypatch):
    from vllm.v1.attention.backends import flash_attn

    cascades = []
    monkeypatch.setattr(flash_attn, "cascade_attention", lambda *args, **kwargs: cascades.append(kwargs))
    classes = Classes(vllm_config, EXACT)
    decoding = Step([Request(1, 400), Request(1, 300)], 16, 0)
    metadata = classes.build(decoding, common_prefix_len=256)
    assert metadata.use_cascade
    classes.forward(decoding, metadata)
    assert len(cascades) == 1
    mixed = Step([Request(1, 400), Request(600, 300)], 16, 0)
    metadata = classes.build(mixed, common_prefix_len=256)
    assert metadata.use_cascade and not metadata.flashprefill.dense_metadata.use_cascade
    assert_dense(mixed, classes.forward(mixed, metadata))
    assert len(cascades) == 1


def reason_of(classes, kv_cache):
    return classes.impl.dense_reason(classes.layer, kv_cache, None)


def test_layers_the_kernels_do_not_take_are_dense(vllm_config, calls):
    shape = (2, 4, 16, KV_HEADS, HEAD_SIZE)
    cache = torch.zeros(shape, dtype=DTYPE)
    classes = Classes(vllm_config, EXACT)
    assert reason_of(classes, cache) is None
    assert reason_of(classes, cache.float()) is DenseReason.DTYPE
    assert reason_of(classes, torch.zeros(2, 4, 24, KV_HEADS, HEAD_SIZE, dtype=DTYPE)) is DenseReason.KV_CACHE_LAYOUT
    assert reason_of(classes, torch.zeros(shape[::-1], dtype=DTYPE).permute(4, 3, 2, 1, 0)) is (
        DenseReason.KV_CACHE_LAYOUT
    )
    odd = Classes(vllm_config, EXACT, head_size=96)
    assert reason_of(odd, torch.zeros(*shape[:-1], 96, dtype=DTYPE)) is DenseReason.HEAD_SIZE
    assert not odd.impl.may_be_sparse
    assert reason_of(Classes(vllm_config, EXACT, sliding_window=64), cache) is DenseReason.SLIDING_WINDOW


def test_a_dense_layer_takes_a_mixed_step_whole(vllm_config, calls):
    classes = Classes(vllm_config, dataclasses.replace(EXACT, num_dense_layers=2))
    step = Step([Request(1, 400), Request(600)], 16, 5)
    metadata = classes.build(step)
    calls.clear()
    with counted() as count:
        assert_dense(step, classes.forward(step, metadata))
    assert [call["attn_metadata"] for call in calls] == [metadata]
    assert count.stats == stats.Stats(dense_tokens={"dense_layer": 601})


def test_a_draft_models_batch_is_vllms_own(vllm_config, calls):
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    metadata = classes.builder.build(0, step.common(), fast_build=True)
    calls.clear()
    with counted() as count:
        assert_dense(step, classes.forward(step, metadata))
    assert [call["attn_metadata"] for call in calls] == [metadata]
    assert count.stats == stats.Stats(dense_tokens={"not_planned": 601})


def test_a_batch_that_describes_no_requests_is_vllms_own(vllm_config, calls):
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(600)], 16, 0)
    metadata = classes.builder.build(
        0, dataclasses.replace(step.common(), query_start_loc_cpu=torch.tensor([5, 0], dtype=torch.int32))
    )
    assert metadata.flashprefill is None
    with counted() as count:
        classes.forward(step, metadata)
    assert count.stats.dense_tokens == {"not_planned": 600}


def test_a_captured_batch_is_vllms_own_and_not_counted(vllm_config, calls):
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    metadata = classes.builder.build_for_cudagraph_capture(step.common())
    calls.clear()
    with counted() as count:
        assert_dense(step, classes.forward(step, metadata))
    assert [call["attn_metadata"] for call in calls] == [metadata]
    assert count.stats == stats.Stats()


def test_no_mixed_batch_is_a_full_graph(vllm_config, calls, monkeypatch):
    classes = Classes(vllm_config, EXACT)
    if vllm_version() == "0.10.0":
        decoding, mixed = Step([Request(1, 400)], 16, 0), Step([Request(1, 400), Request(600)], 16, 0)
        for step, expected in ((decoding, True), (mixed, False), (decoding, True)):
            classes.build(step)
            assert classes.builder.can_run_in_cudagraph(step.common()) is expected
        return
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
    from vllm.v1.attention.backends.utils import AttentionCGSupport

    for own, expected in (("ALWAYS", "UNIFORM_BATCH"), ("UNIFORM_BATCH", "UNIFORM_BATCH"), ("NEVER", "NEVER")):
        monkeypatch.setattr(FlashAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport[own])
        support = type(classes.builder).get_cudagraph_support(vllm_config, classes.builder.kv_cache_spec)
        assert support is AttentionCGSupport[expected]


def test_the_dense_schedule_stays_out_of_the_buffer_that_graphs_read(vllm_config, calls, monkeypatch):
    from vllm.v1.attention.backends import flash_attn

    schedules = []

    def schedule(**arguments):
        schedules.append(arguments)
        return torch.full((3,), len(schedules), dtype=torch.int32)

    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", schedule, raising=False)
    classes = Classes(vllm_config, EXACT)
    classes.builder.aot_schedule = classes.builder.use_full_cuda_graph = True
    classes.builder.max_num_splits, classes.builder.max_cudagraph_size = 16, 512
    classes.builder.scheduler_metadata = torch.zeros(8, dtype=torch.int32)
    metadata = classes.build(Step([Request(1, 400), Request(600)], 16, 0))
    assert [arguments["batch_size"] for arguments in schedules] == [2, 1]
    assert classes.builder.scheduler_metadata.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert metadata.flashprefill.dense_metadata.scheduler_metadata.tolist() == [2, 2, 2]
    assert schedules[1]["num_splits"] == metadata.flashprefill.dense_metadata.max_num_splits == 0
    assert classes.builder.use_full_cuda_graph and classes.builder.max_num_splits == 16


def test_scratch_is_reserved_with_the_layer(vllm_config, calls):
    from vllm_flashprefill.kernels.workspace import scratch_bytes

    classes = Classes(vllm_config, EXACT)
    needed = scratch_bytes(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        max_query_tokens=4096,
        max_seq_len=4096,
        device=torch.device("cpu"),
    )
    assert classes.impl._workspace.num_bytes >= needed > 0
    assert Classes(vllm_config, EXACT).impl._workspace is classes.impl._workspace


def test_kernels_are_compiled_once_for_each_kind_of_layer(vllm_config, calls, monkeypatch):
    monkeypatch.setattr(cuda_builder, "_compiled", set())
    ran = []
    paged = cuda_builder.flash_prefill_paged

    def record(q, k_cache, *args, **kwargs):
        ran.append((*q.shape[1:], *k_cache.shape[1:]))
        return paged(q, k_cache, *args, **kwargs)

    monkeypatch.setattr(cuda_builder, "flash_prefill_paged", record)
    classes = Classes(vllm_config, EXACT, 32)
    impls = [classes.impl, Classes(vllm_config, EXACT).impl, Classes(vllm_config, EXACT, sliding_window=64).impl]
    for page_size in (32, 32, 128):
        cuda_builder.compile_kernels(
            impls, classes.builder.new_cache, page_size=page_size, dtype=DTYPE, device=torch.device("cpu")
        )
    assert ran == [(HEADS, HEAD_SIZE, page_size, KV_HEADS, HEAD_SIZE) for page_size in (32, 128)]
