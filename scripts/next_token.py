"""How far some settings move a model's next tokens on a real text, against dense attention.

For each setting: the density, the mean divergence KL(dense, sparse) of the next token in nats (loss), the share of
tokens whose most likely successor is dense attention's (agreement), and the perplexity of the text there. Judged are
the text's last tokens; num_dense_tail_blocks is 0 unless a setting names it, since it is there that they lie.

    python scripts/next_token.py '{"alpha": 0.18}' '{"min_share": 0.001}'
"""

from __future__ import annotations

import argparse
import json

import torch
from calibrate import Text
from generate import MODEL

from vllm_flashprefill.config import FlashPrefillConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("settings", nargs="+", help="options as JSON objects")
    parser.add_argument("--model", default=str(MODEL), help="model folder or GGUF file (default: %(default)s)")
    Text.add_arguments(parser, length=7500)
    options = parser.parse_args()
    settings = {
        text: FlashPrefillConfig.from_options(json.loads(text), {"num_dense_tail_blocks": 0})
        for text in options.settings
    }

    text = Text.of_arguments(options, end=options.length)
    print(f"dense: perplexity {text.measure(None).perplexity:.4f}", flush=True)
    for name, config in settings.items():
        print(f"{name}: {text.measure(config)}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
