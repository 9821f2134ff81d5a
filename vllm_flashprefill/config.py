"""Options of FlashPrefill, where they come from, and which source wins.

An option is taken from the first of these that names it:

1. vLLM's ``--additional-config '{"flashprefill": {"alpha": 0.6}}'``
2. an environment variable, ``FLASHPREFILL_ALPHA=0.6``
3. code, ``vllm_flashprefill.register(alpha=0.6)``
4. the preset of the model family and head size (`PRESETS`, `PRESETS_BY_HEAD_SIZE`), where blocks are scored whole
5. the default of `FlashPrefillConfig`; in an engine for sequences longer than `LONG_SEQUENCE`, pieces of 16
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

BLOCK_SIZE = 128
PIECE_SIZES = (0, 4, 8, 16, 32, 64)
COMPUTE_DTYPES = ("auto", "fp8")
# From this length on, pieces of 8 keys would take more than 128 MiB of a GPU that holds 8 KV heads of 128.
LONG_SEQUENCE = 512 * 1024
# Options and what is computed of them are int32 in the kernels.
MAX_INTEGER = 2**31 - 1

# alpha where none is given. With pieces it keeps 15.6 % of the blocks of 32,000 tokens of Qwen2.5-Coder-1.5B, which
# answers no worse than with dense attention (docs/accuracy.md).
PIECES_ALPHA, WHOLE_ALPHA = 0.73, 0.05

# alpha by Hugging Face `model_type`, as published for Llama-3.1-8B, Qwen2.5-7B, Qwen3-30B-A3B, Qwen2.5-VL and
# Qwen3-VL-MoE (arXiv 2603.06199) and the score of whole blocks. All of them have heads of 128.
PRESETS: dict[str, dict[str, float]] = {
    "llama": {"alpha": 0.18},
    "qwen2": {"alpha": 0.08},
    "qwen3_moe": {"alpha": 0.12},
    "qwen2_5_vl": {"alpha": 0.10},
    "qwen3_vl_moe": {"alpha": 0.22},
}
# A relative with another head size has a preset of its own or gets the default. The one for heads of 64 is
# measured on SmolLM2-135M with `python -m evaluation`; see docs/accuracy.md.
PRESETS_BY_HEAD_SIZE: dict[int, dict[str, dict[str, float]]] = {
    64: {"llama": {"alpha": 0.005, "piece_size": 0}},
    128: PRESETS,
}

ENV_PREFIX = "FLASHPREFILL_"
ENV_ENABLE = "FLASHPREFILL"
# JSON object of the options given in code; how they reach the engine's own processes.
ENV_CODE_OPTIONS = "FLASHPREFILL_CODE_OPTIONS"
ENV_LOG_STATS = "FLASHPREFILL_LOG_STATS"
ENV_STATS_DIR = "FLASHPREFILL_STATS_DIR"
ENV_STRICT = "FLASHPREFILL_STRICT"
_ENV_RESERVED = {ENV_CODE_OPTIONS, ENV_LOG_STATS, ENV_STATS_DIR, ENV_STRICT}
# What Kubernetes puts into every container of a namespace that has a Service named flashprefill or flashprefill-...
_ENV_KUBERNETES = re.compile(
    rf"{ENV_PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)

ADDITIONAL_CONFIG_KEY = "flashprefill"


@dataclasses.dataclass(frozen=True)
class FlashPrefillConfig:
    """Which key blocks a prefill may skip, and which prefills may skip any.

    Attributes:
        alpha: a key block is kept where one of the query block's rows gives one of its pieces at least this fraction of
            what it gives its best piece; without pieces, where the block's score is at least this fraction of the best
            block's. In [0, 1]; 0 keeps every block, which is dense attention. By default `PIECES_ALPHA`, or
            `WHOLE_ALPHA` without pieces; `dataclasses.replace` with another piece_size does not change it.
        block_size: tokens of a query or key block; 128.
        num_sink_blocks: key blocks at the start of the sequence that are always kept.
        num_window_blocks: most recent key blocks, the query's own among them, always kept; at least 1.
        num_dense_tail_blocks: last query blocks of a prompt that attend to everything.
        min_sparse_tokens: prompts shorter than this many tokens stay dense.
        min_append_tokens: in vLLM on a GPU, a step whose prefills all are the last tokens of prompts that follow on
            others stays dense where its tokens count for less than this many (`plan.step_work`), since less time would
            be saved than the kernels' launches take. 0 for never.
        num_dense_layers: this many first layers of the model stay dense.
        piece_size: keys of the pieces by whose mean keys a block is scored; 4, 8, 16, 32 or 64. 0: by the mean key of
            the whole block, as published, which loses facts.
        candidate_alpha: with pieces, only blocks that the published score puts at this fraction of the best block's are
            looked at; in [0, 1]. 0 looks at every block.
        max_density: in vLLM, a layer that was seen to keep more than this share of its key blocks is dense for a while;
            in [0, 1], 1 for never. Not with alpha 0.
        compute_dtype: of the products of queries with keys and of probabilities with values. "auto": 16 bits. "fp8":
            e4m3, which is less exact; only with a KV cache in e4m3, on Hopper GPUs, for heads of 64 or 128.
    """

    alpha: float | None = None
    block_size: int = BLOCK_SIZE
    num_sink_blocks: int = 2
    num_window_blocks: int = 4
    num_dense_tail_blocks: int = 2
    min_sparse_tokens: int = 4096
    min_append_tokens: int = 2560
    num_dense_layers: int = 0
    piece_size: int = 8
    candidate_alpha: float = 0.01
    max_density: float = 0.8
    compute_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.alpha is None:
            object.__setattr__(self, "alpha", PIECES_ALPHA if self.piece_size else WHOLE_ALPHA)
        for name in ("alpha", "candidate_alpha", "max_density"):
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 <= value <= 1.0:
                raise ValueError(f"flashprefill: {name} must be a number in [0, 1], not {value!r}")
        for name, least in _INTEGER_OPTIONS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_INTEGER:
                raise ValueError(f"flashprefill: {name} must be an integer in [{least}, {MAX_INTEGER}], not {value!r}")
        if self.block_size != BLOCK_SIZE:
            raise ValueError(f"flashprefill: block_size must be {BLOCK_SIZE}, not {self.block_size}")
        if self.piece_size not in PIECE_SIZES:
            raise ValueError(f"flashprefill: piece_size must be one of {PIECE_SIZES}, not {self.piece_size}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"flashprefill: compute_dtype must be one of {COMPUTE_DTYPES}, not {self.compute_dtype!r}")

    @property
    def num_pieces(self) -> int:
        """Pieces of a block; 0 where blocks are scored whole."""
        return self.block_size // self.piece_size if self.piece_size else 0

    @classmethod
    def from_options(cls, *sources: Mapping[str, Any]) -> FlashPrefillConfig:
        """A config from option mappings, an earlier one winning over a later one.

        Raises:
            ValueError: an unknown option, a wrong type or a value out of range.
        """
        merged: dict[str, Any] = {}
        for source in reversed(sources):
            for name in source:
                if name in DROPPED_OPTIONS:
                    raise ValueError(f"flashprefill: {name} is no option any more: {DROPPED_OPTIONS[name]}")
                if name not in OPTIONS:
                    raise ValueError(f"flashprefill: unknown option {name!r}{_suggest(name, OPTIONS)}")
            if "alpha" in source and source["alpha"] is None:
                raise ValueError("flashprefill: alpha must be a number in [0, 1], not None")
            merged.update(source)
        return cls(**merged)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> FlashPrefillConfig:
        """A config from ``FLASHPREFILL_*`` variables, then options given in code, then defaults.

        Raises:
            ValueError: an unknown variable or option, a wrong type or a value out of range.
        """
        return cls.from_options(env_options(environ), code_options(environ))

    @classmethod
    def from_vllm(
        cls, vllm_config: Any, environ: Mapping[str, str] = os.environ, *, first: Mapping[str, Any] | None = None
    ) -> FlashPrefillConfig:
        """The config of an engine, from all five sources.

        Args:
            vllm_config: a ``vllm.config.VllmConfig``.
            first: options that win over all sources.

        Raises:
            ValueError: an unknown variable or option, a wrong type or a value out of range.
        """
        preset = _preset(vllm_config)
        additional = getattr(vllm_config, "additional_config", None) or {}
        if isinstance(additional, Mapping):
            _check_additional_keys(additional)
        options = additional.get(ADDITIONAL_CONFIG_KEY, {}) if isinstance(additional, Mapping) else {}
        if not isinstance(options, Mapping):
            raise ValueError(
                f"flashprefill: additional_config[{ADDITIONAL_CONFIG_KEY!r}] must be an object of options, "
                f"not {options!r}"
            )
        length = getattr(getattr(vllm_config, "model_config", None), "max_model_len", None)
        by_length = {"piece_size": 16} if isinstance(length, int) and length > LONG_SEQUENCE else {}
        given = first or {}, options, env_options(environ), code_options(environ)
        return cls.from_options(*given, preset_beside(preset, *given), by_length)


_INTEGER_OPTIONS = {
    "block_size": 1,
    "num_sink_blocks": 0,
    "num_window_blocks": 1,
    "num_dense_tail_blocks": 0,
    "min_append_tokens": 0,
    "min_sparse_tokens": 0,
    "num_dense_layers": 0,
    "piece_size": 0,
}
# Those of the others that are no numbers.
TEXT_OPTIONS = ("compute_dtype",)
DROPPED_OPTIONS = {
    "min_share": "it lost the facts of long prompts; use alpha, with piece_size 8 (docs/scores.md)",
    "piece_score": "blocks are scored by row now; leave it out, and alpha too, whose scale is another (docs/scores.md)",
}
OPTIONS = tuple(field.name for field in dataclasses.fields(FlashPrefillConfig))
# All environment variables that mean something here.
VARIABLES = (ENV_ENABLE, *sorted(_ENV_RESERVED), *(ENV_PREFIX + name.upper() for name in OPTIONS))


def enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``FLASHPREFILL`` asks for the backend.

    Raises:
        ValueError: it is neither unset, empty, 0 nor 1.
    """
    return _switch(ENV_ENABLE, environ)


def strict(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``FLASHPREFILL_STRICT`` asks for an error where vLLM is not as expected, in place of dense attention.

    Raises:
        ValueError: it is neither unset, empty, 0 nor 1.
    """
    return _switch(ENV_STRICT, environ)


def _switch(name: str, environ: Mapping[str, str]) -> bool:
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"flashprefill: {name} must be 0 or 1, not {value!r}")
    return value == "1"


def log_interval(environ: Mapping[str, str] = os.environ) -> float | None:
    """Seconds between two log lines of the statistics, None for no log; ``FLASHPREFILL_LOG_STATS=1`` is 10 s.

    Raises:
        ValueError: not a positive number of seconds.
    """
    value = environ.get(ENV_LOG_STATS, "")
    if value in ("", "0"):
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"flashprefill: {ENV_LOG_STATS} must be 0, 1 or a number of seconds, not {value!r}")
    return 10.0 if value == "1" else seconds


def env_options(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The options that ``FLASHPREFILL_*`` variables name.

    Raises:
        ValueError: an unknown variable, or a value that is not a number where the option is one.
    """
    options: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(ENV_PREFIX) or name in _ENV_RESERVED or _ENV_KUBERNETES.fullmatch(name):
            continue
        option = name.removeprefix(ENV_PREFIX).lower()
        if option in DROPPED_OPTIONS:
            raise ValueError(f"flashprefill: {name} is no option any more: {DROPPED_OPTIONS[option]}")
        if option not in OPTIONS:
            known = [ENV_PREFIX + known.upper() for known in OPTIONS] + sorted(_ENV_RESERVED)
            raise ValueError(f"flashprefill: unknown environment variable {name}{_suggest(name, known)}")
        kind = str if option in TEXT_OPTIONS else int if option in _INTEGER_OPTIONS else float
        try:
            options[option] = kind(text)
        except ValueError:
            noun = "an integer" if kind is int else "a number"
            raise ValueError(f"flashprefill: {name} must be {noun}, not {text!r}") from None
    return options


def code_options(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The options given in code, by this process or the one that started it.

    Raises:
        ValueError: the variable that carries them holds something else.
    """
    text = environ.get(ENV_CODE_OPTIONS) or "{}"
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"flashprefill: {ENV_CODE_OPTIONS} must be a JSON object of options, not {text!r}")
    return options


def preset(model_type: str | None, head_size: int | None) -> Mapping[str, Any]:
    """The preset of a model family, or of its text part; empty if it has none for this head size."""
    return PRESETS_BY_HEAD_SIZE.get(head_size, {}).get((model_type or "").removesuffix("_text"), {})


def preset_beside(preset: Mapping[str, Any], *options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a preset says beside options, the first of which wins: nothing with pieces, for which its alpha is not.

    Where alpha alone is given, it is for pieces whatever the model.
    """
    piece_size = next((source["piece_size"] for source in options if "piece_size" in source), None)
    if piece_size is None and not any("alpha" in source for source in options):
        piece_size = preset.get("piece_size")
    return preset if piece_size == 0 else {}


def _preset(vllm_config: Any) -> Mapping[str, Any]:
    """The preset of an engine's model; empty if it has none, or a config that does not say what is asked of it."""
    try:
        hf_config = vllm_config.model_config.hf_config
        text_config = getattr(hf_config, "text_config", None) or hf_config
        head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
        return preset(hf_config.model_type, head_size)
    except Exception:
        # A model's config may hold anything, code of its author included.
        return {}


def _check_additional_keys(additional: Mapping[str, Any]) -> None:
    """Raise ValueError for a key next to ours, or an option of ours outside it; others are other plugins'."""
    right = f'additional_config takes these options as {{"{ADDITIONAL_CONFIG_KEY}": {{...}}}}'
    for key in additional:
        if key == ADDITIONAL_CONFIG_KEY:
            continue
        plain = re.sub("[^a-z]", "", str(key).lower())
        # Two letters more or less: flash_mla_prefill is something else.
        near = abs(len(plain) - len(ADDITIONAL_CONFIG_KEY)) <= 2
        misspelt = near and difflib.get_close_matches(plain, [ADDITIONAL_CONFIG_KEY], cutoff=0.85)
        if ADDITIONAL_CONFIG_KEY in plain or misspelt:
            raise ValueError(f"flashprefill: unknown key {key!r}; did you mean {ADDITIONAL_CONFIG_KEY!r}? {right}")
        # Another plugin may well have an alpha or a block_size.
        if "_" in str(key) and key in OPTIONS and key != "block_size":
            raise ValueError(f"flashprefill: {key!r} is outside {ADDITIONAL_CONFIG_KEY!r}; {right}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _suggest(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
