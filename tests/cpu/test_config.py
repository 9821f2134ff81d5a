import dataclasses
import json
from types import SimpleNamespace

import pytest

from vllm_flashprefill import PRESETS, FlashPrefillConfig
from vllm_flashprefill.config import PRESETS_BY_HEAD_SIZE, enabled, log_interval


def vllm_config(options=None, model_type="llama", **shape):
    shape = shape or {"num_attention_heads": 32, "hidden_size": 4096}
    additional = {} if options is None else {"flashprefill": options}
    return SimpleNamespace(
        additional_config=additional,
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type, **shape)),
    )


def test_defaults_are_the_published_settings():
    config = FlashPrefillConfig()
    assert (config.block_size, config.num_sink_blocks, config.num_window_blocks) == (128, 2, 4)
    assert config.num_dense_tail_blocks == 2


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FlashPrefillConfig().alpha = 0.5


def test_each_source_wins_over_the_next():
    code = {"FLASHPREFILL_CODE_OPTIONS": json.dumps({"alpha": 0.3, "num_sink_blocks": 5, "num_window_blocks": 7})}
    env = {**code, "FLASHPREFILL_ALPHA": "0.2", "FLASHPREFILL_NUM_SINK_BLOCKS": "6"}

    assert FlashPrefillConfig.from_vllm(vllm_config(), {}).alpha == 0.73
    assert FlashPrefillConfig.from_vllm(vllm_config(), code).alpha == 0.3
    assert FlashPrefillConfig.from_vllm(vllm_config(), env).alpha == 0.2
    config = FlashPrefillConfig.from_vllm(vllm_config({"alpha": 0.1}), env)
    assert (config.alpha, config.num_sink_blocks, config.num_window_blocks) == (0.1, 6, 7)


def test_an_option_that_is_no_number_comes_from_each_source(monkeypatch):
    def found(options=None, **environ):
        options = {"piece_size": 0, **(options or {})}
        return FlashPrefillConfig.from_vllm(vllm_config(options), environ).compute_dtype

    assert found() == "auto"
    monkeypatch.setitem(PRESETS["llama"], "compute_dtype", "fp8")
    code = {"FLASHPREFILL_CODE_OPTIONS": '{"compute_dtype": "auto"}'}
    assert [found(), found(**code)] == ["fp8", "auto"]
    assert found(**code, FLASHPREFILL_COMPUTE_DTYPE="fp8") == "fp8"
    assert found({"compute_dtype": "auto"}, FLASHPREFILL_COMPUTE_DTYPE="fp8") == "auto"
    assert FlashPrefillConfig.from_env({"FLASHPREFILL_COMPUTE_DTYPE": "fp8"}) == FlashPrefillConfig(compute_dtype="fp8")


def test_a_model_without_preset_gets_the_default():
    config = FlashPrefillConfig.from_vllm(vllm_config(model_type="unheard_of"), {})
    assert config == FlashPrefillConfig()


def test_presets_are_for_the_head_size_they_were_published_with():
    text_config = SimpleNamespace(num_attention_heads=32, hidden_size=2048, head_dim=128)
    whole = {"piece_size": 0}
    inner = FlashPrefillConfig.from_vllm(vllm_config(whole, model_type="qwen3_vl_moe", text_config=text_config), {})
    assert inner.alpha == PRESETS["qwen3_vl_moe"]["alpha"]
    small = vllm_config(num_attention_heads=9, hidden_size=576)
    assert FlashPrefillConfig.from_vllm(small, {}).alpha == PRESETS_BY_HEAD_SIZE[64]["llama"]["alpha"]
    for other in (dict(num_attention_heads=32, hidden_size=2560), dict(model_type="qwen2", head_dim=64)):
        assert FlashPrefillConfig.from_vllm(vllm_config(whole, **other), {}) == FlashPrefillConfig(piece_size=0)


def test_presets_and_the_default_alpha_are_for_blocks_scored_whole_or_by_pieces():
    assert (FlashPrefillConfig().alpha, FlashPrefillConfig(piece_size=0).alpha) == (0.73, 0.05)
    assert FlashPrefillConfig.from_vllm(vllm_config(), {}) == FlashPrefillConfig()
    by_variable = {"FLASHPREFILL_PIECE_SIZE": "0"}
    assert FlashPrefillConfig.from_vllm(vllm_config(), by_variable).alpha == PRESETS["llama"]["alpha"]
    assert FlashPrefillConfig.from_vllm(vllm_config({"piece_size": 16}), by_variable).alpha == 0.73
    assert FlashPrefillConfig.from_vllm(vllm_config({"alpha": 0.3}), by_variable).alpha == 0.3
    # That of heads of 64 asks for whole blocks itself.
    small = dict(num_attention_heads=9, hidden_size=576)
    preset = PRESETS_BY_HEAD_SIZE[64]["llama"]
    assert FlashPrefillConfig.from_vllm(vllm_config(**small), {}) == FlashPrefillConfig(**preset)
    assert FlashPrefillConfig.from_vllm(vllm_config({"piece_size": 8}, **small), {}) == FlashPrefillConfig()
    # alpha alone is for pieces whatever the model.
    assert FlashPrefillConfig.from_vllm(vllm_config({"alpha": 0.3}, **small), {}) == FlashPrefillConfig(alpha=0.3)
    given = FlashPrefillConfig.from_vllm(vllm_config({"alpha": 0.3}, **small), by_variable)
    assert given == FlashPrefillConfig(alpha=0.3, piece_size=0)
    first = FlashPrefillConfig.from_vllm(vllm_config({"alpha": 0.3}, **small), by_variable, first={"piece_size": 8})
    assert first == FlashPrefillConfig(alpha=0.3)
    with pytest.raises(ValueError, match="alpha must be a number in"):
        FlashPrefillConfig.from_vllm(vllm_config({"alpha": None}), {"FLASHPREFILL_ALPHA": "0"})


class PerLayerConfig:
    """Says what it is asked by layer, and raises where it is asked for the model."""

    model_type = "llama"

    @property
    def head_dim(self):
        raise ValueError("ask for a layer's")


@pytest.mark.parametrize(
    "hf_config",
    [
        PerLayerConfig(),
        SimpleNamespace(model_type="llama", num_attention_heads=32),
        SimpleNamespace(model_type="llama", num_attention_heads=[32, 16], hidden_size=4096),
        SimpleNamespace(model_type="llama", num_attention_heads=0, hidden_size=4096),
        SimpleNamespace(model_type="llama", head_dim=[128, 64]),
        SimpleNamespace(model_type=["llama"], head_dim=128),
        SimpleNamespace(head_dim=128),
        SimpleNamespace(model_type="llama", text_config={"head_dim": 128}),
        None,
    ],
)
def test_a_config_that_is_not_understood_has_no_preset(hf_config):
    engine = SimpleNamespace(additional_config={}, model_config=SimpleNamespace(hf_config=hf_config))
    assert FlashPrefillConfig.from_vllm(engine, {}) == FlashPrefillConfig()


def test_presets_are_valid_options():
    for presets in PRESETS_BY_HEAD_SIZE.values():
        for options in presets.values():
            FlashPrefillConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must be a number in [0, 1], not 1.5"),
        ({"alpha": -0.1}, "alpha must be a number in [0, 1], not -0.1"),
        ({"alpha": float("nan")}, "alpha must be a number in [0, 1], not nan"),
        ({"alpha": 10**400}, "alpha must be a number in [0, 1], not 1000"),
        ({"alpha": "0.1"}, "alpha must be a number in [0, 1], not '0.1'"),
        ({"alpha": True}, "alpha must be a number in [0, 1], not True"),
        ({"candidate_alpha": 1.5}, "candidate_alpha must be a number in [0, 1], not 1.5"),
        ({"candidate_alpha": -0.1}, "candidate_alpha must be a number in [0, 1], not -0.1"),
        ({"candidate_alpha": None}, "candidate_alpha must be a number in [0, 1], not None"),
        ({"alpha": 2, "candidate_alpha": 3}, "alpha must be a number in [0, 1], not 2"),
        ({"piece_size": 128}, "piece_size must be one of (0, 4, 8, 16, 32, 64), not 128"),
        ({"piece_size": 12}, "piece_size must be one of (0, 4, 8, 16, 32, 64), not 12"),
        ({"piece_size": 8.0}, "piece_size must be an integer in [0, 2147483647], not 8.0"),
        ({"piece_size": -8}, "piece_size must be an integer in [0, 2147483647], not -8"),
        ({"max_density": 1.01}, "max_density must be a number in [0, 1], not 1.01"),
        ({"max_density": -1}, "max_density must be a number in [0, 1], not -1"),
        ({"max_density": "0.5"}, "max_density must be a number in [0, 1], not '0.5'"),
        ({"max_density": True}, "max_density must be a number in [0, 1], not True"),
        ({"max_density": float("nan")}, "max_density must be a number in [0, 1], not nan"),
        ({"compute_dtype": "bf16"}, "compute_dtype must be one of ('auto', 'fp8'), not 'bf16'"),
        ({"compute_dtype": "FP8"}, "compute_dtype must be one of ('auto', 'fp8'), not 'FP8'"),
        ({"compute_dtype": ""}, "compute_dtype must be one of ('auto', 'fp8'), not ''"),
        ({"compute_dtype": 8}, "compute_dtype must be one of ('auto', 'fp8'), not 8"),
        ({"compute_dtype": None}, "compute_dtype must be one of ('auto', 'fp8'), not None"),
        ({"compute_dtype": ["fp8"]}, "compute_dtype must be one of ('auto', 'fp8'), not ['fp8']"),
        ({"num_sink_blocks": -1}, "num_sink_blocks must be an integer in [0, 2147483647], not -1"),
        ({"num_window_blocks": 0}, "num_window_blocks must be an integer in [1, 2147483647], not 0"),
        ({"num_dense_layers": 2.0}, "num_dense_layers must be an integer in [0, 2147483647], not 2.0"),
        (
            {"num_dense_tail_blocks": 2**33},
            "num_dense_tail_blocks must be an integer in [0, 2147483647], not 8589934592",
        ),
        ({"min_sparse_tokens": 2**31}, "min_sparse_tokens must be an integer in [0, 2147483647], not 2147483648"),
        ({"block_size": 64}, "block_size must be 128, not 64"),
        ({"alhpa": 0.1}, "unknown option 'alhpa'; did you mean alpha?"),
        ({5: 0.1}, "unknown option 5; known: alpha, "),
    ],
)
def test_bad_options_are_one_clear_error(options, message):
    with pytest.raises(ValueError) as error:
        FlashPrefillConfig.from_vllm(vllm_config(options), {})
    assert message in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "flash_prefill",
        "flashPrefill",
        "FlashPrefill",
        "flash-prefill",
        "FLASHPREFILL",
        "flashprefil",
        "flsahprefill",
        "flash_pre_fill",
        "flashprefill_config",
    ],
)
def test_a_key_of_additional_config_that_is_close_to_ours_is_an_error(key):
    engine = SimpleNamespace(additional_config={key: {"alpha": 0.1}})
    with pytest.raises(ValueError) as error:
        FlashPrefillConfig.from_vllm(engine, {})
    assert str(error.value).startswith(f"flashprefill: unknown key '{key}'; did you mean 'flashprefill'?")


def test_an_option_outside_our_key_is_an_error():
    with pytest.raises(ValueError, match="'min_sparse_tokens' is outside 'flashprefill'; additional_config takes"):
        FlashPrefillConfig.from_vllm(SimpleNamespace(additional_config={"min_sparse_tokens": 0}), {})


def test_keys_of_other_plugins_are_theirs():
    others = {
        "flashinfer": 1,
        "flash_mla_prefill": 1,
        "flash_attn": 2,
        "prefill": 3,
        "ascend_scheduler_config": {},
        "alpha": 1,
        "block_size": 16,
    }
    engine = SimpleNamespace(additional_config={**others, 5: 6, "flashprefill": {"alpha": 0.1}})
    assert FlashPrefillConfig.from_vllm(engine, {}).alpha == 0.1
    assert FlashPrefillConfig.from_vllm(SimpleNamespace(additional_config=others), {}) == FlashPrefillConfig()


def test_options_that_are_no_object():
    with pytest.raises(ValueError, match="must be an object of options"):
        FlashPrefillConfig.from_vllm(vllm_config([1]), {})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"FLASHPREFILL_ALHPA": "0.1"}, "unknown environment variable FLASHPREFILL_ALHPA; did you mean"),
        ({"FLASHPREFILL_ALPHA": "much"}, "FLASHPREFILL_ALPHA must be a number, not 'much'"),
        ({"FLASHPREFILL_NUM_SINK_BLOCKS": "1.5"}, "FLASHPREFILL_NUM_SINK_BLOCKS must be an integer, not '1.5'"),
        ({"FLASHPREFILL_CANDIDATE_ALPHA": "some"}, "FLASHPREFILL_CANDIDATE_ALPHA must be a number, not 'some'"),
        ({"FLASHPREFILL_PIECE_SIZE": "8.0"}, "FLASHPREFILL_PIECE_SIZE must be an integer, not '8.0'"),
        ({"FLASHPREFILL_PIECE_SIZE": "6"}, "piece_size must be one of (0, 4, 8, 16, 32, 64), not 6"),
        ({"FLASHPREFILL_ALPHA": "7"}, "alpha must be a number in [0, 1], not 7.0"),
        ({"FLASHPREFILL_COMPUTE_DTYPE": "e4m3"}, "compute_dtype must be one of ('auto', 'fp8'), not 'e4m3'"),
        ({"FLASHPREFILL_COMPUTE_DTYPE": "8"}, "compute_dtype must be one of ('auto', 'fp8'), not '8'"),
        ({"FLASHPREFILL_COMPUTE_TYPE": "fp8"}, "FLASHPREFILL_COMPUTE_TYPE; did you mean FLASHPREFILL_COMPUTE_DTYPE?"),
        ({"FLASHPREFILL_SERVICE": "1"}, "unknown environment variable FLASHPREFILL_SERVICE; "),
        ({"FLASHPREFILL_PORTS": "1"}, "unknown environment variable FLASHPREFILL_PORTS; "),
        ({"FLASHPREFILL_CODE_OPTIONS": "5"}, "FLASHPREFILL_CODE_OPTIONS must be a JSON object of options, not '5'"),
        ({"FLASHPREFILL_CODE_OPTIONS": "{alpha"}, "must be a JSON object of options, not '{alpha'"),
        ({"FLASHPREFILL_CODE_OPTIONS": '{"alhpa": 1}'}, "unknown option 'alhpa'; did you mean alpha?"),
    ],
)
def test_bad_variables_are_one_clear_error(environ, message):
    with pytest.raises(ValueError) as error:
        FlashPrefillConfig.from_env(environ)
    assert message in str(error.value)


SERVICE = """
    FLASHPREFILL_SERVICE_HOST=10.0.0.7
    FLASHPREFILL_SERVICE_PORT=8000
    FLASHPREFILL_SERVICE_PORT_HTTP_METRICS=8000
    FLASHPREFILL_PORT=tcp://10.0.0.7:8000
    FLASHPREFILL_PORT_8000_TCP=tcp://10.0.0.7:8000
    FLASHPREFILL_PORT_8000_TCP_PROTO=tcp
    FLASHPREFILL_PORT_8000_TCP_PORT=8000
    FLASHPREFILL_PORT_8000_TCP_ADDR=10.0.0.7
"""


@pytest.mark.parametrize("service", ["flashprefill", "flashprefill-llama-3", "flashprefill-alpha"])
def test_what_kubernetes_says_of_a_service_is_no_option(service):
    lines = SERVICE.replace("FLASHPREFILL", service.upper().replace("-", "_")).split()
    environ = dict(line.split("=", 1) for line in lines)
    assert FlashPrefillConfig.from_env(environ) == FlashPrefillConfig()


DROPPED = "min_share is no option any more: it lost the facts of long prompts; use alpha, with piece_size 8"
# What calibration wrote once.
OLD_PRESET = '{"flashprefill": {"min_share": 0.0126, "num_dense_layers": 1}}'


def test_a_dropped_option_is_one_clear_error_wherever_it_comes_from():
    engines = [SimpleNamespace(additional_config=json.loads(OLD_PRESET)), vllm_config({"alpha": 0.1, "min_share": 0.0})]
    for engine in engines:
        with pytest.raises(ValueError) as error:
            FlashPrefillConfig.from_vllm(engine, {})
        assert str(error.value).startswith(f"flashprefill: {DROPPED}")
    for environ in ({"FLASHPREFILL_MIN_SHARE": "0.001"}, {"FLASHPREFILL_CODE_OPTIONS": '{"min_share": 0.1}'}):
        with pytest.raises(ValueError, match=r"(?i)min_share is no option any more: .*; use alpha, with piece_size 8"):
            FlashPrefillConfig.from_env(environ)


def test_blocks_are_scored_by_pieces_unless_asked_otherwise():
    sizes = {size: FlashPrefillConfig(piece_size=size).num_pieces for size in (0, 4, 8, 16, 32, 64)}
    assert sizes == {0: 0, 4: 32, 8: 16, 16: 8, 32: 4, 64: 2}
    assert FlashPrefillConfig().piece_size == 8
    assert FlashPrefillConfig.from_env({"FLASHPREFILL_PIECE_SIZE": "0"}).piece_size == 0
    assert FlashPrefillConfig.from_env({"FLASHPREFILL_CANDIDATE_ALPHA": "0"}).candidate_alpha == 0


def test_pieces_are_larger_in_an_engine_for_very_long_sequences():
    def size(max_model_len, options=None, **environ):
        engine = vllm_config(options)
        engine.model_config.max_model_len = max_model_len
        return FlashPrefillConfig.from_vllm(engine, environ).piece_size

    assert [size(length) for length in (4096, 524_288, 524_289, 1 << 20)] == [8, 8, 16, 16]
    assert size(1 << 20, {"piece_size": 0}) == 0
    assert size(1 << 20, FLASHPREFILL_PIECE_SIZE="8") == 8


def test_enabled_takes_0_and_1_only():
    assert enabled({"FLASHPREFILL": "1"})
    assert not enabled({"FLASHPREFILL": "0"})
    assert not enabled({})
    with pytest.raises(ValueError, match="FLASHPREFILL must be 0 or 1, not 'yes'"):
        enabled({"FLASHPREFILL": "yes"})


def test_log_interval():
    assert log_interval({}) is None
    assert log_interval({"FLASHPREFILL_LOG_STATS": "0"}) is None
    assert log_interval({"FLASHPREFILL_LOG_STATS": "1"}) == 10.0
    assert log_interval({"FLASHPREFILL_LOG_STATS": "2.5"}) == 2.5
    for bad in ("often", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match="FLASHPREFILL_LOG_STATS"):
            log_interval({"FLASHPREFILL_LOG_STATS": bad})
