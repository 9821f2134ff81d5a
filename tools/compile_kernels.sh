#!/usr/bin/env bash
# Compile every kernel under some versions of Triton, which are installed beside each other in .triton/VERSION.
#
#     tools/compile_kernels.sh PYTHON VERSION...
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: $0 PYTHON VERSION..." >&2; exit 1; }
python=$1
cd "$(dirname "$0")/.."
pip_options=(--disable-pip-version-check --no-input --quiet --no-deps --no-compile)
status=0
for version in "${@:2}"; do
    target=.triton/$version
    # A wheel of Triton is for one version of Python.
    want=$("$python" -V)
    if ! [ -f "$target/.stamp" ] || [ "$(cat "$target/.stamp")" != "$want" ]; then
        echo "[$target] installing (some 200 MB to download)"
        rm -rf "$target"
        "$python" -m pip install "${pip_options[@]}" --target "$target" "triton==$version"
        echo "$want" >"$target/.stamp"
    fi
    PYTHONPATH=$target:. "$python" -m tools.compile_kernels || status=1
done
exit $status
