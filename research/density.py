"""What share of the blocks selection keeps of a real model's layers, on files of research.capture_qkv.

    python -m research.density /tmp/docs.pt --model SmolLM2-135M --text docs --lengths 4096 7500
    python -m research.density /tmp/docs.pt --model SmolLM2-135M --text docs --lengths 4096 --options '{"alpha": 0.6}'

Selects as the CPU engine does, for the first tokens of the captured text as for a prompt of that length, and appends a
row for each length to results/density.csv. Dense tails are in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tools.rows import RESULTS, append_row, commit_name
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.cpu.block_select import block_select_cpu


def density(layers: Mapping[int, Mapping[str, Any]], length: int, config: FlashPrefillConfig) -> float:
    """The share of the visible blocks of some layers that are kept of a prompt of the first `length` tokens.

    Args:
        layers: by number, "q" [T, H, D] and "k" [T, G, D] of at least so many tokens, and "softmax_scale".
    """
    kept = visible = 0
    for layer in layers.values():
        q, k = layer["q"][:length], layer["k"][:length]
        mask = block_select_cpu(q, k, prompt_len=length, config=config, softmax_scale=layer["softmax_scale"])
        kept += int(mask.sum())
        visible += int(torch.ones_like(mask).tril().sum())
    return kept / visible


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="of research.capture_qkv")
    parser.add_argument("--model", required=True, help="what rows call the model")
    parser.add_argument("--text", required=True, help="what they call the text")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens of prompts")
    parser.add_argument("--options", type=json.loads, default={}, help="of FlashPrefill, as a JSON object")
    parser.add_argument("--commit", help="what rows say of the checkout (default: $COMMIT, or git's)")
    parser.add_argument("--csv", type=Path, default=RESULTS / "density.csv", help="default: results/density.csv")
    arguments = parser.parse_args()
    try:
        config = FlashPrefillConfig.from_options(arguments.options)
    except ValueError as error:
        parser.error(str(error))
    layers = torch.load(arguments.file)
    captured = min(len(layer["q"]) for layer in layers.values())
    if max(arguments.lengths) > captured:
        parser.error(f"--lengths: {arguments.file} has {captured} tokens")
    shapes = {(*layer["q"].shape[1:], layer["k"].shape[1]) for layer in layers.values()}
    heads = " ".join(f"{num}/{kv} of {size}" for num, size, kv in sorted(shapes))
    commit = commit_name(arguments.commit)
    for length in arguments.lengths:
        row = dict(
            date=datetime.date.today().isoformat(),
            commit=commit,
            model=arguments.model,
            text=arguments.text,
            heads=heads,
            layers=len(layers),
            tokens=length,
            alpha=config.alpha,
            piece_size=config.piece_size,
            density=round(density(layers, length, config), 4),
        )
        append_row(arguments.csv, row)
        print({key: row[key] for key in list(row)[2:]}, flush=True)


if __name__ == "__main__":
    main()
