"""Launching a kernel again for tensors alike, as each layer of a step does, without Triton's search for it.

Triton looks at each argument of each launch before it knows which compiled kernel to run, some 100 us on a host for the
kernels of a layer. What that depends on is compared here at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

# Of a few steps; each step has numbers of its own.
_MOST_KNOWN = 512

_NUMBERS = frozenset({int, float, bool, type(None)})

# The compiled kernel and the constants that follow its arguments, by what Triton chooses it by.
_known: dict[tuple, tuple[Any, tuple]] = {}


def launch_kernel(kernel: triton.JITFunction, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, where the constants are all that follows args, and Triton's own options.

    Args:
        args: tensors, all on one device and the first argument one of them; numbers, None, and descriptors from
            `descriptors.descriptor`.
    """
    kinds = [x if type(x) in _NUMBERS else _kind(x) for x in args]
    key = (id(kernel), args[0].device, grid, *constants.values(), *kinds)
    known = _known.get(key)
    if known is not None:
        compiled, rest = known
        compiled[(*grid, 1, 1)[:3]](*args, *rest)
        return
    # None under Triton's interpreter.
    compiled = kernel[grid](*args, **constants)
    if compiled is not None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


def _kind(x: Any) -> Any:
    """What of a tensor or descriptor a kernel is compiled for."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16
    return x.kind
