from types import SimpleNamespace

import pytest

from vllm_flashprefill.backend.layer_routing import engine_dense_reason

DECODER = SimpleNamespace(use_mla=False, attn_type="decoder")


@pytest.mark.parametrize("backend", [None, "FLASH_ATTN", "FLASH_ATTN_VLLM_V1", "CUSTOM", "CPU_ATTN"])
def test_a_decoder_on_our_backends_can_be_sparse(backend):
    assert engine_dense_reason(DECODER, backend, (9, 0)) is None
    assert engine_dense_reason(SimpleNamespace(), backend, None) is None, "older versions say less of a model"


@pytest.mark.parametrize(
    "model, backend, capability, says",
    [
        (SimpleNamespace(use_mla=True), None, (9, 0), "MLA"),
        (SimpleNamespace(use_mla=False, attn_type="encoder_only"), None, None, "no causal attention"),
        (DECODER, "FLASHINFER", (9, 0), "FLASHINFER was asked for; ask for FLASH_ATTN"),
        (DECODER, None, (10, 0), "prefers FlashInfer on this GPU; ask for FLASH_ATTN"),
    ],
)
def test_what_keeps_a_whole_engine_dense_is_said(model, backend, capability, says):
    assert says in engine_dense_reason(model, backend, capability)


def test_flash_attention_asked_for_on_such_a_gpu_can_be_sparse():
    assert engine_dense_reason(DECODER, "FLASH_ATTN", (10, 0)) is None
