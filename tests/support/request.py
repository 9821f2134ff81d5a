"""Requests of a step, and what they ask and hold."""

from dataclasses import KW_ONLY, dataclass

import torch


@dataclass
class Request:
    """One request of a step, in tokens.

    Attributes:
        query_len, context_len: of this step, and in the cache before it.
        rest: of the prompt after it; negative where drafted tokens are not known to the model runner yet.
        seed: of its values.
        kind: what a failure calls it.
        shares: (an earlier row, its first pages that are this one's too).
        refused: drafted tokens that the host still counts where it may, and the device no longer.
    """

    query_len: int
    context_len: int = 0
    rest: int = 0
    _: KW_ONLY
    seed: int = 0
    kind: str = ""
    shares: tuple[int, int] = (0, 0)
    refused: int = 0

    @property
    def seq_len(self):
        return self.context_len + self.query_len

    @property
    def prompt_len(self):
        return self.seq_len + self.rest


def structured(query_len, seq_len, *, heads, kv_heads, dim, dtype, device, seed):
    """Keys with a theme per block and queries drawn to a few of them, so that blocks differ in score."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-seq_len // 128)
    theme = torch.randn(num_blocks, kv_heads, dim, generator=generator)
    k = torch.randn(seq_len, kv_heads, dim, generator=generator)
    k += 1.5 * theme.repeat_interleave(128, dim=0)[:seq_len]
    v = torch.randn(seq_len, kv_heads, dim, generator=generator)
    q = torch.randn(query_len, heads, dim, generator=generator)
    target = torch.randint(num_blocks, (-(-query_len // 128) + 1, heads), generator=generator)
    group = heads // kv_heads
    drawn = theme[target, torch.arange(heads) // group]
    q += 0.7 * drawn.repeat_interleave(128, dim=0)[:query_len]
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def paged(sequences, page_size, *, seed, heads_first=False):
    """Lay [S, G, D] sequences out on shuffled pages; every slot that holds no token is NaN, in e4m3 codes too."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-len(sequence) // page_size) for sequence in sequences]
    order = torch.randperm(sum(counts) + 3, generator=generator)
    like = sequences[0]
    # As vLLM's cache [2, pages, ...] seen through one index: pages are strided views.
    nan = 0x7F if like.dtype == torch.uint8 else torch.nan
    num_heads, dim = like.shape[1:]
    if heads_first:
        cache = like.new_full((len(order), 2, num_heads, page_size, dim), nan)[:, 0].transpose(1, 2)
    else:
        cache = like.new_full((len(order), 2, page_size, num_heads, dim), nan)[:, 0]
    # Part of a wider table, as vLLM's; what is no page of a sequence is not to be followed.
    table = torch.full((len(sequences), max(counts) + 5), 1 << 30, dtype=torch.int32)
    used = 0
    for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        table[row, :count] = order[used : used + count]
        for slot in range(count):
            piece = sequence[slot * page_size : (slot + 1) * page_size]
            cache[order[used + slot], : len(piece)] = piece
        used += count
    return cache, table.to(like.device)[:, : max(counts)]
