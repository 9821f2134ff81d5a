"""What is done before serving."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.e4m3 import take_e4m3_caches
from tests.support.flash_attn_step import DTYPE, EXACT, HEAD_SIZE, HEADS, KV_HEADS, SPARSE, Classes, Step
from tests.support.request import Request
from tests.support.vllm_side import LAYER, MAX_TOKENS, counted
from vllm_flashprefill.backend import warmup
from vllm_flashprefill.backend.layer_routing import has_quantised_query


def test_scratch_is_reserved_with_the_layer(calls, monkeypatch):
    from vllm_flashprefill.kernels.workspace import scratch_bytes, shared_workspace

    monkeypatch.setenv("FLASHPREFILL_PIECE_SIZE", "8")
    shared_workspace.cache_clear()
    classes = Classes(EXACT)
    needed = scratch_bytes(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        max_query_tokens=MAX_TOKENS,
        max_seq_len=MAX_TOKENS,
        num_pieces=16,
        fp8_products=False,
        device=torch.device("cpu"),
    )
    assert classes.impl._workspace.num_bytes >= needed > 0
    assert Classes(EXACT).impl._workspace is classes.impl._workspace


def test_kernels_are_compiled_once_for_each_kind_of_layer(calls, monkeypatch):
    from vllm.config import set_current_vllm_config

    monkeypatch.setattr(warmup, "_compiled", set())
    ran = []
    paged = warmup.flash_prefill_paged

    def record(q, kv, *args, **kwargs):
        scales = kwargs["q_scale"], kv.k_scale, kv.v_scale
        ran.append((*q.shape[1:], *kv.k.shape[1:], q.dtype, kv.k.dtype, *(scale is not None for scale in scales)))
        return paged(q, kv, *args, **kwargs)

    monkeypatch.setattr(warmup, "flash_prefill_paged", record)
    take_e4m3_caches(monkeypatch)
    classes = Classes(EXACT, 32)
    impls = [classes.impl, Classes(EXACT).impl, Classes(EXACT, sliding_window=64).impl]
    quantised = Classes(EXACT, 32, kv_cache_dtype="fp8").impl
    # Builders are made where vLLM's config is the current one, which its cache's layout is taken from.
    with set_current_vllm_config(classes.vllm_config):
        for page_size in (32, 32, 128):
            warmup.compile_kernels(
                impls, classes.builder.new_cache, page_size=page_size, dtype=DTYPE, device=torch.device("cpu")
            )
        warmup.compile_kernels(
            [quantised], classes.builder.new_cache, page_size=32, dtype=DTYPE, device=torch.device("cpu")
        )
    plain = DTYPE, DTYPE, False, False, False
    e4m3 = (torch.float8_e4m3fn, torch.uint8, True) if has_quantised_query(quantised) else (DTYPE, torch.uint8, False)
    kinds = [(32, plain), (128, plain), (32, (*e4m3, True, True))]
    # A prompt, and a chunk whose lists are split, each.
    assert ran == [
        (HEADS, HEAD_SIZE, page_size, KV_HEADS, HEAD_SIZE, *kind) for page_size, kind in kinds for _ in range(2)
    ]
    assert not quantised.kernels_failed


def test_a_layer_without_an_index_ends_the_start_of_an_engine(monkeypatch):
    from vllm.config import set_current_vllm_config

    classes = Classes(EXACT)
    monkeypatch.setenv("FLASHPREFILL_NUM_DENSE_LAYERS", "1")
    layers = classes.vllm_config.compilation_config.static_forward_context
    monkeypatch.setitem(layers, "model.attn", SimpleNamespace(impl=classes.impl))
    with (
        set_current_vllm_config(classes.vllm_config),
        pytest.raises(ValueError, match=r"'model\.attn' has no layer index"),
    ):
        Classes(EXACT)


def test_a_builder_warms_up_for_its_own_layers(monkeypatch):
    """The caches of others may have another page size. vLLM 0.10.0 does not say which they are."""
    classes, other = Classes(SPARSE), Classes(SPARSE)
    layers = {LAYER: classes.layer, "model.layers.2.self_attn.attn": other.layer, "model.layers.3.mixer": object()}
    monkeypatch.setattr(classes.vllm_config.compilation_config, "static_forward_context", layers)
    known = hasattr(classes.builder, "layer_names")
    expected = [classes.impl] if known else [classes.impl, other.impl]
    assert [layer.impl for layer in classes.builder.own_layers()] == expected


@pytest.mark.parametrize("page_sizes", [(16, 32), (32, 16)])
def test_another_builders_page_size_says_nothing_of_a_layer_that_failed(calls, monkeypatch, page_sizes):
    from vllm.config import set_current_vllm_config

    def fail_for_16(q, kv, *args, **kwargs):
        if kv.k.shape[1] == 16:
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(warmup, "_compiled", set())
    monkeypatch.setattr(warmup, "_failed", set())
    monkeypatch.setattr(warmup, "flash_prefill_paged", fail_for_16)
    classes = Classes(SPARSE)
    with set_current_vllm_config(classes.vllm_config):
        for page_size in page_sizes:
            warmup.compile_kernels(
                [classes.impl], classes.builder.new_cache, page_size=page_size, dtype=DTYPE, device=torch.device("cpu")
            )
    assert classes.impl.kernels_failed


@pytest.mark.parametrize("what", ["new_cache", "flash_prefill_paged"])
def test_layers_whose_kernels_do_not_run_are_dense(calls, monkeypatch, what):
    """As with heads of 256 on a GPU that has 99 KiB of shared memory for a block."""
    from vllm.config import set_current_vllm_config

    def fail(*args, **kwargs):
        raise RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376")

    warnings = []
    monkeypatch.setattr(warmup.logger, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(warmup, "_compiled", set())
    monkeypatch.setattr(warmup, "_failed", set())
    classes = [Classes(SPARSE) for _ in range(3)]
    new_cache = fail if what == "new_cache" else classes[0].builder.new_cache
    with set_current_vllm_config(classes[0].vllm_config), monkeypatch.context() as patch:
        if what == "flash_prefill_paged":
            patch.setattr(warmup, what, fail)
        # Of two groups of layers, each with a builder of its own.
        for impls in ([classes[0].impl, classes[1].impl], [classes[2].impl]):
            warmup.compile_kernels(impls, new_cache, page_size=16, dtype=DTYPE, device=torch.device("cpu"))
        warmup.compile_kernels(
            [Classes(SPARSE, 32).impl],
            classes[0].builder.new_cache,
            page_size=32,
            dtype=DTYPE,
            device=torch.device("cpu"),
        )
    kinds = 1 if what == "new_cache" else 2
    assert len(warnings) == kinds and all("stay dense" in text and "shared memory" in text for text in warnings)
    calls.clear()
    for each in classes:
        step = Step([Request(600)], 16, 1)
        with counted() as done:
            each.run(step)
        assert done.stats.dense_tokens == {"kernel_failed": 600}
    assert len(calls) == 3
