#!/usr/bin/env bash
# PyTorch 2.13.0: a cast to float8_e4m3fn saturates, infinity included, where earlier releases gave NaN; its siblings do not.
#
# float8_e4m3fn has no infinity, so what is too large is either NaN or the largest number, 448. PyTorch 2.6.0, 2.9.1 and
# 2.11.0 (CPU) gave NaN, as ml_dtypes does, whose type has the same name. 2.13.0 gives 448 with the sign, for infinity too,
# without an argument or a warning. In the same release float8_e4m3fnuz still overflows to NaN, and float8_e5m2 to infinity.
# So a check for NaN after quantising finds an overflow under one release and not under the next, and tables of codes made
# by the two libraries differ.
#
# Seen with torch 2.13.0 and ml_dtypes 0.5.4 on a CPU, Python 3.11, for 464, 465, 10000, inf, -inf and nan:
#     torch float8_e4m3fn: [448.0, 448.0, 448.0, 448.0, -448.0, nan]
#     torch float8_e4m3fnuz: [nan, nan, nan, nan, nan, nan]
#     torch float8_e5m2: [448.0, 448.0, 10240.0, inf, -inf, nan]
#     ml_dtypes float8_e4m3fn: [448.0, nan, nan, nan, nan, nan]
# Exits with 1 if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 ml_dtypes==0.5.4 numpy==2.3.4

cat >cast.py <<'PY'
import ml_dtypes
import numpy as np
import torch

VALUES = [464.0, 465.0, 10000.0, float("inf"), float("-inf"), float("nan")]
found = {}
for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"):
    found[f"torch {name}"] = torch.tensor(VALUES).to(getattr(torch, name)).float().tolist()
with np.errstate(all="ignore"):
    found["ml_dtypes float8_e4m3fn"] = (
        np.array(VALUES, np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32).tolist()
    )
for name, values in found.items():
    print(f"{name}: {values}")
expected = {
    "torch float8_e4m3fn": "[448.0, 448.0, 448.0, 448.0, -448.0, nan]",
    "torch float8_e4m3fnuz": "[nan, nan, nan, nan, nan, nan]",
    "torch float8_e5m2": "[448.0, 448.0, 10240.0, inf, -inf, nan]",
    "ml_dtypes float8_e4m3fn": "[448.0, nan, nan, nan, nan, nan]",
}
raise SystemExit({name: str(values) for name, values in found.items()} != expected)
PY
env/bin/python cast.py
