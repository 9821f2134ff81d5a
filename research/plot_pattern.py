"""Draw which key blocks heads keep: sinks, window, verticals, slashes, single blocks, from captured queries and keys.

python -m research.capture_qkv --out /tmp/docs.pt
python -m research.plot_pattern /tmp/docs.pt --heads 11.0 11.4 --alpha 0.05 --out pattern.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from scripts.kept_blocks import draw
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.reference import select_blocks_ref


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="from research/capture_qkv.py")
    parser.add_argument("--heads", nargs="+", help="LAYER.HEAD each (default: the first head of each layer)")
    parser.add_argument("--alpha", type=float, default=0.05, help="(default: %(default)s)")
    parser.add_argument("--out", required=True, help="picture to write")
    options = parser.parse_args()

    captured = torch.load(options.file)
    heads = [tuple(map(int, name.split("."))) for name in options.heads or [f"{layer}.0" for layer in captured]]
    config = FlashPrefillConfig(alpha=options.alpha, piece_size=0)
    masks = {}
    for layer in {layer for layer, _ in heads}:
        q, k = captured[layer]["q"], captured[layer]["k"]
        masks[layer] = select_blocks_ref(
            q, k, context_len=0, prompt_len=len(k), config=config, softmax_scale=captured[layer]["softmax_scale"]
        )

    kept = {(layer, head): masks[layer][head] for layer, head in heads}
    draw(kept, f"alpha {options.alpha}", Path(options.out))


if __name__ == "__main__":
    main()
