"""Ranks on two nodes of a Ray cluster: both are sparse, as one process is, or an error names the one that is not."""

import importlib.util
import shutil

import pytest

import vllm_flashprefill
from tests.support import ROOT
from tests.support.engines import BARE, SMALL_LAYERS, assert_same, engine, engine_arguments, vllm_version
from tests.support.jobs import Failed, run_job

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install ray", allow_module_level=True)

from tests.support.ray_cpu import OTHER, ray_cluster

SPARSE = {"alpha": 1.0, "piece_size": 0, **BARE, "num_sink_blocks": 1, "num_dense_tail_blocks": 1}
# vLLM 0.24.0 has a second Ray executor, and takes it unless this says no.
SECOND = vllm_version() not in ("0.10.0", "0.12.0")


@pytest.fixture(scope="module")
def batches(text_ids):
    return [[(text_ids[:1500], 4)], [(text_ids[5000:5060], 8), (text_ids[5100:7000], 8)]]


def on_two_nodes(env, batches, model, folder):
    """([result of each batch] at alpha 0, the same sparse, everything the processes wrote) of one rank on each node."""
    env = {**env, **{f"FLASHPREFILL_{name.upper()}": str(value) for name, value in SPARSE.items()}}
    # Lets an option be changed in the ranks.
    env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    job = {
        "engine": engine_arguments(tensor_parallel_size=2, distributed_executor_backend="ray", **model),
        "batches": batches,
        "passes": [{"alpha": 0.0}, {"alpha": SPARSE["alpha"]}],
    }
    # Ray has its workers look for modules in the folder that the driver is in, before all others.
    results, log = run_job("engine_job", job, env, cwd=folder)
    return results[: len(batches)], results[len(batches) :], log


@pytest.mark.parametrize("executor", [1, 2] if SECOND else [1])
def test_both_nodes_are_sparse_as_one_process_is(executor, small_model, batches, tmp_path):
    with ray_cluster(tmp_path) as env:
        if SECOND:
            env["VLLM_USE_RAY_V2_EXECUTOR_BACKEND"] = str(executor - 1)
        exact, sparse, log = on_two_nodes(env, batches, small_model, tmp_path)
    assert f"ip={OTHER}" in log
    with engine(**small_model) as generate:
        for result, batch in zip(exact, batches, strict=True):
            assert_same(result["answers"], generate(batch)[0])
            assert result["stats"]["kept_blocks"] == result["stats"]["visible_blocks"] > 0
    # This machine's folder of counters is both nodes'.
    assert exact[0]["stats"]["sparse_tokens"] == 2 * SMALL_LAYERS * 1500
    with engine(SPARSE, **small_model) as generate:
        for result, batch in zip(sparse, batches, strict=True):
            answers, one = generate(batch)
            stats = result["stats"]
            assert stats["visible_blocks"] == one.visible_blocks
            assert stats["kept_blocks"] == pytest.approx(one.kept_blocks, rel=1e-2)
            assert stats["kept_blocks"] < 0.9 * stats["visible_blocks"]
            if stats["kept_blocks"] == one.kept_blocks:
                assert_same(result["answers"], answers)


@pytest.mark.parametrize("fault", ["missing", "another"])
def test_a_node_without_the_package_or_with_another_is_an_error_that_names_it(fault, small_model, batches, tmp_path):
    other = tmp_path / "other" / "vllm_flashprefill"
    if fault == "another":
        shutil.copytree(ROOT / "vllm_flashprefill", other, ignore=shutil.ignore_patterns("__pycache__"))
        text = (other / "__init__.py").read_text()
        (other / "__init__.py").write_text(text.replace(f'"{vllm_flashprefill.__version__}"', '"0.0.1"'))
        said = f"has vllm_flashprefill 0.0.1, not {vllm_flashprefill.__version__}"
    else:
        other.mkdir(parents=True)
        (other / "__init__.py").write_text("raise ModuleNotFoundError('it is not installed')\n")
        said = "has no vllm_flashprefill (it is not installed)"
    with ray_cluster(tmp_path, other_path=[other.parent]) as env, pytest.raises(Failed) as failed:
        on_two_nodes(env, batches, small_model, tmp_path)
    (line,) = {line.partition("RuntimeError: FlashPrefill is")[2] for line in str(failed.value).splitlines()} - {""}
    assert f"({OTHER}) {said}" in line and line.endswith(": rank 1"), line
