"""What FlashPrefill would do on this machine, and with a model: `python -m vllm_flashprefill --model MODEL`.

Prints versions, the device and the loader; with a model also its options, and of each layer whether it would be sparse
or why not. Further arguments are those of `vllm serve`. Exits with 1, after a line that says why, where FlashPrefill
would not run or nothing would be sparse. No weights are read, and no engine is started.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import logging
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_flashprefill import __version__
from vllm_flashprefill.config import ENV_ENABLE, FlashPrefillConfig, enabled, preset
from vllm_flashprefill.patches.versions import installed_vllm, loader_for

BESIDE = ("torch", "triton", "transformers")
# By one of these vLLM knows a model's folder.
CONFIG_FILES = ("config.json", "params.json")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_flashprefill",
        description=__doc__.split("\n")[0],
        epilog=__doc__.partition("\n\n")[2],
    )
    parser.add_argument("--model", help="folder or name, as of vllm serve")
    options, vllms_arguments = parser.parse_known_args(arguments)
    if vllms_arguments and options.model is None:
        parser.error(f"{vllms_arguments[0]} goes with --model")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        show_installation()
        if options.model is not None:
            show_model(options.model, vllms_arguments)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def show_installation() -> None:
    """Print what is installed here, and register for it.

    Raises:
        RuntimeError, ValueError: FlashPrefill would not run; and as of `registration.load`.
    """
    print(f"vllm-flashprefill {__version__}, Python {platform.python_version()}, {', '.join(map(version_of, BESIDE))}")
    is_on = enabled()
    with our_warnings() as warnings:
        print(f"vLLM {installed_vllm()}, loader {loader_for(installed_vllm())}")
        # Now that vLLM is here, so is torch.
        from vllm_flashprefill.patches import engine_checks, registration

        print(f"device: {device()}")
        engine_checks.check_device()
        registration.register()
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"{ENV_ENABLE}=1 is set" if is_on else f"{ENV_ENABLE}=1 is not set: `vllm serve` is plain vLLM here")


def show_model(model: str, vllms_arguments: Sequence[str]) -> None:
    """Print what would be sparse of a model, and why the rest would not.

    Raises:
        RuntimeError: nothing would be sparse.
        ValueError, OSError: vLLM, or FlashPrefill, refuses the model or an argument.
    """
    from vllm_flashprefill.backend.engine_routing import engine_dense_reason, layer_dense_words
    from vllm_flashprefill.patches import engine_checks

    folder = Path(model)
    if folder.is_dir() and not any((folder / name).is_file() for name in CONFIG_FILES):
        raise ValueError(f"{model} is no model's folder: it has no config.json")
    vllm_config = engine_config(model, vllms_arguments)
    model_config = vllm_config.model_config
    config = FlashPrefillConfig.from_vllm(vllm_config)
    kind, head_size = model_config.hf_config.model_type, said_head_size(model_config)
    print(f"model: {kind}, heads of {head_size or 'a size that its config does not say'}, {model}")
    print(f"options: {listed(dataclasses.asdict(config))}")
    if config.piece_size == 0:
        print(f"preset for {kind} with heads of {head_size}: {listed(preset(kind, head_size)) or 'none'}")
    backend, capability = engine_checks.backend_and_capability(vllm_config)
    nothing = engine_dense_reason(vllm_config, config, backend, capability)
    print_layers(layer_dense_words(vllm_config, config), nothing)
    if nothing is not None:
        raise RuntimeError(f"nothing would be sparse: {nothing}")
    longest = model_config.max_model_len
    print(f"prompts: sparse from {config.min_sparse_tokens} tokens on; a sequence has at most {longest}")


def print_layers(words: Sequence[str | None], nothing: str | None) -> None:
    """One line for each reason; layers that only `nothing`, a reason of the whole engine, makes dense say so."""
    able = "sparse" if nothing is None else "dense, as all of this engine"
    by_word: dict[str, list[int]] = {}
    for index, word in enumerate(words):
        by_word.setdefault(able if word is None else f"dense, {word}", []).append(index)
    for word, layers in by_word.items():
        print(f"layers {ranges(layers)}: {word}")
    if not words:
        print("layers: the model's config does not say how many there are")


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers with the runs among them drawn together: 0-4, 6."""
    runs = (
        [number for _, number in run]
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    )
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def device() -> str:
    """The device in words, asked without touching a GPU.

    Raises:
        RuntimeError: vLLM finds none.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return f"vLLM's CPU engine, {platform.machine()}"
    if current_platform.is_unspecified():
        raise RuntimeError("vLLM finds no GPU here, and is not its CPU engine; see `nvidia-smi`")
    if not current_platform.is_cuda():
        return current_platform.device_name
    capability = current_platform.get_device_capability()
    return f"{current_platform.get_device_name()}, compute capability {capability.major}.{capability.minor}"


def engine_config(model: str, vllms_arguments: Sequence[str]) -> Any:
    """The ``VllmConfig`` that ``vllm serve`` would have.

    Raises:
        ValueError: vLLM refuses the model or an argument.
    """
    from vllm.engine.arg_utils import EngineArgs

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        # Where it was before vLLM 0.12.
        from vllm.utils import FlexibleArgumentParser
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="python -m vllm_flashprefill"))
    parsed = parser.parse_args(["--model", model, *vllms_arguments])
    try:
        return EngineArgs.from_cli_args(parsed).create_engine_config()
    except Exception as error:
        # Of any kind: of pydantic, of transformers, or of code that comes with the model.
        raise ValueError(one_line(error)) from error


@contextlib.contextmanager
def our_warnings() -> Iterator[list[str]]:
    """What this package warns of meanwhile, whatever vLLM logs."""
    found: list[str] = []
    logger = logging.getLogger("vllm.flashprefill")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def one_line(error: Exception) -> str:
    """What an error says in one line; of pydantic's, what a value of the user's is not."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    says = next((line for line in lines if line.startswith("Value error, ")), lines[0])
    return says.removeprefix("Value error, ").partition(" [type=")[0]


def said_head_size(model_config: Any) -> int | None:
    try:
        return model_config.get_head_size()
    except Exception:
        # Of a config that says it by layer, or not at all.
        return None


def listed(options: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def version_of(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


if __name__ == "__main__":
    sys.exit(main())
