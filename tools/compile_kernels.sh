#!/usr/bin/env bash
# Compile every kernel under some versions of Triton, which are installed beside each other in .triton/VERSION.
#
#     tools/compile_kernels.sh PYTHON VERSION... [-- OPTIONS]
#
# Every kernel under the last version, a few of each under the others; OPTIONS of tools/compile_kernels.py in their place.
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: $0 PYTHON VERSION... [-- OPTIONS]" >&2; exit 1; }
python=$1
versions=()
shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do versions+=("$1"); shift; done
options=("${@:2}")
cd "$(dirname "$0")/.."
pip_options=(--disable-pip-version-check --no-input --quiet --no-deps --no-compile)
status=0
for version in "${versions[@]}"; do
    target=.triton/$version
    # A wheel of Triton is for one version of Python.
    want=$("$python" -V)
    if ! [ -f "$target/.stamp" ] || [ "$(cat "$target/.stamp")" != "$want" ]; then
        echo "[$target] installing (some 200 MB to download)"
        rm -rf "$target"
        "$python" -m pip install "${pip_options[@]}" --target "$target" "triton==$version"
        echo "$want" >"$target/.stamp"
    fi
    how=("${options[@]}")
    if [ ${#options[@]} = 0 ] && [ "$version" != "${versions[-1]}" ]; then how=(--brief); fi
    SECONDS=0
    PYTHONPATH=$target:. "$python" -m tools.compile_kernels "${how[@]}" || status=1
    echo "[$target] $SECONDS seconds"
done
exit $status
