#!/usr/bin/env bash
# Ray 2.60.0: workers import from the folder that the driver was started in, before what is installed; the driver does not.
#
# A program that is installed (a console script such as `vllm serve`, or a script in another folder) does not import from the
# folder it is started in: Python puts the script's own first. Ray sends that folder to the workers all the same, and they
# look into it before PYTHONPATH and the installed packages, on every node that has a folder of that name. Started in a
# checkout, or beside a file that is called like a package, driver and workers run different code under one name, without
# a warning.
#
# Seen with ray 2.60.0, Python 3.11, on one node:
#     driver: installed
#     worker: the driver's current folder
# Exits with 1 if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check ray==2.60.0

mkdir bin current
echo 'where = "installed"' >"$(env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tool.py"
echo 'where = "the driver'"'"'s current folder"' >current/tool.py
cat >bin/driver.py <<'PY'
import ray
import tool


@ray.remote
def where():
    import tool

    return tool.where


ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
in_worker = ray.get(where.remote())
print(f"driver: {tool.where}")
print(f"worker: {in_worker}")
raise SystemExit(not (tool.where == "installed" and in_worker == "the driver's current folder"))
PY
cd current
RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 ../env/bin/python ../bin/driver.py 2>/dev/null
