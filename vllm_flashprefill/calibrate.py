"""Find alpha for a target density or a target loss on a text of yours; write it as options.

    python -m vllm_flashprefill.calibrate MODEL --text FILE --length 8000 --density 0.46 --out preset.json
    python -m vllm_flashprefill.calibrate MODEL --text FILE --length 8000 --loss 0.01 --options '{"piece_size": 0}'
    vllm serve MODEL --additional-config "$(cat preset.json)"

Runs the model in transformers, without vLLM, on the text's first tokens, once dense and once for each value tried. The
density is that of the prompt, over the layers that are not always dense. The loss is how far the next tokens move from
dense attention's: their mean divergence KL(dense, sparse) in nats, over the last tokens before the dense tail; the
perplexity of the text there is printed beside it. Both depend on the length: take that of your prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_flashprefill.config import ADDITIONAL_CONFIG_KEY, FlashPrefillConfig
from vllm_flashprefill.real_model import Attention, encode_text, load_tokenizer, load_weights, open_text

# Alphas searched, from keeping next to everything to next to nothing.
RANGE = (1e-5, 1.0)
# How far a density may be from the target, and how far a loss may fall short of it, as shares of the target.
DENSITY_TOLERANCE, LOSS_SHORT = 0.01, 0.1
# Parts of the first pass from which its time is known, and seconds between two lines where there is no bar.
TIMED_PARTS, LINE_SECONDS = 3, 20
BAR = "{percentage:3.0f}% {bar} {elapsed}, at most {remaining} more"


@dataclasses.dataclass(frozen=True)
class Result:
    """What one config did. loss: KL(dense, sparse); agreement: share of dense attention's most likely next tokens."""

    density: float
    loss: float
    agreement: float
    perplexity: float

    def __str__(self) -> str:
        return (
            f"density {self.density:.1%}, loss {self.loss:.5f}, agreement {self.agreement:.1%}, "
            f"perplexity {self.perplexity:.4f}"
        )


class Text:
    """A model and a text, whose `last` tokens before `end` are judged."""

    def __init__(self, model: str, text: str, length: int, *, start: int = 0, last: int, end: int, device: str) -> None:
        self.attention = Attention()
        # First what says whether the text is long enough.
        tokens = encode_text(load_tokenizer(model), text, length, start)
        self.model = load_weights(model, self.attention, device)
        self.tokens = torch.tensor([tokens], device=device)
        # The logits at one position are of the next token.
        self.judged = torch.arange(end - last - 1, end - 1, device=device)
        self.right = self.tokens[0, self.judged + 1][:, None]
        # Layers and attention modules tell transformers' caches which layer they are.
        self.parts = [module for module in self.model.modules() if hasattr(module, "layer_idx")]
        self.dense: torch.Tensor | None = None

    def measure(self, config: FlashPrefillConfig | None, bar: Progress | None = None) -> Result:
        """What the model makes of the text with a config, None for dense attention, which has to come first."""
        self.attention.use(config)

        def count(*_: Any) -> None:
            bar.update()

        hooks = [part.register_forward_hook(count) for part in self.parts if bar is not None]
        logits = self.model(self.tokens, use_cache=False, logits_to_keep=self.judged).logits[0]
        for hook in hooks:
            hook.remove()
        sparse = logits.float().log_softmax(dim=-1)
        if config is None:
            self.dense = sparse
        dense = self.dense
        return Result(
            density=self.attention.density,
            loss=float((dense.exp() * (dense - sparse)).sum(dim=-1).mean()),
            agreement=float((sparse.argmax(dim=-1) == dense.argmax(dim=-1)).float().mean()),
            perplexity=float(sparse.gather(1, self.right).mean().neg().exp()),
        )


def search(
    measure: Callable[[float], Result],
    low: float,
    high: float,
    *,
    density: float | None = None,
    loss: float | None = None,
    passes: int,
) -> tuple[float, Result]:
    """The value between low and high that fits, and its result, by interpolation over the value's logarithm.

    Args:
        measure: what a value does; a larger one prunes more.
        density, loss: one of them; the density to come near to, the loss not to exceed.

    Raises:
        SystemExit: no value tried fits.
    """
    # At the ends: the logarithm, and by how much its result may prune more, or less; not known before it is tried.
    ends = [[math.log(low), None], [math.log(high), None]]
    best = None
    for _ in range(passes):
        (left, above), (right, below) = ends
        share = 0.5 if above is None or below is None else min(max(above / (above - below), 0.1), 0.9)
        value = float(f"{math.exp(left + share * (right - left)):.4g}")
        result = measure(value)
        if density is not None:
            more, tolerance = result.density - density, DENSITY_TOLERANCE * density
        else:
            more, tolerance = (1 - LOSS_SHORT / 2) * loss - result.loss, LOSS_SHORT / 2 * loss
            if result.loss <= loss and (best is None or value > best[0]):
                best = value, result
        if abs(more) <= tolerance:
            return value, result
        ends[0 if more > 0 else 1] = [math.log(value), more]
    if best is None:
        raise SystemExit(f"not reached in {passes} passes; the last one tried, {value}: {result}")
    return best


class Progress:
    """How far the passes are: a bar on a terminal. On the CPU also how long they will take, and without a terminal a
    line now and then.

    Args:
        passes: how many there will be at most. parts: parts of the model that each of them goes through.
    """

    def __init__(self, passes: int, parts: int, device: str) -> None:
        self.passes, self.parts, self.on_cpu, self.done = passes, parts, torch.device(device).type == "cpu", 0
        self.bar = tqdm(total=passes * parts, bar_format=BAR, disable=None)
        self.first_at = self.said_at = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def update(self) -> None:
        """One part more is done."""
        self.bar.update()
        self.done += 1
        if not self.on_cpu:
            return
        now = time.monotonic()
        if self.done == 1:
            self.first_at = now
        elif self.done == TIMED_PARTS:
            one = (now - self.first_at) / (TIMED_PARTS - 1) * self.parts
            times = tqdm.format_interval(one), tqdm.format_interval(one * self.passes)
            say(f"on the CPU: a pass takes about {times[0]}, all {self.passes} at most {times[1]}")
        elif self.bar.disable and now - self.said_at >= LINE_SECONDS:
            left = (now - self.first_at) / (self.done - 1) * (self.passes * self.parts - self.done)
            say(f"pass {-(-self.done // self.parts)} of {self.passes}: at most {tqdm.format_interval(left)} more")
        else:
            return
        self.said_at = now


def say(line: str) -> None:
    """Print a line above the bar, at once where the output is a file too."""
    tqdm.write(line)
    sys.stdout.flush()


def options_json(config: FlashPrefillConfig, names: list[str]) -> str:
    """Options as vLLM's --additional-config takes them; what is under its one key is for `from_options`."""
    return json.dumps({ADDITIONAL_CONFIG_KEY: {name: getattr(config, name) for name in names}})


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder or GGUF file")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--density", type=float, help="share of blocks to keep, within a hundredth of it")
    target.add_argument("--loss", type=float, help="most that next tokens may diverge from dense attention's, in nats")
    parser.add_argument("--text", default="docs", help='a file; or "docs", "code" of Python itself (default: docs)')
    parser.add_argument("--start", type=int, default=0, help="tokens of it to leave out (default: %(default)s)")
    parser.add_argument("--length", type=int, default=8000, help="tokens to take (default: %(default)s)")
    parser.add_argument("--last", type=int, default=512, help="tokens to judge (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU's")
    parser.add_argument("--options", type=json.loads, default={}, help="others than alpha, as a JSON object")
    parser.add_argument("--passes", type=int, default=12, help="values to try at most (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file to write the options to")
    options = parser.parse_args()
    if "alpha" in options.options:
        parser.error("--options is for others than alpha, which is to be found")
    try:
        config = FlashPrefillConfig.from_options(options.options)
    except ValueError as error:
        parser.error(str(error))
    if config.compute_dtype != "auto":
        parser.error("compute_dtype is for KV caches in e4m3, as vLLM has them; add it to what is found")
    blocks = -(-options.length // config.block_size)
    end = min(options.length, (blocks - config.num_dense_tail_blocks) * config.block_size)
    if options.length < config.min_sparse_tokens:
        parser.error(f"prompts of under {config.min_sparse_tokens} tokens are dense (min_sparse_tokens)")
    if end <= options.last:
        parser.error(f"only {end} tokens come before the dense tail, fewer than --last {options.last} and one")

    try:
        open_text(options.text).close()
    except OSError as error:
        parser.error(f"--text {options.text}: {error.strerror}")
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: there is no such folder")
    wanted = {name: getattr(options, name) for name in ("model", "text", "length", "start", "last", "device")}
    text = Text(**wanted, end=end)
    with Progress(options.passes + 1, len(text.parts), options.device) as bar:

        def measure(value: float) -> Result:
            result = text.measure(dataclasses.replace(config, alpha=value), bar)
            say(f"alpha {value:.4g}: {result}")
            return result

        say(f"dense: perplexity {text.measure(None, bar).perplexity:.4f}")
        value, result = search(measure, *RANGE, density=options.density, loss=options.loss, passes=options.passes)
    names = dict.fromkeys(["alpha", "piece_size", *options.options])
    line = options_json(dataclasses.replace(config, alpha=value), list(names))
    print(f"alpha {value}: {result}\n{line}")
    if options.out:
        options.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
