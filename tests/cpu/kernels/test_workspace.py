from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flashprefill.kernels import columns, configs
from vllm_flashprefill.kernels.configs import max_parts, num_select_programs
from vllm_flashprefill.kernels.schedule import schedule_requests
from vllm_flashprefill.kernels.workspace import Workspace, scratch_bytes
from vllm_flashprefill.plan import SparseRequest

CPU = torch.device("cpu")


def test_a_reserved_buffer_is_cut_and_cut_again():
    workspace = Workspace(CPU)
    workspace.reserve(4096)
    first = workspace.empty((3, 5), torch.float16)
    second = workspace.empty((7,), torch.int32)
    assert (first.shape, first.dtype, second.dtype) == ((3, 5), torch.float16, torch.int32)
    assert second.data_ptr() - first.data_ptr() == 256
    workspace.rewind()
    assert workspace.empty((1,), torch.int64).data_ptr() == first.data_ptr()


def test_what_does_not_fit_is_allocated_apart():
    workspace = Workspace(CPU)
    assert workspace.empty((10,), torch.float32).shape == (10,)
    workspace.reserve(100)
    inside = workspace.empty((20,), torch.float32)
    outside = workspace.empty((20,), torch.float32)
    inside.fill_(1.0)
    outside.fill_(2.0)
    assert inside.eq(1.0).all() and outside.eq(2.0).all()


def test_reserving_only_grows():
    workspace = Workspace(CPU)
    workspace.reserve(1000)
    workspace.reserve(10)
    assert workspace.num_bytes == 1000


@pytest.mark.parametrize("num_heads", [3, 32])
@given(
    st.integers(1, 20_000),
    st.lists(st.integers(1, 2000), max_size=6),
    st.integers(1, 2000),
    st.sampled_from([4096, 1 << 20, 64 << 20]),
    st.sampled_from([0, 8, 32]),
    st.booleans(),
)
def test_the_largest_step_fits_what_is_reserved(
    num_heads, context_len, whole, chunk, list_bytes, num_pieces, fp8_products
):
    """One request of the longest length, whole prompts beside it."""
    requests = [
        SparseRequest(0, 0, chunk, context_len, context_len + chunk),
        *(SparseRequest(0, 0, n, 0, n) for n in whole),
    ]
    schedule = schedule_requests(
        requests, num_heads=num_heads, num_dense_tail_blocks=2, device=CPU, list_bytes=list_bytes
    )
    longest = max(request.seq_len for request in requests)
    with mock.patch("vllm_flashprefill.kernels.workspace.LIST_BYTES", list_bytes):
        reserved = scratch_bytes(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_size=64,
            max_query_tokens=max(chunk + sum(whole), 2048),
            max_seq_len=longest,
            num_pieces=num_pieces,
            fp8_products=fp8_products,
            device=CPU,
        )
    workspace = Workspace(CPU)
    workspace.reserve(reserved)
    wanted = [
        ((num_heads, schedule.num_mean_rows, 64), torch.float16),
        *[((num_heads, schedule.num_mean_rows, num_pieces, 64), torch.float16)] * (num_pieces > 0),
        *[((num_heads, schedule.num_mean_rows, 64, 128), torch.uint8)] * fp8_products,
        ((num_select_programs(CPU, 64, num_pieces > 0), schedule.max_key_blocks), torch.float32),
        ((max(slab.list_slots for slab in schedule.slabs) * num_heads,), torch.int32),
        ((max(slab.num_items for slab in schedule.slabs) * num_heads,), torch.int32),
        ((max_parts(CPU) * columns.PART_COLUMNS + max(slab.num_items for slab in schedule.slabs) * num_heads,),
         torch.int32),
        ((max_parts(CPU) * 128 * 65,), torch.float32),
    ]  # fmt: skip
    start = workspace.empty((1,), torch.uint8).data_ptr()
    workspace.rewind()
    for shape, dtype in wanted:
        tensor = workspace.empty(shape, dtype)
        assert start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= start + reserved


def test_a_million_tokens_stay_within_the_budget(monkeypatch):
    """256 MiB beside the parts of split lists, six for each of 132 multiprocessors."""
    monkeypatch.setattr(configs, "num_multiprocessors", lambda device: 132)
    monkeypatch.setattr(configs, "gpu_kind", lambda device: "hopper")
    for head_size, num_heads, num_kv_heads in ((64, 64, 8), (128, 32, 8), (128, 64, 4), (256, 16, 4)):
        reserved = scratch_bytes(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            max_query_tokens=8192,
            max_seq_len=1 << 20,
            # Engines for sequences this long have pieces of 16 keys.
            num_pieces=8,
            fp8_products=False,
            device=CPU,
        )
        assert reserved <= (256 << 20) + 6 * 132 * 128 * (head_size + 1) * 4
