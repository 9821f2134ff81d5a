"""Queries, keys and values in e4m3, read as codes (uint8) and taken in as float16, which holds each of them exactly."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def from_e4m3(codes, NATIVE: tl.constexpr):
    """codes: uint8. Their values in float16; a NaN stays one. NATIVE: by the instruction that sm_89 and newer have."""
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # Extended sign, exponent and mantissa at their places in a float16, less the sign's copy, are the value over
        # 256; over 256 a NaN is 1.875, and the one code that this factor takes to infinity.
        bits = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 7).to(tl.uint16, bitcast=True) & 0xBFFF
        x = bits.to(tl.float16, bitcast=True)
        return x * 256.0 + (x * 36864.0) * 0.0


@triton.jit
def load_scale(scale_ptr, kv_head, stride_scale):
    """The scale of a KV head; 1 if there is none."""
    if scale_ptr is None:
        return 1.0
    else:
        return tl.load(scale_ptr + kv_head * stride_scale)


@functools.cache
def has_e4m3_instruction(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def scale_stride(scale: torch.Tensor | None) -> int:
    return 0 if scale is None or scale.numel() == 1 else scale.stride(0)
