"""The name that configs and models get in place of "flashprefill", which is an alias of it.

Code that asks for "flash" in an implementation's name takes ours for FlashAttention. The kinds there are:

- transformers 4: text encoders of SigLIP and SigLIP 2 hand on the mask of tokens, [batch, T], which sdpa cannot apply.
- transformers 5, `utils.generic.is_flash_attention_requested`: the name is fetched as a kernel from the hub; vision
  towers pass packed sequences; chunked attention and static caches get no mask; SAM 3 falls back, and the config of HRM
  refuses the alias, wherever it comes from: give it the other name.
- models' own code on the hub may do any of these.

Targets: the property `PretrainedConfig._attn_implementation`, by which names are kept and looked up, and
`PreTrainedModel.set_attn_implementation`, which looks at a name before it is kept. How: both are wrapped to be given
the other name. It can go when transformers, and models' own code, ask for FlashAttention's own names.
"""

from __future__ import annotations

import functools
from typing import Any

NAME = "flashprefill"
CONFIG_NAME = "sparse_prefill"

_originals: list[tuple[type, str, Any]] = []


def in_configs(requested: Any) -> Any:
    """The name that was asked for, or a dict of them by part of the model, as configs have it."""
    if isinstance(requested, dict):
        return {part: in_configs(name) for part, name in requested.items()}
    return CONFIG_NAME if requested == NAME else requested


def install() -> None:
    """Raises RuntimeError where transformers has no such property or method."""
    from transformers import PretrainedConfig, PreTrainedModel, __version__

    targets = ((PretrainedConfig, "_attn_implementation"), (PreTrainedModel, "set_attn_implementation"))
    for owner, name in targets:
        if name not in vars(owner):
            raise RuntimeError(f"transformers {__version__} has no {owner.__name__}.{name} for flashprefill to wrap")
    _originals.extend((owner, name, vars(owner)[name]) for owner, name in targets)
    kept, set_ = (original for *_, original in _originals)

    @functools.wraps(set_)
    def set_attn_implementation(model: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        return set_(model, in_configs(attn_implementation), *args, **kwargs)

    PretrainedConfig._attn_implementation = property(
        lambda config: in_configs(kept.fget(config)), lambda config, name: kept.fset(config, in_configs(name))
    )
    PreTrainedModel.set_attn_implementation = set_attn_implementation


def remove() -> None:
    while _originals:
        setattr(*_originals.pop())
