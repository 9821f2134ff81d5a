"""A Ray cluster of two nodes on this machine, and CPU ranks on it, which vLLM has for GPUs alone.

Ray is told that each node has one GPU, and vLLM, by a platform plugin of its kind, that its CPU is one.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support import ROOT
from tests.support.engines import environment

# Ray has a name for 127.0.0.1, the address of the machine.
HEAD, OTHER = "127.0.0.2", "127.0.0.3"


def node_environment(folder, ray_folder, ip, path=()):
    """Of a node's processes, which begin with nothing of FlashPrefill's but the installed package.

    Args:
        folder: for the plugin.
        ray_folder: for what Ray keeps in /tmp otherwise; a short name, since sockets are in it.
        path: folders before the checkout, where Python looks for modules first.
    """
    plugin = folder / "plugin" / "ray_cpu-1.dist-info"
    plugin.mkdir(parents=True, exist_ok=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-cpu\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nray_cpu = tests.support.ray_cpu_platform:platform\n"
    )
    env = environment(
        PYTHONPATH=os.pathsep.join(map(str, (*path, plugin.parent, ROOT))),
        VLLM_HOST_IP=ip,
        VLLM_CPU_KVCACHE_SPACE="1",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        RAY_TMPDIR=ray_folder,
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
    )
    return {name: value for name, value in env.items() if not name.startswith("FLASHPREFILL")}


@contextlib.contextmanager
def ray_cluster(folder, other_path=()):
    """Start it; yields the environment of a driver on the head node. other_path: as `node_environment`'s."""
    with socket.socket() as probe:
        probe.bind((HEAD, 0))
        port = probe.getsockname()[1]
    address = f"{HEAD}:{port}"
    with contextlib.ExitStack() as stack:
        ray_folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True))
        for ip, path in ((HEAD, ()), (OTHER, other_path)):
            where = ["--head", "--port", str(port)] if ip == HEAD else ["--address", address]
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where, "--node-ip-address", ip]
            command += ["--num-cpus", "1", "--num-gpus", "1", "--object-store-memory", "100000000"]
            command += ["--include-dashboard=false"] if ip == HEAD else []
            log = Path(folder, f"ray-{ip}.log")
            env = node_environment(folder, ray_folder, ip, path)
            with open(log, "w") as file:
                node = subprocess.Popen(command, env=env, stdout=file, stderr=file, cwd=folder)
            stack.callback(_stop, node)
            _wait_for_node(node, log)
        yield {**node_environment(folder, ray_folder, HEAD), "RAY_ADDRESS": address}


def _stop(node):
    node.terminate()
    try:
        node.wait(60)
    except subprocess.TimeoutExpired:
        node.kill()


def _wait_for_node(node, log, seconds=180):
    """Until it says that it has joined the cluster."""
    deadline = time.monotonic() + seconds
    while "This command will now block forever" not in log.read_text():
        assert node.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
