"""Draw which key blocks heads keep: sinks, window, verticals, slashes, single blocks, from captured queries and keys.

python -m research.capture_qkv --out /tmp/docs.pt
python -m research.plot_pattern /tmp/docs.pt --heads 11.0 11.4 --alpha 0.05 --out pattern.png
"""

from __future__ import annotations

import argparse

import torch

from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.reference import select_blocks_ref


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="from research/capture_qkv.py")
    parser.add_argument("--heads", nargs="+", help="LAYER.HEAD each (default: the first head of each layer)")
    parser.add_argument("--alpha", type=float, default=0.05, help="(default: %(default)s)")
    parser.add_argument("--out", required=True, help="picture to write")
    options = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    captured = torch.load(options.file)
    heads = [tuple(map(int, name.split("."))) for name in options.heads or [f"{layer}.0" for layer in captured]]
    config = FlashPrefillConfig(alpha=options.alpha, piece_size=0)
    masks = {}
    for layer in {layer for layer, _ in heads}:
        q, k = captured[layer]["q"], captured[layer]["k"]
        masks[layer] = select_blocks_ref(
            q, k, context_len=0, prompt_len=len(k), config=config, softmax_scale=captured[layer]["softmax_scale"]
        )

    columns = min(len(heads), 4)
    figure, axes = plt.subplots(
        -(-len(heads) // columns), columns, squeeze=False, figsize=(3 * columns, 3.3 * -(-len(heads) // columns))
    )
    for axis in axes.flat[len(heads) :]:
        axis.set_axis_off()
    for axis, (layer, head) in zip(axes.flat, heads, strict=False):
        mask = masks[layer][head]
        visible = torch.ones_like(mask).tril()
        # 0 after the query, 1 pruned, 2 kept
        axis.imshow(visible.int() + mask.int(), cmap="Blues", vmin=0, vmax=2, interpolation="nearest")
        axis.set_title(f"layer {layer}, head {head}: {mask.sum() / visible.sum():.0%}", fontsize=9)
        axis.set_xlabel("key block", fontsize=8)
        axis.set_ylabel("query block", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.suptitle(f"key blocks kept (dark), pruned (light), alpha {options.alpha}", fontsize=10)
    figure.tight_layout()
    figure.savefig(options.out, dpi=90)


if __name__ == "__main__":
    main()
