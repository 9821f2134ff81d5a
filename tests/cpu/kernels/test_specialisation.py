"""What a kernel is not compiled anew for."""

import pytest

pytest.importorskip("triton")

from vllm_flashprefill.kernels import block_select, sparse_attention


def test_the_counter_lies_at_any_place_of_an_upload():
    """Its address is a multiple of 16 bytes for some batches only, by which Triton compiles two kernels."""
    kernels = [block_select._block_select_kernel]
    if sparse_attention.hopper is not None:
        kernels.append(sparse_attention.hopper._sparse_attention_hopper_kernel)
    for kernel in kernels:
        (counter,) = [param for param in kernel.params if param.name == "next_ptr"]
        assert counter.do_not_specialize
