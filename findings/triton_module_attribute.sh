#!/usr/bin/env bash
# Triton 3.6.0: a kernel may read a number as an attribute of a module (`layout.COLUMN`), but the number is in no cache key.
#
# A plain global in a kernel is an error unless it is a tl.constexpr, and a constexpr one is part of the key that compiled
# kernels are kept under. An attribute of an imported module is neither: it is compiled in as it is then, and when it has
# another value later, in this process or in one of next week, the kernel of the first value comes out of the cache on the
# disk. No GPU is needed to see it.
#
# Seen with triton 3.6.0, Python 3.11:
#     COLUMN 3: compiled in 3
#     COLUMN 5: compiled in 3
#     same key: True
# Exits with 1 if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check triton==3.6.0

cat >layout.py <<'PY'
COLUMN = 3
PY
cat >kernel.py <<'PY'
import layout
import triton
import triton.language as tl


@triton.jit
def read(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr + layout.COLUMN))
PY
cat >compile.py <<'PY'
import re

import layout
import triton
from kernel import read
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

source = ASTSource(read, {"x_ptr": "*i32", "out_ptr": "*i32"}, constexprs={})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(layout.COLUMN, re.search(r"constant (\d+) : i32", compiled.asm["ttir"])[1], compiled.hash)
PY

export TRITON_CACHE_DIR=$folder/cache
read -r column first key < <(env/bin/python compile.py)
echo "COLUMN $column: compiled in $first"
echo "COLUMN = 5" >layout.py
read -r column second other_key < <(env/bin/python compile.py)
echo "COLUMN $column: compiled in $second"
same=$([ "$key" = "$other_key" ] && echo True || echo False)
echo "same key: $same"
[ "$first" = 3 ] && [ "$second" = 3 ] && [ "$same" = True ]
