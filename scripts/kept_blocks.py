"""A picture of the key blocks that some heads keep of a prompt: one forward in transformers, drawn with matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.real_model import Attention, load_weights
from vllm_flashprefill.reference import select_blocks_ref

NUM_HEADS = 8

# (layer, head) to [query blocks, key blocks] bool, what that head keeps.
Kept = dict[tuple[int, int], torch.Tensor]


class RecordingAttention(Attention):
    """Sparse attention that keeps what one head of some layers selects.

    Attributes:
        heads: the head of each of those layers.
        kept: what they kept, after a forward over a whole prompt.
    """

    def __init__(self, config: FlashPrefillConfig) -> None:
        super().__init__(config)
        self.heads: dict[int, int] = {}
        self.kept: Kept = {}

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        head = self.heads.get(module.layer_idx)
        if head is not None:
            kv_head = head * key.shape[1] // query.shape[1]
            (self.kept[module.layer_idx, head],) = select_blocks_ref(
                query[0, head, :, None],
                key[0, kv_head, :, None],
                context_len=0,
                prompt_len=key.shape[2],
                config=self.config,
                softmax_scale=scaling,
            )
        return super().__call__(module, query, key, value, attention_mask, scaling, **kwargs)


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


@torch.no_grad()
def kept_blocks(model: str, tokens: Sequence[int], config: FlashPrefillConfig) -> Kept:
    """What heads keep of a prompt, one in each of up to eight of the layers that can be sparse.

    Args:
        model: folder of transformers. tokens: the whole prompt.
        config: of the engine; its `min_sparse_tokens` and `max_density` do not matter here.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = RecordingAttention(config)
    transformer = load_weights(model, attention, device)
    attention.heads = heads_to_show(transformer.config, config.num_dense_layers)
    transformer(torch.tensor([tokens], device=device), use_cache=False, logits_to_keep=1)
    return {place: kept.cpu() for place, kept in attention.kept.items()}


def heads_to_show(model_config: Any, num_dense_layers: int = 0) -> dict[int, int]:
    """A head of each of up to eight layers with full attention, spread over the model and its heads."""
    kinds = getattr(model_config, "layer_types", None) or ["full_attention"] * model_config.num_hidden_layers
    layers = [n for n, kind in enumerate(kinds) if kind == "full_attention" and n >= num_dense_layers]
    shown = [layers[n * len(layers) // NUM_HEADS] for n in range(NUM_HEADS)] if len(layers) > NUM_HEADS else layers
    return {layer: (3 * n) % model_config.num_attention_heads for n, layer in enumerate(shown)}


def draw(kept: Kept, title: str, file: Path) -> None:
    """Write a PNG; needs matplotlib."""
    from matplotlib.figure import Figure

    columns = min(len(kept), 4)
    rows = -(-len(kept) // columns)
    figure = Figure(figsize=(3 * columns, 3.3 * rows + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(kept) :]:
        axis.set_axis_off()
    for axis, ((layer, head), mask) in zip(axes.flat, kept.items(), strict=False):
        visible = torch.ones_like(mask).tril()
        # 0 after the query, 1 dropped, 2 kept.
        axis.imshow((visible.int() + mask.int()).numpy(), cmap="Blues", vmin=0, vmax=2, interpolation="nearest")
        axis.set_title(f"layer {layer}, head {head}: {mask.sum() / visible.sum():.0%}", fontsize=9)
        axis.set_xlabel("key block", fontsize=8)
        axis.set_ylabel("query block", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.suptitle(f"{title}: blocks kept (dark) and dropped (light)", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
