"""Tile sizes by kind of GPU and head size, by benchmarks/tune_kernels.py; nothing is tuned at run time."""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Launch of stage 4.

    Attributes:
        block_n: keys per tile.
        tma: load tiles by tensor descriptor.
        by_head: one KV head's query blocks after another's, so that they share keys in the L2 cache.
        gluon: the Hopper kernels (sparse_attention_hopper*.py); they need tma, and have by_head.
    """

    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    by_head: bool = False
    gluon: bool = False


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """Launch of stages 2 and 3.

    Attributes:
        block_n: mean keys per tile.
        max_registers: of a thread, so that programs_per_sm programs fit; None for no limit.
        num_stages: tiles on their way at once.
        block_pieces: mean keys of pieces per tile; at least 32, the most pieces a block has.
        piece_stages: tiles of them on their way at once.
        one_loop: without pieces, mask every tile. Two loops keep the queries in shared memory twice.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    max_registers: int | None = None
    block_pieces: int = 64
    piece_stages: int = 1
    one_loop: bool = False


# (kind, head size), the kind as of `gpu_kind`. Only Hopper's rows are measured so far (docs/performance.md); the others
# are chosen to fit the shared memory and to spill little.
ATTENTION = {
    ("ampere", 64): AttentionConfig(64, 4, 3, by_head=True),
    ("ampere", 128): AttentionConfig(64, 8, 2, by_head=True),
    ("ampere", 256): AttentionConfig(32, 8, 2, by_head=True),
    ("hopper", 64): AttentionConfig(128, 8, 3, by_head=True),
    ("hopper", 128): AttentionConfig(128, 8, 2, by_head=True),
    ("hopper", 256): AttentionConfig(64, 8, 2, by_head=True),
    ("blackwell", 64): AttentionConfig(128, 8, 3, by_head=True),
    ("blackwell", 128): AttentionConfig(128, 8, 2, by_head=True),
    ("blackwell", 256): AttentionConfig(64, 8, 2, by_head=True),
    ("small", 64): AttentionConfig(64, 4, 3, by_head=True),
    ("small", 128): AttentionConfig(64, 8, 2, by_head=True),
    ("small", 256): AttentionConfig(16, 8, 2, by_head=True),
}
# Where Triton has Gluon for Hopper, and strides and page size allow descriptors of whole blocks.
ATTENTION_GLUON = {
    ("hopper", 64): AttentionConfig(128, 4, 2, tma=True, by_head=True, gluon=True),
    ("hopper", 128): AttentionConfig(128, 4, 2, tma=True, by_head=True, gluon=True),
}
# Where strides and page size allow tensor descriptors.
ATTENTION_TMA = {
    ("hopper", 64): AttentionConfig(128, 8, 3, tma=True, by_head=True),
    ("hopper", 128): AttentionConfig(64, 4, 3, tma=True, by_head=True),
    ("hopper", 256): AttentionConfig(64, 8, 2, tma=True, by_head=True),
    ("blackwell", 64): AttentionConfig(128, 8, 3, tma=True, by_head=True),
    ("blackwell", 128): AttentionConfig(128, 8, 2, tma=True, by_head=True),
    ("blackwell", 256): AttentionConfig(64, 8, 2, tma=True, by_head=True),
}
SELECT = {
    ("ampere", 64): SelectConfig(64, 4, 3, 2),
    ("ampere", 128): SelectConfig(64, 4, 2, 2),
    ("ampere", 256): SelectConfig(32, 8, 2, 1),
    ("hopper", 64): SelectConfig(64, 4, 1, 4, max_registers=128),
    ("hopper", 128): SelectConfig(64, 4, 1, 4, max_registers=128),
    ("hopper", 256): SelectConfig(64, 4, 1, 2),
    ("blackwell", 64): SelectConfig(128, 4, 3, 2),
    ("blackwell", 128): SelectConfig(64, 4, 3, 2),
    ("blackwell", 256): SelectConfig(64, 8, 2, 1),
    ("small", 64): SelectConfig(64, 4, 3, 2),
    ("small", 128): SelectConfig(64, 4, 2, 1),
    ("small", 256): SelectConfig(32, 8, 1, 1, one_loop=True),
}

# With pieces, where other than without; that of heads of 64 is chosen to spill little.
SELECT_PIECES = {
    ("hopper", 64): SelectConfig(64, 4, 2, 3, max_registers=168, piece_stages=3),
    ("hopper", 128): SelectConfig(64, 4, 2, 3, max_registers=168, piece_stages=3),
}


# Compute capabilities with 99 KiB of shared memory for a block: A10, GeForce RTX 30; L4, L40S, RTX 40; RTX 50, GB10.
SMALL = frozenset({(8, 6), (8, 9), (12, 0), (12, 1)})


@functools.cache
def gpu_kind(device: torch.device) -> str:
    """Which rows of the tables a device takes.

    Returns:
        "small" for GPUs with 99 KiB of shared memory, otherwise the generation: "ampere", "hopper" or "blackwell", as
        which newer ones count. A CPU, where Triton interprets, is "ampere": it has no descriptors.
    """
    if device.type != "cuda":
        return "ampere"
    capability = torch.cuda.get_device_capability(device)
    if capability in SMALL:
        return "small"
    return "ampere" if capability[0] < 9 else "hopper" if capability[0] == 9 else "blackwell"


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def max_parts(device: torch.device) -> int:
    """Parts that the lists of a slab may be split into; a list that would take more stays whole.

    With `schedule.tiles_of_a_part` the lists of a dense tail take some five for each multiprocessor at most; where the
    others keep nearly everything too, some of all stay whole, which ones depends on who comes first.
    """
    return 6 * num_multiprocessors(device)


def attention_configs(device: torch.device, head_size: int) -> tuple[AttentionConfig, ...]:
    """What to launch stage 4 with, best first; the last one takes any strides and page size."""
    key = gpu_kind(device), head_size
    return tuple(table[key] for table in (ATTENTION_GLUON, ATTENTION_TMA, ATTENTION) if key in table)


def select_config(device: torch.device, head_size: int, with_pieces: bool) -> SelectConfig:
    key = gpu_kind(device), head_size
    return SELECT_PIECES.get(key, SELECT[key]) if with_pieces else SELECT[key]


def num_select_programs(device: torch.device, head_size: int, with_pieces: bool) -> int:
    """Programs of stages 2 and 3 that the GPU holds at once."""
    return select_config(device, head_size, with_pieces).programs_per_sm * num_multiprocessors(device)
