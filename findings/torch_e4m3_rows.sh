#!/usr/bin/env bash
# torch 2.9.1: rows of a float8_e4m3fn tensor on the CPU can be written by their numbers, but not read by them.
#
# `x[rows] = y`, `x.index_select(0, rows)`, slices and `x == y` work; `x[rows]`, `x[mask]` and `torch.equal(x, y)` raise
# NotImplementedError. So code that takes part of a batch out and puts it back fails in its first half alone, and where
# rows happen to lie together, so that a slice will do, it does not fail at all. A view of the bytes takes all of them:
# `x.view(torch.uint8)[rows].view(x.dtype)`. (With torch 2.11.0 `x[rows]` works, `torch.equal` still raises.)
#
# Seen with torch 2.9.1, Python 3.11 (some 3 GB to download):
#     x[1:3]: works
#     x[rows] = y: works
#     x.index_select(0, rows): works
#     x[rows]: "index_cpu" not implemented for 'Float8_e4m3fn'
#     x == x: works
#     torch.equal(x, x): "equal_notnan_cpu" not implemented for 'Float8_e4m3fn'
# Exits with 1 if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.9.1

cat >rows.py <<'PY'
import torch

x = torch.arange(12.0).view(4, 3).to(torch.float8_e4m3fn)
rows, two = torch.tensor([2, 0]), x[:2].clone()
cases = {
    "x[1:3]": lambda: x[1:3],
    "x[rows] = y": lambda: x.clone().__setitem__(rows, two),
    "x.index_select(0, rows)": lambda: x.index_select(0, rows),
    "x[rows]": lambda: x[rows],
    "x == x": lambda: x == x,
    "torch.equal(x, x)": lambda: torch.equal(x, x),
}
for name, case in cases.items():
    try:
        case()
        print(f"{name}: works")
    except NotImplementedError as error:
        print(f"{name}: {error}")
PY

env/bin/python -W ignore rows.py 2>/dev/null | tee found
cat >expected <<'TXT'
x[1:3]: works
x[rows] = y: works
x.index_select(0, rows): works
x[rows]: "index_cpu" not implemented for 'Float8_e4m3fn'
x == x: works
torch.equal(x, x): "equal_notnan_cpu" not implemented for 'Float8_e4m3fn'
TXT
diff expected found
