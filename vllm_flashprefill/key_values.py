"""Keys and values as every stage takes them: plain or paged, in the queries' dtype or e4m3."""

from __future__ import annotations

import dataclasses

import torch

from vllm_flashprefill.plan import SparseRequest

# vLLM keeps e4m3 as uint8.
FP8_DTYPES = (torch.float8_e4m3fn, torch.uint8)
E4M3_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class KeyValues:
    """The keys and values of a batch, G heads of D.

    Attributes:
        k, v: [batch, tokens, G, D], or with a block table the caches [num_pages, page_size, G, D]; any strides but the
            last. e4m3 if their dtype is one of FP8_DTYPES.
        block_table: [requests, max pages] int32, the pages of each request in order.
        k_scale, v_scale: positive float32 of one element or [G], what e4m3 keys and values are multiplied by; 1 if
            None.
    """

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def num_heads(self) -> int:
        return self.k.shape[2]

    @property
    def page_size(self) -> int:
        """Tokens of a page; 0 where there are no pages."""
        return 0 if self.block_table is None else self.k.shape[1]

    @property
    def table_stride(self) -> int:
        return 0 if self.block_table is None else self.block_table.stride(0)

    @property
    def fp8(self) -> bool:
        return is_e4m3(self.k)

    def codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v, those in e4m3 as uint8."""
        return codes(self.k), codes(self.v)

    def of_request(self, request: SparseRequest) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, G, D] each, the keys and values of one request's S tokens so far; e4m3 as float32."""
        k, v = self.codes()
        return self._tokens(k, self.k_scale, request), self._tokens(v, self.v_scale, request)

    def _tokens(self, x: torch.Tensor, scale: torch.Tensor | None, request: SparseRequest) -> torch.Tensor:
        if self.block_table is None:
            x = x[request.batch, request.kv_start : request.kv_start + request.seq_len]
        else:
            num_pages = -(-request.seq_len // self.page_size)
            x = x[self.block_table[request.index, :num_pages].long()].flatten(0, 1)[: request.seq_len]
        return dequantise(x, scale) if self.fp8 else x


def is_e4m3(x: torch.Tensor) -> bool:
    return x.dtype in FP8_DTYPES


def codes(x: torch.Tensor) -> torch.Tensor:
    """x, as uint8 if it is e4m3."""
    return x.view(torch.uint8) if is_e4m3(x) else x


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The codes (uint8) of x, rounded and, beyond e4m3's range, at its ends; of codes themselves."""
    return codes(x if is_e4m3(x) else x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn))


def dequantise(codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What some e4m3 codes stand for.

    Args:
        codes: [..., G, D] uint8.
        scale: float32 of one element or [G]; 1 if None.

    Returns:
        [..., G, D] in float32.
    """
    values = codes.view(torch.float8_e4m3fn).float()
    return values if scale is None else values * scale.reshape(-1, 1)


def dequantise_queries(q: torch.Tensor, scale: torch.Tensor | None, num_kv_heads: int) -> torch.Tensor:
    """What queries in e4m3 stand for, whose scale may be one for the heads of each KV head.

    Args:
        q: [..., H, D] e4m3.
        scale: as of `dequantise`, G being `num_kv_heads`.

    Returns:
        [..., H, D] in float32.
    """
    if scale is not None and scale.numel() > 1:
        scale = scale.repeat_interleave(q.shape[-2] // num_kv_heads)
    return dequantise(codes(q), scale)
