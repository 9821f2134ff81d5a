#!/usr/bin/env bash
# Triton 3.9.0: while anything watches compilation (`knobs.runtime.jit_cache_hook` and its like), a Gluon kernel that has a
# layout among its arguments does not launch: TypeError.
#
# Constants are written as JSON for the hook, and layouts cannot be; without a hook nothing is written. So a kernel that has
# always run fails in a process in which somebody else, as vLLM from 0.24.0 on does once it serves, reports late compilations,
# and only if it was not compiled before. A layout that the kernel makes itself (`layout: gl.constexpr = ...`), or that comes
# with a tensor descriptor, is no argument. So in 3.6.0 to 3.8.0. No GPU is needed to see it.
#
# Seen with triton 3.9.0, Python 3.11:
#     no hook: compiled
#     hook, layout an argument: TypeError: Object of type BlockedLayout is not JSON serializable
#     hook, layout in the kernel: compiled
# Exits with 1 if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check triton==3.9.0

cat >hook.py <<'PY'
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime import driver


class Driver:
    """What compiling asks of a GPU."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@gluon.jit
def argument(n, LAYOUT: gl.constexpr):
    gl.full([128], n, gl.int32, LAYOUT)


@gluon.jit
def own(n):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    gl.full([128], n, gl.int32, layout)


def outcome(kernel, *arguments):
    try:
        kernel.warmup(*arguments, grid=(1,))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "compiled"


driver.set_active(Driver())
layout = gl.BlockedLayout([1], [32], [4], [0])
print("no hook:", outcome(argument, 1, layout))
knobs.runtime.jit_cache_hook = lambda **kwargs: None
# Another type of n, so that it is compiled anew.
print("hook, layout an argument:", outcome(argument, 2**40, layout))
print("hook, layout in the kernel:", outcome(own, 1))
PY

export TRITON_CACHE_DIR=$folder/cache
env/bin/python hook.py | tee seen.txt
diff seen.txt - <<'TXT'
no hook: compiled
hook, layout an argument: TypeError: Object of type BlockedLayout is not JSON serializable
hook, layout in the kernel: compiled
TXT
