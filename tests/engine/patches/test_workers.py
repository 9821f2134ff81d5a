"""What workers of other nodes are given and asked, without an engine; tests/engine/test_ray.py has one."""

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest

import vllm_flashprefill
from vllm_flashprefill import config, counters, plugin
from vllm_flashprefill.patches import workers

CONFIG = SimpleNamespace(model_config=SimpleNamespace(max_model_len=8192), additional_config={})


@pytest.fixture(scope="session", autouse=True)
def model():
    """No model is needed here."""


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setenv("FLASHPREFILL", "1")
    plugin.register()
    yield
    vllm_flashprefill.revert()


@pytest.fixture
def answer(registered, shared_stats):
    """What a worker like this process answers; its node's name is not this machine's."""
    return {**workers.question()(SimpleNamespace(vllm_config=CONFIG)), "node": "b (10.0.0.2)"}


def test_vllm_copies_all_variables_to_its_actors(registered):
    from vllm.ray.ray_env import get_env_vars_to_copy

    assert set(config.VARIABLES) >= {"FLASHPREFILL", "FLASHPREFILL_ALPHA", "FLASHPREFILL_STATS_DIR"}
    assert get_env_vars_to_copy() >= set(config.VARIABLES)
    vllm_flashprefill.revert()
    assert not get_env_vars_to_copy() & set(config.VARIABLES)


def test_the_key_of_vllms_compilation_cache_is_the_same_whatever_their_values(registered, monkeypatch):
    from vllm import envs

    if not hasattr(envs, "compile_factors"):
        pytest.skip("this vLLM names the variables that go into the key")
    before = envs.compile_factors()
    monkeypatch.setenv("FLASHPREFILL_STATS_DIR", "/elsewhere")
    monkeypatch.setenv("FLASHPREFILL_ALPHA", "0.5")
    assert envs.compile_factors() == before


def test_the_question_needs_nothing_of_ours_where_it_is_asked(tmp_path):
    question = tmp_path / "question"
    question.write_bytes(cloudpickle.dumps(workers.question()))
    # Without site, there are the packages of the environment, but no checkout that is installed in it.
    run = (
        "import pickle, sys; sys.path.append(sys.argv[2]); sys.modules['vllm_flashprefill'] = None;"
        "sys.stdout.buffer.write(pickle.dumps(pickle.load(open(sys.argv[1], 'rb'))(None)))"
    )
    packages = str(Path(cloudpickle.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-S", "-c", run, str(question), packages], cwd=tmp_path, capture_output=True, check=True
    )
    answer = pickle.loads(done.stdout)
    assert answer["node"] and "vllm_flashprefill" in answer["missing"]
    with pytest.raises(RuntimeError, match=r"node \S+ has no vllm_flashprefill .*install 0\.1\.0 there.*: rank 0"):
        workers.compare(CONFIG, [answer])


def test_workers_that_are_the_same_are_no_news(answer, caplog):
    workers.compare(CONFIG, [answer, answer])
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "0.0.9"}, "vllm_flashprefill 0.0.9, not 0.1.0"),
        ({"code": "another"}, "0.1.0 with other code"),
        ({"registered": False, "variable": None}, "is plain vLLM, with FLASHPREFILL=:"),
        ({"options": "FlashPrefillConfig(alpha=0.5)"}, "has the options FlashPrefillConfig(alpha=0.5), not "),
    ],
)
def test_another_worker_is_an_error_that_names_its_node(answer, change, said):
    with pytest.raises(RuntimeError) as error:
        workers.compare(CONFIG, [{**answer, "node": "a"}, answer | change, {**answer, "node": "c"}, answer | change])
    message = str(error.value)
    assert said in message
    assert message.count("node ") == 1 and "node b (10.0.0.2) " in message and message.endswith(": ranks 1, 3")


@pytest.mark.parametrize("inode", [None, 1])
def test_counters_that_are_not_seen_here_are_named(answer, inode, caplog):
    """A folder that is not there, and a file of the same name on another machine."""
    name, _ = counters.recorder().file
    other = {**answer, "counters": inode and (name, inode)}
    workers.compare(CONFIG, [answer, other])
    (record,) = caplog.records
    assert "without the counters of other nodes' workers: node b (10.0.0.2): rank 1." in record.getMessage()
    assert "FLASHPREFILL_LOG_STATS" in record.getMessage()


def test_an_engine_compares_its_workers_before_it_asks_anything_else_of_them(registered, answer):
    from vllm.v1.executor.abstract import Executor

    class OneOfTwo(Executor):
        def __init__(self, answers):
            self.vllm_config, self.parallel_config = CONFIG, SimpleNamespace(world_size=2)
            self.answers, self.asked = answers, []

        def _init_executor(self):
            pass

        def check_health(self):
            pass

        def collective_rpc(self, method, *args, **kwargs):
            self.asked.append(method)
            return self.answers if callable(method) else [{}]

    same, other = OneOfTwo([answer, answer]), OneOfTwo([answer, {**answer, "code": "another"}])
    assert same.get_kv_cache_specs() == [{}]
    assert callable(same.asked[0]) and same.asked[1] == "get_kv_cache_spec"
    with pytest.raises(RuntimeError, match="with other code"):
        other.get_kv_cache_specs()
    assert len(other.asked) == 1
