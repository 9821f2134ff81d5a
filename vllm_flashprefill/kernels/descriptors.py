"""Tensors as the matrices that tensor descriptors describe."""

from __future__ import annotations

import dataclasses

import torch

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None


@dataclasses.dataclass(frozen=True)
class Matrix:
    """[a, b, heads, D] as a matrix that a tensor descriptor can describe.

    Element [i, j, h, d] lies in row i * rows_per_batch + h * rows_per_head + j, column h * columns_per_head + d.
    """

    shape: list[int]
    strides: list[int]
    rows_per_batch: int
    rows_per_head: int
    columns_per_head: int


def as_matrix(x: torch.Tensor) -> Matrix | None:
    """x as a matrix, heads beside each other in a row or one below the other; None where its strides allow neither."""
    a, b, num_heads, head_size = x.shape
    batch_stride, row_stride, head_stride, _ = x.stride()
    if TensorDescriptor is None or x.data_ptr() % 16 or row_stride * x.element_size() % 16 or row_stride < head_size:
        return None
    batch_stride = batch_stride if a > 1 else b * row_stride
    if batch_stride % row_stride:
        return None
    rows_per_batch = batch_stride // row_stride
    if num_heads == 1 or head_stride == head_size:
        rows_per_head, columns_per_head = 0, head_size
    elif head_stride % row_stride == 0:
        rows_per_head, columns_per_head = head_stride // row_stride, 0
    else:
        return None
    rows = (a - 1) * rows_per_batch + (num_heads - 1) * rows_per_head + b
    columns = (num_heads - 1) * columns_per_head + head_size
    if rows >= 2**31 or columns > row_stride:
        return None
    return Matrix([rows, columns], [row_stride, 1], rows_per_batch, rows_per_head, columns_per_head)
