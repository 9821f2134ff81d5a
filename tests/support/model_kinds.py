"""Small models of each kind, with random weights whose attention is peaked and matters."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

VOCAB = 512
# The last token ids are not for text.
IMAGE, VIDEO, VISION_START, VISION_END = range(VOCAB - 4, VOCAB)
NUM_TEXT_TOKENS = VOCAB - 4
SMALL = {"vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 4096}
LLAMA = {**SMALL, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 3}


@dataclass
class Kind:
    """A model, how it is served and what its layers are to do.

    Attributes:
        config: makes its transformers config.
        sparse_layers: layers whose long prefills are sparse.
        dense_layers: number of layers that are dense, by reason.
        engine: arguments of LLM beyond the common ones.
        tokenizer: whether vLLM does not do without one.
        images: to a prompt's number, the side of an image that it begins with.
        library: a part of vLLM's that it needs, as a pattern of files in vLLM's folder.
        noise: mean difference of log-probabilities that is put down to rounding; one may differ by ten times as much.
        drafts: whether tokens are drafted, so that steps hold more tokens than are answered.
        refused: what vLLM alone says where it does not run this kind.
        options: environment variables for FlashPrefill.
    """

    config: Callable
    sparse_layers: int = 0
    dense_layers: dict[str, int] = field(default_factory=dict)
    engine: dict = field(default_factory=dict)
    tokenizer: bool = False
    images: dict[int, int] = field(default_factory=dict)
    library: str | None = None
    noise: float = 0.03
    drafts: bool = False
    refused: str | None = None
    options: dict[str, str] = field(default_factory=dict)


def llama():
    from transformers import LlamaConfig

    return LlamaConfig(**LLAMA)


def mistral():
    from transformers import MistralConfig

    return MistralConfig(**LLAMA, sliding_window=1024)


def gemma2():
    from transformers import Gemma2Config

    return Gemma2Config(
        **{**LLAMA, "num_hidden_layers": 4},
        sliding_window=1024,
        query_pre_attn_scalar=128,
        attn_logit_softcapping=20.0,
    )


def gemma3():
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        **{**LLAMA, "num_attention_heads": 4, "head_dim": 256, "num_hidden_layers": 4},
        sliding_window=512,
        query_pre_attn_scalar=256,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )


def bloom():
    from transformers import BloomConfig

    return BloomConfig(vocab_size=VOCAB, hidden_size=512, n_layer=2, n_head=8)


def gpt_oss():
    from transformers import GptOssConfig

    return GptOssConfig(
        **{**LLAMA, "head_dim": 64, "num_hidden_layers": 4, "intermediate_size": 512},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )


def qwen3_moe():
    """The shapes of Qwen3-30B-A3B, with fewer layers and experts."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_hidden_layers=2,
        num_experts=16,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
    )


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            **{name: value for name, value in LLAMA.items() if name != "head_dim"},
            "num_attention_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_heads": 4,
            "out_hidden_size": 512,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def bert():
    from transformers import BertConfig

    return BertConfig(**{**SMALL, "num_attention_heads": 8, "num_hidden_layers": 2})


def deepseek():
    """Multi-head latent attention; every layer's MLP is plain."""
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        **{**SMALL, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 2},
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=256,
    )


NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
# transformers 5 does not take the text with which vLLM 0.24.0 would profile images.
ONE_IMAGE = {"limit_mm_per_prompt": {"image": 1, "video": 0}, "skip_mm_profiling": True}
# In bfloat16 another order of sums moves log-probabilities by 0.01 in the mean and by 0.05 at most, in gemma3 and
# qwen3_moe by 0.03 and 0.2; alpha 1 moves llama's and gemma3's by 0.5 to 1 in the mean and by 3 to 5 at most.
KINDS = {
    "llama_ngram": Kind(llama, 3, engine={"speculative_config": NGRAM}, drafts=True),
    # vLLM rounds probabilities to e4m3.
    "llama_fp8_cache": Kind(llama, 3, engine={"kv_cache_dtype": "fp8"}, noise=0.1),
    "llama_fp8_products": Kind(
        llama, 3, engine={"kv_cache_dtype": "fp8"}, noise=0.1, options={"FLASHPREFILL_COMPUTE_DTYPE": "fp8"}
    ),
    "mistral": Kind(mistral, dense_layers={"sliding_window": 3}),
    "gemma2": Kind(gemma2, dense_layers={"sliding_window": 2, "logits_soft_cap": 2}),
    "gemma3": Kind(gemma3, 2, {"sliding_window": 2}, noise=0.08),
    "bloom": Kind(
        bloom,
        dense_layers={"alibi": 2},
        library="vllm_flash_attn/_vllm_fa2_C*",
        refused="FA2 does not support scheduler_metadata",
    ),
    "gpt_oss": Kind(gpt_oss, 2, {"sliding_window": 2}, library="_moe_C*"),
    "qwen3_moe": Kind(qwen3_moe, 2, library="_moe_C*", noise=0.08),
    "qwen2_5_vl": Kind(qwen2_5_vl, 3, engine=ONE_IMAGE, tokenizer=True, images={1: 336}),
    "bert": Kind(bert, dense_layers={"encoder_attention": 2}, engine={"runner": "pooling"}, tokenizer=True),
    "deepseek_mla": Kind(deepseek),
}


def write(kind, folder):
    """Save a model of this kind with random weights, and what else vLLM wants of it.

    As transformers makes them, models attend almost evenly, their attention changes little and their logits are much
    the same: the weights for these are made larger.
    """
    import transformers

    config = kind.config()
    torch.manual_seed(0)
    auto = {"bert": transformers.AutoModel, "qwen2_5_vl": transformers.AutoModelForImageTextToText}
    model = auto.get(config.model_type, transformers.AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight += 0.5
            elif weight.dim() == 2 and ("attn" in name or "attention" in name):
                weight *= 3
            elif name.endswith(("lm_head.weight", "embed_tokens.weight", "word_embeddings.weight")):
                weight *= 4
    model.to(torch.bfloat16).save_pretrained(folder)
    if config.model_type == "gpt_oss":
        rename_experts(folder / "model.safetensors")
    if kind.images:
        processor().save_pretrained(folder)
    elif kind.tokenizer:
        tokenizer().save_pretrained(folder)


def rename_experts(path):
    """To the names that vLLM 0.24.0 finds gpt-oss' experts by where they are not quantised."""
    from safetensors.torch import load_file, save_file

    weights = {name.replace(".experts.", ".experts.routed_experts."): x for name, x in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def tokenizer():
    """A word for each token id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = [f"w{n}" for n in range(NUM_TEXT_TOKENS)] + special
    by_word = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="w0"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=by_word, unk_token="w0", pad_token="w0", additional_special_tokens=special
    )


def processor():
    """Of small images only, so that vLLM makes room for no larger ones."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    pixels = {"min_pixels": 56 * 56, "max_pixels": 448 * 448}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**pixels),
    )
