"""Save what a real model's attention layers are given on real text: queries, keys and values after rotation.

The texts are of Python's own library, by default stretches that the tests do not read: "docs"
is what its modules say of themselves, "code" is their source. One file holds one text.

    python -m research.capture_qkv --text docs --length 7500 --layers 1 6 11 16 21 26 --out /tmp/docs.pt
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from scripts.generate import MODEL
from vllm_flashprefill.real_model import dense_attention, encode_text, load_model


class Capture:
    """An attention function for transformers that keeps q [T, H, D], k and v [T, G, D] of some layers, all by default;
    of a sliding window's, none."""

    def __init__(self, layers: list[int] | None = None) -> None:
        self.layers = layers
        self.captured: dict[int, dict[str, Any]] = {}

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        if kwargs.get("sliding_window") is None and (self.layers is None or module.layer_idx in self.layers):
            q, k, v = (x[0].transpose(0, 1).clone() for x in (query, key, value))
            self.captured[module.layer_idx] = {"q": q, "k": k, "v": v, "softmax_scale": scaling}
        return dense_attention(query, key, value, scaling, **kwargs), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL), help="model folder or GGUF file (default: %(default)s)")
    parser.add_argument("--text", default="docs", help='"docs", "code" or a file (default: %(default)s)')
    parser.add_argument("--start", type=int, default=0, help="tokens of the text to leave out (default: %(default)s)")
    parser.add_argument("--length", type=int, default=7500, help="tokens (default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to save (default: all without a sliding window)")
    parser.add_argument("--out", required=True, help="file to write")
    options = parser.parse_args()

    attention = Capture(options.layers)
    model, tokenizer = load_model(options.model, attention)
    tokens = encode_text(tokenizer, options.text, options.length, options.start)
    model(torch.tensor([tokens]), use_cache=False, logits_to_keep=1)
    torch.save(attention.captured, options.out)
    print(f"{options.out}: {len(tokens)} tokens, layers {sorted(attention.captured)}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
