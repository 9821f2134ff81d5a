"""What a kernel is not compiled anew for."""

import pytest

pytest.importorskip("triton")

from vllm_flashprefill.kernels import block_mean, block_select, parts, sparse_attention


def hopper_kernels():
    if sparse_attention.hopper is None:
        return []
    return [
        sparse_attention.hopper._sparse_attention_hopper_kernel,
        sparse_attention.hopper_e4m3._sparse_attention_hopper_e4m3_kernel,
        sparse_attention.hopper_fp8._sparse_attention_hopper_fp8_kernel,
    ]


def test_scales_lie_anywhere():
    """A checkpoint's may be parts of a tensor."""
    kernels = (
        block_mean._block_mean_kernel, block_select._block_select_kernel, sparse_attention._sparse_attention_kernel,
        *hopper_kernels(),
    )  # fmt: skip
    scales = [param for kernel in kernels for param in kernel.params if param.name.endswith("_scale_ptr")]
    assert len(scales) == (11 if len(kernels) > 3 else 5) and all(param.do_not_specialize for param in scales)


def test_the_counters_lie_at_any_place_of_an_upload():
    """Its address is a multiple of 16 bytes for some batches only, by which Triton compiles two kernels."""
    kernels = (
        block_select._block_select_kernel, sparse_attention._sparse_attention_kernel, parts._join_parts_kernel,
        *hopper_kernels(),
    )  # fmt: skip
    for kernel in kernels:
        # What is no part's number is at its place where there are none.
        counters = [param for param in kernel.params if param.name in ("counters_ptr", "parts_ptr")]
        assert len(counters) == 2 and all(param.do_not_specialize for param in counters)
