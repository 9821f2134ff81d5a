"""How long lists are split over programs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flashprefill.kernels import schedule
from vllm_flashprefill.kernels.configs import max_parts
from vllm_flashprefill.kernels.parts import split_list_ref
from vllm_flashprefill.kernels.schedule import MIN_PART_TILES, schedule_requests, tiles_of_a_part
from vllm_flashprefill.plan import SparseRequest

H100 = dict(num_heads=32, num_programs=132)


def visible(query_len, context_len):
    """Blocks that each item could keep, the two of the dense tail first."""
    blocks = np.arange(context_len // 128, -(-(context_len + query_len) // 128)) + 1
    return np.concatenate([blocks[-2:], blocks[:-2]])


@pytest.mark.parametrize("query_len", [256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("context_len", [32 << 10, 64 << 10, 116 << 10])
def test_parts_of_an_append_fill_the_gpu_and_fit(query_len, context_len):
    items = visible(query_len, context_len)
    part = tiles_of_a_part(items, 2, **H100)
    dense_parts = sum(-(-int(count) // part) for count in items[:2]) * 32
    assert part >= MIN_PART_TILES and 132 <= dense_parts <= 6 * 132
    # No program has much more to do than its share.
    assert part <= (items[:2].sum() + items[2:].sum() / 16) * 32 / 132 / 3


@pytest.mark.parametrize("query_len", [32 << 10, 128 << 10])
def test_prompts_that_fill_the_gpu_are_not_split(query_len):
    assert tiles_of_a_part(visible(query_len, 0), 2, **H100) == 0


def test_short_lists_are_not_split():
    assert tiles_of_a_part(visible(1024, 2048), 2, **H100) == 0


def test_a_step_without_a_dense_tail_splits_the_lists_of_heads_that_keep_everything():
    blocks = visible(2048, 120 << 10)
    part = tiles_of_a_part(blocks, 0, **H100)
    assert MIN_PART_TILES <= part < blocks.max() / 4


@pytest.mark.parametrize("num_heads", [1, 32, 128])
@pytest.mark.parametrize("num_programs", [20, 132, 200])
def test_lists_of_the_warm_up_are_split_on_any_gpu(num_heads, num_programs):
    """The kernels that split are others, which a served request must not wait for."""
    assert tiles_of_a_part(visible(128, 8192)[:1], 0, num_heads=num_heads, num_programs=num_programs)


@pytest.mark.parametrize("list_bytes", [1 << 30, 4 * 32 * 1000])
def test_each_slab_has_its_own(list_bytes, monkeypatch):
    monkeypatch.setattr(schedule, "num_multiprocessors", lambda device: 132)
    request = SparseRequest(0, 0, 1024, 60_000, 61_024)
    how = dict(num_heads=32, num_dense_tail_blocks=2, device=torch.device("cpu"), list_bytes=list_bytes)
    slabs = schedule_requests([request], **how).slabs
    assert (len(slabs) == 1) == (list_bytes == 1 << 30)
    assert all(slab.part_tiles >= MIN_PART_TILES for slab in slabs)
    assert {slab.part_tiles for slab in schedule_requests([request], **how, part_tiles=7).slabs} == {7}


@given(st.integers(1, 2000), st.integers(1, 300))
def test_parts_are_a_list_in_order_and_of_about_the_size_asked_for(count, part_tiles):
    parts = split_list_ref(count, part_tiles)
    assert bool(parts) == (count + part_tiles // 2 >= 2 * part_tiles)
    tile = 0
    for first_tile, num_tiles in parts:
        assert first_tile == tile and 0 < num_tiles < 1.5 * part_tiles + 1
        tile += num_tiles
    assert not parts or tile == count


def test_there_is_room_for_six_parts_a_multiprocessor():
    assert max_parts(torch.device("cpu")) == 12
