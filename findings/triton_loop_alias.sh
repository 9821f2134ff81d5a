#!/usr/bin/env bash
# Triton 3.9.0: a variable that begins a loop as the value of another one, and is set to that other one in the loop, is not
# carried around the loop: it keeps what it began as, without a word.
#
# In `b = a` the names are first visited with what they hold before the loop. There `b = a` changes nothing, since both are
# the same value, so that b does not count as set by the loop, and what it is set to in later rounds is lost. With
# `b = a + 0.0` before the loop it is another value, and is carried. So with 3.5.0 to 3.8.0; 3.3.1 carries both. No GPU is
# needed to see it: the IR has one value less, and stores what b began as.
#
# Seen with triton 3.9.0, Python 3.11:
#     b = a: 0 of the loop's values reach the store
#     b = a + 0.0: 1 of the loop's values reach the store
# Exits with 1 if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check triton==3.9.0

cat >kernels.py <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def alike(x_ptr, out_ptr, rounds):
    a = tl.load(x_ptr)
    b = a
    for i in range(rounds):
        if i % 2 == 0:
            b = a
        a = a + 1.0
    tl.store(out_ptr, b)


@triton.jit
def apart(x_ptr, out_ptr, rounds):
    a = tl.load(x_ptr)
    b = a + 0.0
    for i in range(rounds):
        if i % 2 == 0:
            b = a
        a = a + 1.0
    tl.store(out_ptr, b)


for words, kernel in (("b = a", alike), ("b = a + 0.0", apart)):
    source = ASTSource(kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32", "rounds": "i32"}, constexprs={})
    ir = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    loops = re.findall(r"(%\w+)(?::\d+)? = scf\.for", ir)
    stored = re.search(r"tt\.store %\w+, (%\w+)", ir)[1]
    print(f"{words}: {int(stored in loops)} of the loop's values reach the store")
PY

export TRITON_CACHE_DIR=$folder/cache
env/bin/python kernels.py | tee seen.txt
diff seen.txt - <<'TXT'
b = a: 0 of the loop's values reach the store
b = a + 0.0: 1 of the loop's values reach the store
TXT
