#!/usr/bin/env bash
# Serve a model with FlashPrefill, ask it about a fact in a long text, and show what was pruned.
#
#     scripts/serve_demo.sh [--keep] [MODEL] [further arguments of vllm serve]
#
# MODEL is SmolLM2-135M-Instruct in models/ unless given. --keep leaves the server running.
# PYTHON names the Python that has vLLM: by default python3, else that of .venv-0.32.0 or .venv.
# TOKENS is about how long the prompt is (default 6000), PORT the server's (default 8000).
set -euo pipefail

fail() { echo "error: $*" >&2; exit 1; }
# vLLM, and this package as its plugin.
has_both() {
    "$1" -c 'import importlib, importlib.metadata as metadata, sys
sys.exit(not (importlib.util.find_spec("vllm") and metadata.entry_points(group="vllm.general_plugins", name="flashprefill")))' \
        2>/dev/null
}

command -v curl >/dev/null || fail "no curl on the PATH"
root=$(cd "$(dirname "$0")/.." && pwd)
keep=false
if [ "${1:-}" = --keep ]; then keep=true; shift; fi
model=$root/models/SmolLM2-135M-Instruct
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then model=$1; shift; fi

python=
for candidate in ${PYTHON:+"$PYTHON"} python3 "$root/.venv-0.32.0/bin/python" "$root/.venv/bin/python"; do
    if has_both "$candidate"; then python=$candidate; break; fi
done
[ -n "$python" ] || fail "no Python with vLLM and this package; 'make demo' sets one up, or set PYTHON"

if [ "$model" = "$root/models/SmolLM2-135M-Instruct" ] && ! [ -f "$model/config.json" ]; then
    "$python" "$root/scripts/fetch_model.py"
fi
if ! command -v nvidia-smi >/dev/null; then
    # On the CPU, compiling the model takes minutes.
    set -- --enforce-eager "$@"
    slow='from vllm_flashprefill.device import is_slow_in_bfloat16; print(is_slow_in_bfloat16("cpu"))'
    if [ "$("$python" -c "$slow")" = True ]; then set -- --dtype float32 "$@"; fi
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}
fi

port=${PORT:-8000}
url=http://127.0.0.1:$port
"$python" -c 'import socket, sys; sys.exit(not socket.socket().connect_ex(("127.0.0.1", int(sys.argv[1]))))' "$port" ||
    fail "port $port is in use; set PORT to another"

log=$(mktemp -t flashprefill-serve-XXXXXX.log)
FLASHPREFILL=1 VLLM_NO_USAGE_STATS=1 nohup "$python" -m vllm.entrypoints.cli.main serve "$model" \
    --host 127.0.0.1 --port "$port" "$@" >"$log" 2>&1 &
server=$!
stop() {
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
}
trap stop EXIT
echo "starting FLASHPREFILL=1 vllm serve $model $*"
echo "its log: $log"

until curl --silent --fail --max-time 5 --output /dev/null "$url/health"; do
    kill -0 "$server" 2>/dev/null || { tail -n 20 "$log" >&2; fail "the server did not start"; }
    sleep 1
done
echo "ready after $SECONDS s"

PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" - "$url" "$model" "${TOKENS:-6000}" <<'END'
import json
import sys
import time
import urllib.error
import urllib.request

from scripts.generate import FACTS, documentation

url, model, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
name, code = FACTS[0]
# Some four characters of this text are a token.
text = documentation()[: 4 * tokens]
at = text.index("\n\n", len(text) // 3)
fact = f"The secret code of the {name} is {code}."
question = f"Question: What is the secret code of the {name}?\nAnswer: The secret code of the {name} is"
body = {
    "model": model,
    "prompt": f"{text[:at]}\n\n{fact}{text[at:]}\n\n{question}",
    "max_tokens": 8,
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}
request = urllib.request.Request(
    f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
)
started, first, answer = time.monotonic(), None, ""
try:
    with urllib.request.urlopen(request) as response:
        for line in response:
            data = line.decode().removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            for choice in chunk.get("choices", []):
                first = first or time.monotonic() - started
                answer += choice["text"]
            usage = chunk.get("usage") or {}
except urllib.error.HTTPError as error:
    sys.exit(f"error: {error}: {error.read().decode()}")
print(f"\n{usage['prompt_tokens']} tokens of text, in it: {fact}\n{question}")
print(f"{model.rpartition('/')[2]}:{(answer.splitlines() or ['(nothing)'])[0]}")
if first is not None:
    print(f"time to first token: {first:.2f} s\n")
metrics = urllib.request.urlopen(f"{url}/metrics").read().decode().splitlines()
shown = [line for line in metrics if line.startswith("vllm:flashprefill") and not line.endswith(" 0.0")]
print("\n".join(shown))
if not any(line.startswith("vllm:flashprefill_sparse_tokens") for line in shown):
    sys.exit("nothing was sparse: prompts under min_sparse_tokens (4,096) are not, nor are some models' layers")
END

if $keep; then
    trap - EXIT
    cat <<END

The server still runs; stop it with: kill $server
Ask it:
curl $url/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "$model", "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}'
curl --silent $url/metrics | grep flashprefill
END
fi
