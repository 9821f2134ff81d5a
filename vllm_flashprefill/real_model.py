"""A transformers model on real texts, for what measures there: this package's attention, without vLLM."""

from __future__ import annotations

import ast
import dataclasses
import io
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from vllm_flashprefill.api import flash_prefill
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.device import is_slow_in_bfloat16

CODE = ("zipfile", "tarfile", "subprocess")
# Lines of the source are read from here on, so that a text does not begin with a licence.
FIRST_LINE = 60
# Tokens at the end of a text that may be others where it goes on.
UNSETTLED = 32


def source_of(module: str) -> str:
    """The source of a module of Python's library, which is not imported.

    Raises:
        RuntimeError: this Python comes without it.
    """
    base = Path(sysconfig.get_path("stdlib"), *module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            return path.read_text(encoding="utf-8")
    raise RuntimeError(f"this Python has no source of {module} to make long texts from")


def read_text(name: str) -> str:
    """All of `open_text`."""
    with open_text(name) as text:
        return text.read()


def open_text(name: str) -> TextIO:
    """A file, or a text of Python's library: "docs", what modules say of themselves, or "code", their source.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    if name not in ("docs", "code"):
        return Path(name).open(encoding="utf-8", errors="replace")
    if name == "code":
        lines = (source_of(module).splitlines(keepends=True)[FIRST_LINE:] for module in CODE)
        return io.StringIO("\n".join(map("".join, lines)))
    parts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        described = [tree, *(node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef)))]
        docs = [ast.get_docstring(node) or "" for node in described]
        parts += [doc for doc in docs if len(doc) > 200]
    return io.StringIO("\n\n".join(parts))


def encode_text(tokenizer: Any, name: str, length: int, start: int = 0) -> list[int]:
    """`length` tokens of a text from `start` on; exits where it has fewer."""
    needed = start + length
    with open_text(name) as file:
        # Mostly more than enough, but lines of spaces or signs have more characters a token.
        text = file.read(12 * needed)
        while True:
            tokens = tokenizer.encode(text, add_special_tokens=False)
            if len(tokens) >= needed + UNSETTLED or not (more := file.read(len(text))):
                break
            text += more
    tokens = tokens[start:needed]
    if len(tokens) < length:
        raise SystemExit(f"{name}: only {len(tokens)} tokens from {start} on, not {length}")
    return tokens


def load_model(name: str, attention: Callable[..., Any], device: str = "cpu") -> tuple[Any, Any]:
    """The model and tokenizer of a folder or of a GGUF file, its layers calling `attention`.

    In bfloat16, or in float32 where that is much quicker.
    """
    return load_weights(name, attention, device), load_tokenizer(name)


def load_weights(name: str, attention: Callable[..., Any], device: str = "cpu") -> Any:
    """The model of `load_model` alone."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    folder, where = _place(name)
    dtype = torch.float32 if is_slow_in_bfloat16(device) else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype, **where).eval().to(device)
    # A name that transformers does not know gets no masks.
    ALL_ATTENTION_FUNCTIONS["measured"] = attention
    model.set_attn_implementation("measured")
    return model


def load_tokenizer(name: str) -> Any:
    """The tokenizer of `load_model` alone."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    folder, where = _place(name)
    return AutoTokenizer.from_pretrained(folder, **where)


def _place(name: str) -> tuple[str, dict[str, str]]:
    path = Path(name)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(path), {})


def dense_attention(query, key, value, scaling, sliding_window=None, **kwargs):
    """Causal attention of the last tokens, [batch, heads, tokens, D] to [batch, tokens, heads, D].

    Raises:
        NotImplementedError: a layer with softcap or sinks.
    """
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux")):
        raise NotImplementedError("layers with softcap or sinks")
    num_tokens, seq_len = query.shape[2], key.shape[2]
    mask: dict[str, Any] = {"is_causal": True}
    if num_tokens < seq_len or (sliding_window is not None and sliding_window < seq_len):
        seen = torch.ones(num_tokens, seq_len, dtype=torch.bool, device=query.device).tril(seq_len - num_tokens)
        if sliding_window is not None:
            seen = seen.triu(seq_len - num_tokens - sliding_window + 1)
        mask = {"attn_mask": seen}
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True, **mask)
    return out.transpose(1, 2).contiguous()


@dataclasses.dataclass
class Attention:
    """An attention function for transformers; dense where there is no config, in layers with a sliding window, in the
    first num_dense_layers and for steps under a block.

    Attributes:
        prompt_len: tokens of the whole prompt; those of the step and before it if 0.
        kept_blocks, visible_blocks: of all sparse calls.
    """

    config: FlashPrefillConfig | None = None
    prompt_len: int = 0
    kept_blocks: int = 0
    visible_blocks: int = 0

    def use(self, config: FlashPrefillConfig | None) -> None:
        """Take another config, and count from 0."""
        self.config, self.kept_blocks, self.visible_blocks = config, 0, 0

    @property
    def density(self) -> float:
        return self.kept_blocks / self.visible_blocks if self.visible_blocks else 1.0

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        config, num_tokens = self.config, query.shape[2]
        if (
            config is None
            or kwargs.get("sliding_window") is not None
            or num_tokens < config.block_size
            or module.layer_idx < config.num_dense_layers
        ):
            return dense_attention(query, key, value, scaling, **kwargs), None
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        counts = torch.zeros(2, dtype=torch.int64, device=query.device)
        prompt_len = self.prompt_len or key.shape[2]
        out = flash_prefill(q, k, v, config=config, softmax_scale=scaling, prompt_len=prompt_len, block_counts=counts)
        kept, visible = counts.tolist()
        self.kept_blocks += kept
        self.visible_blocks += visible
        return out, None
