"""What an engine's workers need of FlashPrefill on other nodes, and whether they have it.

Target: ``vllm.envs.environment_variables``, and ``Executor.get_kv_cache_specs`` of engine V1.
Why: Ray's workers, and those of ``--nnodes``, have the environment of their node. Ray's get vLLM's own variables, and
nothing else before its second Ray executor (vLLM 0.24.0's default), so they would be plain vLLM without a word. And a
node may lack this package, or have another one.
How: our variables join the first, by which vLLM decides what Ray's actors get. The second is what an engine asks first
of workers that have loaded the model: before it, each is asked what it is, by a function that is sent as code.
Can go: the first once vLLM copies the variables of its plugins, the second once it compares plugins across workers.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vllm_flashprefill
from vllm_flashprefill import counters
from vllm_flashprefill.config import ENV_ENABLE, ENV_LOG_STATS, ENV_STATS_DIR, VARIABLES, FlashPrefillConfig
from vllm_flashprefill.patches import undo

logger = logging.getLogger("vllm.flashprefill")


def send_variables() -> None:
    """Have vLLM copy FlashPrefill's variables to the actors that it starts through Ray, until `revert`."""
    from vllm import envs

    known = envs.environment_variables
    for name in VARIABLES:
        # The value goes into the key of vLLM's compilation cache, where nothing of ours belongs: None, always.
        known[name] = lambda: None
        undo.on_revert(lambda name=name: known.pop(name, None))


def check_workers() -> None:
    """Have engines compare their workers with themselves once these are there, until `revert`."""
    from vllm.v1.executor.abstract import Executor

    def checked(original: Any) -> Any:
        @functools.wraps(original)
        def get_kv_cache_specs(self: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self, "uses_ray", False) or self.parallel_config.world_size > 1:
                compare(self.vllm_config, self.collective_rpc(question()))
            return original(self, *args, **kwargs)

        return get_kv_cache_specs

    undo.wrap(Executor, "get_kv_cache_specs", checked)


def question() -> Callable[[Any], dict[str, Any]]:
    """What workers are asked. It is sent as code, as a function within a function is, and may need nothing of ours."""

    def answer(worker: Any) -> dict[str, Any]:
        import os
        import socket
        import sys

        node = socket.gethostname()
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            node += f" ({ray.util.get_node_ip_address()})"
        try:
            import vllm_flashprefill
        except ImportError as error:
            return {"node": node, "missing": str(error)}
        try:
            from vllm_flashprefill.patches.workers import itself
        except ImportError:
            code, told = None, {}
        else:
            code, told = itself(worker.vllm_config)
        version = getattr(vllm_flashprefill, "__version__", None)
        return {"node": node, "variable": os.environ.get("FLASHPREFILL"), "version": version, "code": code, **told}

    return answer


def itself(vllm_config: Any) -> tuple[str, dict[str, Any]]:
    """(a digest of this package's code, whether it is registered here, its options, and its counters' file)."""
    from vllm_flashprefill.patches import registration

    told: dict[str, Any] = {"registered": registration.is_registered()}
    if told["registered"]:
        told["options"] = str(FlashPrefillConfig.from_vllm(vllm_config))
        told["counters"] = counters.recorder().file
    return _code(), told


def compare(vllm_config: Any, answers: list[dict[str, Any]]) -> None:
    """Warn of workers whose counters this process does not see.

    Args:
        answers: of all ranks, in their order.

    Raises:
        RuntimeError: a worker is not sparse as this process's engine is to be: names its node, and what to do there.
    """
    options = str(FlashPrefillConfig.from_vllm(vllm_config))
    faults: dict[str, list[int]] = {}
    unseen: dict[str, list[int]] = {}
    for rank, answer in enumerate(answers):
        fault = _fault(answer, options)
        if fault is not None:
            faults.setdefault(f"node {answer['node']} {fault}", []).append(rank)
        elif not _seen(answer["counters"]):
            unseen.setdefault(f"node {answer['node']}", []).append(rank)
    if faults:
        raise RuntimeError(f"FlashPrefill is not the same in all workers: {_listed(faults)}")
    if unseen:
        logger.warning(
            "FlashPrefill: /metrics and stats() are without the counters of other nodes' workers: %s. With %s=1 "
            "their logs have them",
            _listed(unseen),
            ENV_LOG_STATS,
        )


def _fault(answer: dict[str, Any], options: str) -> str | None:
    version = vllm_flashprefill.__version__
    if "missing" in answer:
        return f"has no vllm_flashprefill ({answer['missing']}): install {version} there, beside vLLM"
    if answer["version"] != version:
        return f"has vllm_flashprefill {answer['version']}, not {version}: install the same one on all nodes"
    if answer["code"] != _code():
        return f"has vllm_flashprefill {version} with other code: install the same commit on all nodes"
    if not answer["registered"]:
        return (
            f"has vllm_flashprefill, but is plain vLLM, with {ENV_ENABLE}={answer['variable'] or ''}: see its log, and "
            "that neither VLLM_PLUGINS nor vLLM's ray_non_carry_over_env_vars.json there or here keeps it out"
        )
    if answer["options"] != options:
        return f"has the options {answer['options']}, not {options}: unset FLASHPREFILL_* variables there"
    return None


def _seen(file: tuple[str, int] | None) -> bool:
    """Whether a worker's file of counters, by name and number, is one of this machine's folder."""
    try:
        return file is not None and os.stat(Path(os.environ[ENV_STATS_DIR], file[0])).st_ino == file[1]
    except (OSError, KeyError):
        return False


def _listed(nodes: dict[str, list[int]]) -> str:
    def ranks(found: list[int]) -> str:
        return ("rank " if len(found) == 1 else "ranks ") + ", ".join(map(str, found))

    return "; ".join(f"{node}: {ranks(found)}" for node, found in nodes.items())


@functools.cache
def _code() -> str:
    files = sorted(Path(vllm_flashprefill.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
