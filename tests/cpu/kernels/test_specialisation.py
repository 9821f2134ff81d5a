"""What a kernel is not compiled anew for."""

import pytest

pytest.importorskip("triton")

from vllm_flashprefill.kernels import block_mean, block_select, sparse_attention


def test_scales_lie_anywhere():
    """A checkpoint's may be parts of a tensor."""
    kernels = (
        block_mean._block_mean_kernel, block_select._block_select_kernel, sparse_attention._sparse_attention_kernel,
    )  # fmt: skip
    scales = [param for kernel in kernels for param in kernel.params if param.name.endswith("_scale_ptr")]
    assert len(scales) == 5 and all(param.do_not_specialize for param in scales)


def test_the_counter_lies_at_any_place_of_an_upload():
    """Its address is a multiple of 16 bytes for some batches only, by which Triton compiles two kernels."""
    kernels = [block_select._block_select_kernel]
    if sparse_attention.hopper is not None:
        kernels.append(sparse_attention.hopper._sparse_attention_hopper_kernel)
    for kernel in kernels:
        (counter,) = [param for param in kernel.params if param.name == "next_ptr"]
        assert counter.do_not_specialize
