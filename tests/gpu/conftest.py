import importlib.metadata
import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    reason = None if torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET") else "no CUDA GPU"
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def no_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session")
def plugin_path(tmp_path_factory):
    """A folder that makes the plugin of a checkout known to the engine's processes, where it is not installed."""
    folder = tmp_path_factory.mktemp("plugin")
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="flashprefill"):
        info = folder / "vllm_flashprefill-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-flashprefill\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nflashprefill = vllm_flashprefill.plugin:register\n"
        )
    return folder
