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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vllm_flashprefill
from tests.support.engines import vllm_version
from vllm_flashprefill.backend import cuda_builder, prompt_lengths, stats
from vllm_flashprefill.backend.device_counts import device_counts
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
attention = importlib.import_module(
    "vllm.v1.attention.backends.utils" if vllm_version() in ("0.10.0", "0.12.0") else "vllm.v1.attention.backend"
)
# Which dimension of a cache is of keys and values.
KV_DIM = version_module.FlashPrefillCUDABackend.get_kv_cache_shape(16, 16, KV_HEADS, HEAD_SIZE).index(2)
COMMON_FIELDS = {field.name for field in dataclasses.fields(attention.CommonAttentionMetadata)}


@pytest.fixture(scope="session", autouse=True)
def model():
    """No model is needed here."""


@pytest.fixture(autouse=True)
def own_counters(monkeypatch):
    """Engines that other tests start in this process make theirs, and other tests' counts are none of these."""
    monkeypatch.setattr(stats, "_recorder", None)
    device_counts.cache_clear()


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
    assert q[cu_seqlens_q[-1] :].isnan().all(), "what belongs to no request is padding"
    bounds = cu_seqlens_q.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        seq_len = int(seqused_k[row])
        pages = block_table[row, : math.ceil(seq_len / k.shape[1])].long()
        keys, values = (cache[pages].flatten(0, 1)[:seq_len] for cache in (k, v))
        out[start:end] = attend(q[start:end], keys, values, causal)


def attend(q, k, v, causal=True):
    """Attention of the last of the tokens, in float32."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    logits = SCALE * torch.einsum("thd,shd->hts", q.float(), k)
    if causal:
        logits.masked_fill_(torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1), -torch.inf)
    return torch.einsum("hts,shd->thd", logits.softmax(dim=-1), v).to(q.dtype)


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


def new_cache(num_pages, page_size, heads_first=False):
    """A cache laid out as vLLM's, and its [2, num_pages, page_size, G, D] view."""
    shape = version_module.FlashPrefillCUDABackend.get_kv_cache_shape(num_pages, page_size, KV_HEADS, HEAD_SIZE)
    cache = torch.full(shape, torch.nan, dtype=DTYPE)
    if heads_first:
        cache = cache.transpose(2, 3).contiguous().transpose(2, 3)
    return cache, cache.movedim(KV_DIM, 0)


@dataclass
class Step:
    """A batch as vLLM's model runner gives it to builder and impl.

    Attributes:
        padding: rows after the batch's own.
        group: which of the groups of layers this is, whose caches have pages in another order.
        in_a_graph: whether the batch is padded as those of full CUDA graphs, with that many requests without tokens.
    """

    requests: list
    page_size: int
    padding: int
    heads_first: bool = False
    group: int = 0
    in_a_graph: bool = False

    def __post_init__(self):
        self.parts = [request.tensors() for request in self.requests]
        query_lens = [request.query_len for request in self.requests]
        self.num_tokens = sum(query_lens)
        self.starts = np.cumsum([0, *query_lens])
        counts = [-(-request.seq_len // self.page_size) for request in self.requests]
        generator = torch.Generator().manual_seed(100 * self.group + len(counts))
        order = torch.randperm(sum(counts) + 2, generator=generator)
        self.block_table = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
        self.kv_cache, self.keys_and_values = new_cache(len(order), self.page_size, self.heads_first)
        slots = []
        used = 0
        for row, (request, count) in enumerate(zip(self.requests, counts, strict=True)):
            self.block_table[row, :count] = order[used : used + count]
            positions = torch.arange(request.seq_len)
            slot = self.block_table[row, positions // self.page_size].long() * self.page_size
            slot += positions % self.page_size
            context = request.context_len
            for cache, x in zip(self.keys_and_values, self.parts[row][1:], strict=True):
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
        seq_lens = torch.tensor([r.seq_len for r in self.requests], dtype=torch.int32)
        computed = torch.tensor([r.context_len for r in self.requests], dtype=torch.int32)
        starts = torch.from_numpy(self.starts).int()
        values = dict(
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens.clone(),
            _seq_lens_cpu=seq_lens.clone(),
            seq_lens_cpu_upper_bound=seq_lens.clone(),
            num_computed_tokens_cpu=computed,
            _num_computed_tokens_cpu=computed,
            num_reqs=len(self.requests),
            num_actual_tokens=self.num_tokens,
            max_query_len=max(r.query_len for r in self.requests),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=self.block_table,
            slot_mapping=self.slot_mapping,
            is_prefilling=computed < torch.tensor([r.seq_len + r.rest for r in self.requests]),
        )
        if self.in_a_graph:
            values |= self._padded(values)
        values |= changes
        return attention.CommonAttentionMetadata(**{k: v for k, v in values.items() if k in COMMON_FIELDS})

    def _padded(self, values):
        def pad(x, value=0):
            return torch.cat([x, x.new_full((self.padding, *x.shape[1:]), value)])

        by_request = {k for k, v in values.items() if torch.is_tensor(v) and len(v) == len(self.requests)}
        return {
            **{name: pad(values[name]) for name in by_request},
            "query_start_loc": pad(values["query_start_loc"], self.num_tokens),
            "query_start_loc_cpu": pad(values["query_start_loc_cpu"], self.num_tokens),
            "slot_mapping": pad(values["slot_mapping"], -1),
            "num_reqs": len(self.requests) + self.padding,
            "num_actual_tokens": self.num_tokens + self.padding,
        }

    def pieces(self, out):
        return list(out[: self.num_tokens].split([r.query_len for r in self.requests]))


class Classes:
    """A builder and an impl of this vLLM, made as vLLM makes them."""

    def __init__(self, vllm_config, config, page_size=16, builder_class=None, **changes):
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
            self.builder = (builder_class or backend.get_builder_cls())(
                **{name: value for name, value in arguments.items() if name in known}, device=torch.device("cpu")
            )
        self.impl.flashprefill_config = self.builder.flashprefill_config = config
        self.impl.vllm_flash_attn_version = 2
        one = torch.ones(1)
        self.layer = SimpleNamespace(layer_name=LAYER, _q_scale=one, _k_scale=one, _v_scale=one)

    def build(self, step, common_prefix_len=0, drafted=0, **changes):
        """The step's metadata, where the model runner knows how long the prompts are.

        Args:
            drafted: tokens of each request that were drafted before and not accepted, which the runner does not know.
        """
        batch = SimpleNamespace(
            num_reqs=len(step.requests),
            num_computed_tokens_cpu=np.array([r.context_len for r in step.requests]) + drafted,
            num_tokens_no_spec=np.array([r.seq_len + r.rest for r in step.requests]),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prompt_lengths, "_watched", (prompt_lengths.INPUT_BATCH, batch))
            return self.builder.build(common_prefix_len, step.common(**changes))

    def forward(self, step, metadata, inputs=None, **scales):
        """What vLLM's attention layer does; 0.24.0's writes the cache first."""
        query, key, value, output = inputs or step.inputs()
        if metadata is not None and hasattr(self.impl, "do_kv_cache_update"):
            self.impl.do_kv_cache_update(self.layer, key, value, step.kv_cache, metadata.slot_mapping)
        returned = self.impl.forward(self.layer, query, key, value, step.kv_cache, metadata, output=output, **scales)
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
        step.keys_and_values[:, step.block_table[row, :8].long()] = torch.nan
        step.block_table[row, :8] = step.block_table[0, :8]
    assert_dense(step, Classes(vllm_config, EXACT).run(step))


def test_a_step_with_no_sparse_request_is_vllms_own(vllm_config, calls):
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(1, 400), Request(200), Request(1, 5)], 16, 3)
    metadata = classes.build(step)
    before = dict(vars(metadata))
    calls.clear()
    query, key, value, output = inputs = step.inputs()
    with counted() as count:
        classes.forward(step, metadata, inputs)
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
        classes.forward(step, classes.build(step), output_scale=torch.ones(1))


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
    cache, _keys_and_values = new_cache(4, 16)

    def reshaped(page_size=16, head_size=HEAD_SIZE):
        return torch.zeros(2, 4, page_size, KV_HEADS, head_size, dtype=DTYPE).movedim(0, KV_DIM)

    classes = Classes(vllm_config, EXACT)
    assert reason_of(classes, cache) is None
    assert reason_of(classes, cache.float()) is DenseReason.DTYPE
    assert reason_of(classes, reshaped(page_size=24)) is DenseReason.KV_CACHE_LAYOUT
    strided = torch.zeros(cache.shape[::-1], dtype=DTYPE).permute(4, 3, 2, 1, 0)
    assert reason_of(classes, strided) is DenseReason.KV_CACHE_LAYOUT
    odd = Classes(vllm_config, EXACT, head_size=96)
    assert reason_of(odd, reshaped(head_size=96)) is DenseReason.HEAD_SIZE
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


def assert_not_planned(classes, step, metadata, calls):
    """The batch is dense, vLLM's own, and counted."""
    calls.clear()
    with counted() as count:
        out = classes.forward(step, metadata)
    assert [call["attn_metadata"] for call in calls] == [metadata]
    assert count.stats == stats.Stats(dense_tokens={"not_planned": step.num_tokens})
    return out


def test_a_draft_models_batch_is_vllms_own(vllm_config, calls):
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    metadata = classes.builder.build(0, step.common(), fast_build=True)
    assert_dense(step, assert_not_planned(classes, step, metadata, calls))


def test_a_batch_that_describes_no_requests_is_vllms_own(vllm_config, calls):
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(600)], 16, 0)
    metadata = classes.build(step, query_start_loc_cpu=torch.tensor([5, 0], dtype=torch.int32))
    assert_dense(step, assert_not_planned(classes, step, metadata, calls))


since_0_24 = pytest.mark.skipif(vllm_version() in ("0.10.0", "0.12.0"), reason="vLLM 0.24.0 has it")


def needs(*fields):
    """For tests of what only newer versions say of a batch."""
    missing = [field for field in fields if field not in COMMON_FIELDS]
    return pytest.mark.skipif(bool(missing), reason=f"vLLM {vllm_version()} has no {', '.join(missing)}")


@needs("causal")
def test_a_batch_that_is_not_causal_is_vllms_own(vllm_config, calls):
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(600), Request(400)], 16, 0)
    out = assert_not_planned(classes, step, classes.build(step, causal=False), calls)
    for (q, k, v), got in zip(step.parts, step.pieces(out), strict=True):
        torch.testing.assert_close(got, attend(q, k, v, causal=False), rtol=2e-2, atol=1e-2)
    by_request = classes.build(step, causal=torch.tensor([True, False]))
    assert not hasattr(by_request, "flashprefill")


@needs("mm_req_doc_ranges")
@pytest.mark.parametrize("ranges", [{}, {0: [(100, 300)], 1: []}])
def test_a_batch_of_a_model_with_bidirectional_images_is_vllms_own(vllm_config, calls, ranges):
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    metadata = classes.build(step, mm_req_doc_ranges=ranges)
    # FlashAttention 2, of which this test makes believe, leaves the ranges out.
    assert_dense(step, assert_not_planned(classes, step, metadata, calls))


@needs("dcp_local_seq_lens")
def test_a_context_parallel_batch_is_not_planned(vllm_config, calls):
    classes = Classes(vllm_config, EXACT)
    classes.builder.dcp_world_size = 2
    classes.builder._dcp_context_kv_lens = torch.full((8,), -1, dtype=torch.int32)
    metadata = classes.build(Step([Request(1, 400), Request(500, 100)], 16, 0))
    assert not hasattr(metadata, "flashprefill")
    assert metadata.dcp_context_kv_lens.tolist() == [200, 50], "the whole batch's stay in vLLM's buffer"
    classes.impl.dcp_world_size = 2
    assert reason_of(classes, new_cache(4, 16)[0]) is DenseReason.CONTEXT_PARALLEL


@since_0_24
def test_static_sinks_are_vllms_own(vllm_config, calls):
    """vLLM's builder for them, made around ours, puts tokens before each request that the host does not count."""
    from vllm.model_executor.layers.attention.static_sink_attention import create_static_sink_attention_backend

    backend = create_static_sink_attention_backend(version_module.FlashPrefillCUDABackend, sink_len=128)
    classes = Classes(vllm_config, EXACT, builder_class=backend.get_builder_cls())
    metadata = classes.build(Step([Request(600)], 16, 0))
    assert metadata.seq_lens.tolist() == [728]
    assert not hasattr(metadata, "flashprefill")


@since_0_24
def test_local_attention_is_planned_by_its_own_lengths(vllm_config, calls):
    """vLLM's builder for it, made around ours, makes requests of chunks, and leaves the bound of the others."""
    from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend

    backend = create_chunked_local_attention_backend(version_module.FlashPrefillCUDABackend, 512)
    classes = Classes(vllm_config, EXACT, builder_class=backend.get_builder_cls())
    step = Step([Request(400, 600), Request(1, 700)], 16, 0)
    metadata = classes.build(step)
    (sparse,) = metadata.flashprefill.plan.sparse
    assert (sparse.context_len, sparse.query_len) == (88, 400)
    for (q, k, v), got in zip(step.parts, step.pieces(classes.forward(step, metadata)), strict=True):
        torch.testing.assert_close(got, attend(q, k[512:], v[512:]), rtol=2e-2, atol=1e-2)


@needs("seq_lens_cpu_upper_bound")
@pytest.mark.parametrize("together", [True, False])
def test_lengths_that_are_only_a_bound(vllm_config, calls, monkeypatch, together):
    """Some drafted tokens were not accepted, which only the device knows: nobody waits for it."""

    def wait(self):
        pytest.fail("the lengths were copied from the device")

    monkeypatch.setattr(attention.CommonAttentionMetadata, "seq_lens_cpu", property(wait))
    monkeypatch.setattr(attention.CommonAttentionMetadata, "num_computed_tokens_cpu", property(wait))
    requests = [Request(4, 400), Request(3, 500), Request(500, 200, 100), Request(4, 280)]
    step = Step(requests[: 3 if together else 4], 16, 0)
    exact = np.array([r.seq_len for r in step.requests], dtype=np.int32)
    drafted = np.array([3, 2, 0, 3][: len(exact)], dtype=np.int32)
    classes = Classes(vllm_config, EXACT)
    metadata = classes.build(
        step,
        drafted=drafted,
        _seq_lens_cpu=None,
        _num_computed_tokens_cpu=None,
        seq_lens_cpu_upper_bound=torch.from_numpy(exact + drafted),
    )
    plan = metadata.flashprefill.plan
    assert [(r.index, r.context_len, r.prompt_len) for r in plan.sparse] == [(2, 200, 800)]
    assert plan.dense_tokens == {DenseReason.DECODE: step.num_tokens - 500}
    assert metadata.flashprefill.dense_metadata.max_seq_len == 505
    assert_dense(step, classes.forward(step, metadata))


@needs("seq_lens_cpu_upper_bound")
def test_a_batch_whose_lengths_only_the_device_knows_is_vllms_own(vllm_config, calls, monkeypatch):
    """A draft model's, in vLLM's second model runner."""
    monkeypatch.setattr(
        attention.CommonAttentionMetadata, "seq_lens_cpu", property(lambda self: pytest.fail("copied from the device"))
    )
    classes = Classes(vllm_config, EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    metadata = classes.build(step, _seq_lens_cpu=None, _num_computed_tokens_cpu=None, seq_lens_cpu_upper_bound=None)
    assert_dense(step, assert_not_planned(classes, step, metadata, calls))


@since_0_24
def test_lengths_from_the_second_model_runner(vllm_config, calls, monkeypatch):
    """Its batch has no exact lengths on the host, and requests without tokens in full CUDA graphs."""
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    class Runner(GPUModelRunner):
        def __init__(self):
            pass

        def prepare_inputs(self, **known):
            return InputBatch(**{field.name: known.get(field.name) for field in dataclasses.fields(InputBatch)})

    assert inspect.signature(GPUModelRunner.prepare_inputs).return_annotation is InputBatch
    step = Step([Request(1, 400), Request(500, 200, 300)], 16, 2, in_a_graph=True)
    common = step.common(_seq_lens_cpu=None, _num_computed_tokens_cpu=None)
    classes = Classes(vllm_config, SPARSE)
    prompt_lengths.watch(Runner, prompt_lengths.PREPARED_INPUTS)
    try:
        Runner().prepare_inputs(num_computed_tokens_np=np.array([400, 200]), prefill_len_np=np.array([300, 1000]))
        metadata = classes.builder.build(0, common)
    finally:
        prompt_lengths.unwatch(Runner, prompt_lengths.PREPARED_INPUTS)
    (sparse,) = metadata.flashprefill.plan.sparse
    assert (sparse.index, sparse.context_len, sparse.query_len, sparse.prompt_len) == (1, 200, 500, 1000)
    assert metadata.flashprefill.plan.dense_tokens == {DenseReason.DECODE: 1}


@since_0_24
def test_both_model_runners_are_watched_until_the_backend_is_reverted(vllm_config, calls):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Second
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as First

    def watched():
        return [
            hasattr(method, "_flashprefill_original") for method in (First._may_reorder_batch, Second.prepare_inputs)
        ]

    vllm_flashprefill.register()
    Classes(vllm_config, EXACT)
    assert watched() == [True, True]
    vllm_flashprefill.revert()
    assert watched() == [False, False]


@modest
@given(steps)
def test_requests_without_tokens_pad_a_batch(vllm_config, calls, step):
    """As in the batches of full CUDA graphs."""
    classes = Classes(vllm_config, SPARSE, step.page_size)
    with counted() as plain:
        expected = classes.run(step)
    step.in_a_graph = True
    calls.clear()
    metadata = classes.build(step)
    plan = metadata.flashprefill.plan
    with counted() as padded:
        out = classes.forward(step, metadata)
    assert torch.equal(out[: step.num_tokens], expected[: step.num_tokens])
    assert padded.stats == plain.stats
    assert sorted([*plan.dense, *(request.index for request in plan.sparse)]) == list(range(len(step.requests)))
    assert len(calls) == (1 if len(plan.dense) else 0), "there is no part of padding alone"


@pytest.mark.skipif(
    not getattr(version_module.FlashPrefillCUDAMetadataBuilder, "supports_update_block_table", False),
    reason="every group of layers has its metadata built",
)
class TestGroupsOfLayers:
    """vLLM builds a step's metadata once for groups of layers that differ in their caches alone, and updates it."""

    REQUESTS = (Request(1, 400), Request(200), Request(600, seed=2), Request(300, 200, 100), Request(1, 30))

    def updated(self, classes, *groups):
        first = metadata = classes.build(groups[0])
        for group in groups[1:]:
            metadata = classes.builder.update_block_table(metadata, group.block_table, group.slot_mapping)
            yield group, metadata
        yield groups[0], first

    @pytest.mark.parametrize("requests", [REQUESTS, REQUESTS[:4], REQUESTS[2:4], REQUESTS[:2]])
    @pytest.mark.parametrize("config", [EXACT, SPARSE])
    def test_each_reads_its_own_pages(self, vllm_config, calls, requests, config):
        groups = [Step(list(requests), 16, 3, group=group) for group in range(3)]
        classes = Classes(vllm_config, config)
        with counted() as built:
            expected = [classes.run(group) for group in groups]
        with counted() as count:
            for group, metadata in self.updated(classes, *groups):
                out = classes.forward(group, metadata)
                assert torch.equal(out[: group.num_tokens], expected[group.group][: group.num_tokens])
        assert count.stats == built.stats
        assert count.stats.sparse_tokens == 3 * sum(r.query_len for r in requests if r.query_len >= 300)

    def test_the_dense_part_follows(self, vllm_config, calls):
        groups = [Step(list(self.REQUESTS), 16, 3, group=group) for group in range(2)]
        classes = Classes(vllm_config, EXACT)
        for group, metadata in self.updated(classes, *groups):
            dense_metadata = metadata.flashprefill.dense_metadata
            dense = [0, 1, 4]
            assert metadata.flashprefill.plan.dense.tolist() == dense
            assert metadata.flashprefill.block_table is group.block_table
            assert torch.equal(dense_metadata.block_table, group.block_table[dense])
            slots = group.slot_mapping.split([r.query_len for r in group.requests])
            assert torch.equal(dense_metadata.slot_mapping, torch.cat([slots[row] for row in dense]))

    def test_what_is_not_planned_stays_so(self, vllm_config, calls):
        groups = [Step(list(self.REQUESTS), 16, 3, group=group) for group in range(2)]
        classes = Classes(vllm_config, EXACT)
        metadata = classes.builder.build(0, groups[0].common(), fast_build=True)
        metadata = classes.builder.update_block_table(metadata, groups[1].block_table, groups[1].slot_mapping)
        assert_dense(groups[1], assert_not_planned(classes, groups[1], metadata, calls))


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

    for own, expected in (("ALWAYS", "UNIFORM_BATCH"), ("UNIFORM_BATCH", "UNIFORM_BATCH"), ("NEVER", "NEVER")):
        monkeypatch.setattr(FlashAttentionMetadataBuilder, "_cudagraph_support", attention.AttentionCGSupport[own])
        support = type(classes.builder).get_cudagraph_support(vllm_config, classes.builder.kv_cache_spec)
        assert support is attention.AttentionCGSupport[expected]


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
    from vllm.config import set_current_vllm_config

    monkeypatch.setattr(cuda_builder, "_compiled", set())
    ran = []
    paged = cuda_builder.flash_prefill_paged

    def record(q, k_cache, *args, **kwargs):
        ran.append((*q.shape[1:], *k_cache.shape[1:]))
        return paged(q, k_cache, *args, **kwargs)

    monkeypatch.setattr(cuda_builder, "flash_prefill_paged", record)
    classes = Classes(vllm_config, EXACT, 32)
    impls = [classes.impl, Classes(vllm_config, EXACT).impl, Classes(vllm_config, EXACT, sliding_window=64).impl]
    # Builders are made where vLLM's config is the current one, which its cache's layout is taken from.
    with set_current_vllm_config(vllm_config):
        for page_size in (32, 32, 128):
            cuda_builder.compile_kernels(
                impls, classes.builder.new_cache, page_size=page_size, dtype=DTYPE, device=torch.device("cpu")
            )
    assert ran == [(HEADS, HEAD_SIZE, page_size, KV_HEADS, HEAD_SIZE) for page_size in (32, 128)]
