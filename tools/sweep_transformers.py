"""Every causal architecture of the installed transformers, tiny and random: "flashprefill" at alpha 0 against sdpa.

Or against eager, where sdpa is not there or where the two differ, as in a model that adds to a mask that sdpa has none
of. Prints a line an architecture and counts; ends with 1 where one fails, or fewer than `--at-least` pass.

    passed      layers were sparse, and the logits are the same
    dense       no layer was sparse, and the logits are the same; with the reasons
    unaware     the model calls no attention interface: nothing of it is FlashPrefill's
    refused     FlashPrefill refuses the model, with its reason
    unsupported the logits differ, of a model that transformers says supports eager alone, which it does not enforce
    failed      the logits differ, or FlashPrefill raises what the others do not
    not built   no tiny model could be made that runs without FlashPrefill: not tried

At alpha 1 almost everything is pruned: how far logits then are from the others' says what the comparison can see.

    python tools/sweep_transformers.py                    some minutes on a CPU
    python tools/sweep_transformers.py --only llama doge
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from vllm_flashprefill import hf

TOKENS = 400
# Relative, of logits in float32. Sums over blocks are taken in another order than sdpa's.
TOLERANCE = 1e-4
TOO_BIG = 50_000_000
# The first and last block are kept anyway, the others by their score; whole, since of random weights some row of a
# query block has its best piece in nearly every block.
OPTIONS = dict(min_sparse_tokens=0, num_sink_blocks=1, num_window_blocks=1, num_dense_tail_blocks=0, piece_size=0)

UNKNOWN = object()
OUTCOMES = ("passed", "dense", "unaware", "refused", "unsupported", "failed", "not built")

# Attributes of configs, by the small value they get.
SMALL = {
    100: "vocab_size text_vocab_size vocab_size_per_layer_input",
    64: "hidden_size d_model n_embd embed_dim dim embedding_size word_embed_proj_dim intermediate_size ffn_dim n_inner "
    "ffn_hidden_size encoder_ffn_dim decoder_ffn_dim d_ff dense_intermediate_size moe_intermediate_size "
    "shared_expert_intermediate_size shared_intermediate_size expert_intermediate_size intermediate_size_mlp lru_width "
    "moe_shared_expert_intermediate_size linear_num_value_dim",
    16: "head_dim rotary_dim v_head_dim kv_lora_rank q_lora_rank linear_key_head_dim linear_value_head_dim "
    "mamba_d_state state_size hidden_size_per_layer_input d_kv attention_head_dim index_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts num_query_heads linear_num_key_heads linear_num_value_heads",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_experts_per_tok moe_topk "
    "moe_top_k top_k_experts num_experts_per_token moe_k",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace",
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_key_value_groups")
SPECIAL_TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_sequence_length")
# Off by default where it is None, which a model's class does not take.
NEEDED = ("head_dim", "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "q_lora_rank")
# What the rules do not make of some models.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(encoder_hash_byte_group_vocab=100),
    "dbrx": dict(attn_config=dict(kv_n_heads=2), ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2)),
    "dory": dict(
        num_hidden_layers=3,
        n_input_layers=1,
        n_output_layers=1,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma3n_text": dict(num_kv_shared_layers=0),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["attention", "mamba"]),
    "jamba": dict(use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1),
    "mamba2": dict(num_heads=8),
    "mllama": dict(rope_scaling=dict(rope_type="default"), cross_attention_layers=[1]),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(use_mamba_kernels=False),
}


def known(config: Any, name: str) -> Any:
    """A config's attribute; UNKNOWN where it has none, or one for each layer."""
    try:
        return getattr(config, name)
    except Exception:
        return UNKNOWN


def small_config(config_class: type, overrides: dict[str, Any]) -> Any:
    """A config whose layers are one of each kind that the default config has, or two."""
    default = config_class()
    values: dict[str, Any] = {}
    for value, names in SMALL.items():
        for name in names.split():
            value_now = known(default, name)
            if isinstance(value_now, int) or (value_now is None and name in NEEDED):
                values[name] = value
    if known(default, "vocab_size") is not UNKNOWN:
        values.update({name: id_ for name, id_ in SPECIAL_TOKENS.items() if known(default, name) is not UNKNOWN})
    if "qk_rope_head_dim" in values and "head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]
    heads = next((known(default, name) for name in HEADS if isinstance(known(default, name), int)), None)
    for name in KV_HEADS:
        kv_heads = known(default, name)
        if kv_heads is not UNKNOWN:
            values[name] = 1 if kv_heads == 1 else 4 if kv_heads in (heads, None) else 2
    for name in POSITIONS:
        if isinstance(known(default, name), int) and 0 < known(default, name) < TOKENS:
            values[name] = TOKENS
    layers = next((known(default, name) for name in LAYERS if isinstance(known(default, name), int)), None)
    kinds = known(default, "layer_types")
    kinds = kinds if isinstance(kinds, (list, tuple)) else []
    picked = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    picked = picked if len(picked) > 1 else [0, 1]
    for name, value in vars(default).items():
        if isinstance(value, (list, tuple)) and layers is not None and len(value) == layers > 2:
            values[name] = [value[i] for i in picked]
    values.update({name: len(picked) for name in LAYERS if name in values})
    for name, sub_class in getattr(config_class, "sub_configs", {}).items():
        sub_class = sub_class if known(default, name) is None else type(known(default, name))
        if name not in overrides and sub_class is not transformers.AutoConfig:
            values[name] = small_config(sub_class, {}).to_dict()
    read_only = [name for name in values if getattr(getattr(config_class, name, None), "fset", 0) is None]
    return config_class(**{key: value for key, value in {**values, **overrides}.items() if key not in read_only})


def small_model(config_class: type, model_class: type, model_type: str, implementation: str) -> torch.nn.Module:
    config = small_config(getattr(model_class, "config_class", None) or config_class, OVERRIDES.get(model_type, {}))
    config._attn_implementation = implementation
    size = 0
    with torch.device("meta"), contextlib.suppress(NotImplementedError):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > TOO_BIG:
        raise ValueError(f"{size / 1e6:.0f}M parameters are left of it")
    torch.manual_seed(0)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            # Attention with the usual small weights is close to a mean of all values.
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return model


@torch.no_grad()
def run(model: torch.nn.Module, implementation: str, alpha: float = 0.0) -> tuple[torch.Tensor, Any]:
    """The logits, and what was counted."""
    hf.unregister()
    hf.register(alpha=alpha, **OPTIONS)
    model.set_attn_implementation(implementation)
    ids = torch.randint(3, 98, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    before = hf.stats()
    logits = model(input_ids=ids).logits.float()
    return logits, hf.stats() - before


def distance(x: torch.Tensor, expected: torch.Tensor) -> float:
    return ((x - expected).norm() / expected.norm()).item()


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:150]


def judge(config_class: type, model_class: type, model_type: str) -> tuple[str, str]:
    """An outcome and what led to it: of sdpa, or of eager where that is better."""
    judged = []
    for reference in ("sdpa", "eager"):
        try:
            model = small_model(config_class, model_class, model_type, reference)
            expected = run(model, reference)[0]
            if not expected.isfinite().all():
                raise ValueError("its logits are not finite")
        except Exception as error:
            judged.append(("not built", f"{reference}: {one_line(error)}"))
            continue
        judged.append(compare(model, expected, reference))
        if judged[-1][0] != "failed":
            break
    return min(reversed(judged), key=lambda outcome: OUTCOMES.index(outcome[0]))


def compare(model: torch.nn.Module, expected: torch.Tensor, reference: str) -> tuple[str, str]:
    try:
        logits, done = run(model, "flashprefill")
    except Exception as error:
        refused = isinstance(error, ValueError) and str(error).startswith("flashprefill:")
        return "refused" if refused else "failed", one_line(error)
    error = distance(logits, expected)
    what = f"{error:.1e} from {reference}"
    if done.dense_tokens:
        what += ", dense: " + ", ".join(f"{reason} {tokens}" for reason, tokens in done.dense_tokens.items())
    if not error <= TOLERANCE:
        supported = model._supports_sdpa or model._supports_attention_backend
        return "failed" if supported else "unsupported", what
    if done.sparse_tokens:
        return "passed", f"{what}; at alpha 1 {distance(run(model, 'flashprefill', 1.0)[0], expected):.1e}"
    return "dense" if done.dense_tokens else "unaware", what


def architectures(only: list[str]) -> Iterator[tuple[str, str]]:
    for model_type, names in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in names if isinstance(names, tuple) else (names,):
            if not only or model_type in only or name in only:
                yield model_type, name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="ARCHITECTURE")
    parser.add_argument("--at-least", type=int, default=0, help="architectures that have to pass")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    outcomes: Counter[str] = Counter()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {TOKENS} tokens")
    for model_type, name in architectures(args.only):
        try:
            config_class, model_class = transformers.CONFIG_MAPPING[model_type], getattr(transformers, name)
            outcome, what = judge(config_class, model_class, model_type)
        except Exception as error:
            outcome, what = "not built", one_line(error)
        outcomes[outcome] += 1
        print(f"{outcome:11} {name:36} {what}", flush=True)
    print(", ".join(f"{outcome} {outcomes[outcome]}" for outcome in OUTCOMES))
    return int(outcomes["failed"] > 0 or outcomes["passed"] < args.at_least)


if __name__ == "__main__":
    sys.exit(main())
