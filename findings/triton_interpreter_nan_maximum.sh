#!/usr/bin/env bash
# Triton 3.6.0: its interpreter (TRITON_INTERPRET=1) has tl.maximum(NaN, 1.0) be NaN, while the same kernel compiled for a
# GPU has the number. So a clamp that takes NaN out of a kernel's numbers on the GPU leaves it in when the kernel is tested
# by the interpreter, and the other way round a test by the interpreter sees NaN travel where no GPU lets it.
#
# Without `propagate_nan` tl.maximum becomes PTX's max.f32, which gives the other operand where one is NaN; max.NaN.f32
# would give NaN. The interpreter up to 3.6.0 computes it by numpy.maximum, which gives NaN. 3.3.1 is alike; in 3.8.0 and
# 3.9.0 the interpreter has the number too. No GPU is needed to see it.
#
# Seen with triton 3.6.0 and 3.8.0, numpy 2.3.5, Python 3.11:
#     3.6.0 compiled for sm_90: max.f32
#     3.6.0 interpreted: nan
#     3.8.0 compiled for sm_90: max.f32
#     3.8.0 interpreted: 1.
# Exits with 1 if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for version in 3.6.0 3.8.0; do
    python3 -m venv "$version"
    "$version/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$version" numpy==2.3.5
done

cat >kernels.py <<'PY'
import os
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def larger(x, out_ptr, PRINTS: tl.constexpr):
    y = tl.maximum(x, 1.0)
    if PRINTS:
        tl.device_print("interpreted", y)
    else:
        tl.store(out_ptr, y)


if os.environ.get("TRITON_INTERPRET") == "1":
    larger[(1,)](float("nan"), 0, True)
else:
    signature = {"x": "fp32", "out_ptr": "*fp32", "PRINTS": "constexpr"}
    source = ASTSource(larger, signature, constexprs={"PRINTS": False})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print("compiled for sm_90:", *re.findall(r"max\S*f32", ptx))
PY

export TRITON_CACHE_DIR=$folder/cache
for version in 3.6.0 3.8.0; do
    echo "$version $("$version/bin/python" kernels.py)"
    echo "$version $(TRITON_INTERPRET=1 "$version/bin/python" kernels.py | sed -E 's/.*(interpreted:) +\[(.*)\]/\1 \2/')"
done | tee seen.txt
diff seen.txt - <<'TXT'
3.6.0 compiled for sm_90: max.f32
3.6.0 interpreted: nan
3.8.0 compiled for sm_90: max.f32
3.8.0 interpreted: 1.
TXT
