#!/usr/bin/env bash
# model-hosting-container-standards 0.1.16: importing it sets the root logger, and every handler it has, to ERROR.
#
# vLLM's OpenAI server imports this library for SageMaker's routes. A program that has set logging up for itself and then
# imports the server, to embed it or in a test, prints no warning or info line of its own any more, though nothing asked
# for that: where neither of the library's two variables is set, which is the usual case, it takes ERROR. LOG_LEVEL is one
# of the two, and moves the root logger of the whole program likewise.
#
# Seen with model-hosting-container-standards 0.1.16, Python 3.11:
#     before: root WARNING, handler INFO
#     after: root ERROR, handler ERROR
#     with LOG_LEVEL=INFO: root INFO, handler INFO
# Exits with 1 if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check model-hosting-container-standards==0.1.16

cat >levels.py <<'PY'
import logging
import sys

handler = logging.StreamHandler()
handler.setLevel(logging.INFO)
logging.basicConfig(handlers=[handler], level=logging.WARNING)


def levels():
    root = logging.getLogger()
    return f"root {logging.getLevelName(root.level)}, handler {logging.getLevelName(handler.level)}"


before = levels()
import model_hosting_container_standards.sagemaker  # noqa: E402, F401

print(before if sys.argv[1] == "before" else levels())
PY

unset SAGEMAKER_CONTAINER_LOG_LEVEL LOG_LEVEL
before=$(env/bin/python levels.py before)
after=$(env/bin/python levels.py after)
asked=$(LOG_LEVEL=INFO env/bin/python levels.py after)
echo "before: $before"
echo "after: $after"
echo "with LOG_LEVEL=INFO: $asked"
[ "$before" = "root WARNING, handler INFO" ] && [ "$after" = "root ERROR, handler ERROR" ] &&
    [ "$asked" = "root INFO, handler INFO" ]
