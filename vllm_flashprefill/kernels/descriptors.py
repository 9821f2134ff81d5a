"""Tensors as the matrices that tensor descriptors describe."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

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

    shape: tuple[int, int]
    strides: tuple[int, int]
    rows_per_batch: int
    rows_per_head: int
    columns_per_head: int


# Descriptors of no tensor, by what they say of one, and how many there have been.
_templates: dict[tuple, Any] = {}
_numbers = itertools.count()


def descriptor(x: torch.Tensor, matrix: Matrix, box: tuple[int, int], layout: Any = None) -> Any:
    """x, described for copies of a box of it: Triton's descriptor, or with a layout Gluon's.

    Its attribute `kind` is the same for all that differ in the tensor alone. Triton's checks, which cost more than all
    else, are made for the first of them.
    """
    key = (x.dtype, matrix, box, layout)
    template = _templates.get(key)
    if template is None:
        if layout is None:
            template = TensorDescriptor(x, list(matrix.shape), list(matrix.strides), list(box))
        else:
            from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

            template = GluonDescriptor(x, list(matrix.shape), list(matrix.strides), list(box), layout)
        if len(_templates) >= 256:
            _templates.clear()
        template.base, template.kind = None, f"descriptor {next(_numbers)}"
        _templates[key] = template
    described = object.__new__(type(template))
    described.__dict__.update(template.__dict__, base=x)
    return described


def as_matrix(x: torch.Tensor) -> Matrix | None:
    """x as a matrix, its heads beside each other or one below the other; None where `no_matrix` says why."""
    found = _found(x)
    return found if isinstance(found, Matrix) else None


def no_matrix(x: torch.Tensor) -> str | None:
    """Why x cannot be a matrix that a tensor descriptor describes, in words; None where it can."""
    if TensorDescriptor is None:
        return "this Triton has no tensor descriptors (3.4 has)"
    found = _found(x)
    return None if isinstance(found, Matrix) else f"the strides {x.stride()} of {x.dtype} have {found}"


def _found(x: torch.Tensor) -> Matrix | str:
    return _matrix_or_misfit(x.shape, x.stride(), x.element_size(), x.data_ptr() % 16)


# Layers of a step, and steps, have tensors alike.
@functools.lru_cache(maxsize=256)
def _matrix_or_misfit(
    shape: tuple[int, ...], strides: tuple[int, ...], element_size: int, misalignment: int
) -> Matrix | str:
    """A tensor's matrix, or what of its strides it has against being one."""
    a, b, num_heads, head_size = shape
    batch_stride, row_stride, head_stride, _ = strides
    if misalignment or row_stride * element_size % 16:
        return "tokens that do not begin at multiples of 16 bytes"
    if row_stride < head_size:
        return "tokens that overlap"
    if a > 1 and batch_stride % row_stride:
        return "pages of no whole number of tokens"
    if num_heads > 1 and (0 < head_stride < head_size or (head_stride > row_stride and head_stride % row_stride)):
        return "heads neither within a token's row nor whole rows apart"
    rows_per_batch = batch_stride // row_stride if a > 1 else b
    rows_per_head, columns_per_head = 0, head_size
    if num_heads > 1:
        beside = head_stride < row_stride
        rows_per_head, columns_per_head = (0, head_stride) if beside else (head_stride // row_stride, 0)
    rows = (a - 1) * rows_per_batch + (num_heads - 1) * rows_per_head + b
    columns = (num_heads - 1) * columns_per_head + head_size
    if columns > row_stride:
        return "heads of one token among those of the next"
    if rows >= 2**31:
        return "2**31 rows or more"
    return Matrix((rows, columns), (row_stride, 1), rows_per_batch, rows_per_head, columns_per_head)
