import copy
import functools

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers", minversion="4.56", reason="transformers 4.56 or newer is not installed")

from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vllm_flashprefill import FlashPrefillConfig, hf
from vllm_flashprefill.reference import flash_prefill_ref

OPTIONS = dict(min_sparse_tokens=0, num_sink_blocks=1, num_window_blocks=2, num_dense_tail_blocks=1)
LENGTH = 3001


@pytest.fixture(autouse=True)
def nothing_registered():
    yield
    hf.unregister()


@functools.cache
def weights():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=1000, initializer_range=0.25, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=999, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)


def make_model(implementation, dtype=torch.bfloat16, layers=2):
    model = copy.deepcopy(weights()).to(dtype)
    model.model.layers = model.model.layers[:layers]
    model.set_attn_implementation(implementation)
    return model


def prompt(batch=1):
    return torch.randint(2, 998, (batch, LENGTH), generator=torch.Generator().manual_seed(1)).cuda()


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(ids, **arguments).logits.float()


def distance(x, exact):
    return ((x - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("batch", [1, 2])
def test_alpha_0_errs_at_most_twice_sdpa(batch):
    hf.register(alpha=0.0, **OPTIONS)
    ids = prompt(batch)
    exact, plain = logits(make_model("sdpa", torch.float32), ids), logits(make_model("sdpa"), ids)
    before = hf.stats()
    got = logits(make_model("flashprefill"), ids)
    done = hf.stats() - before
    assert (done.sparse_tokens, done.dense_tokens, done.density) == (2 * batch * LENGTH, {}, 1.0)
    assert distance(got, exact) <= 2 * distance(plain, exact)


def reference_attention(module, query, key, value, attention_mask, scaling, config, block_counts, **kwargs):
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return flash_prefill_ref(q, k, v, config=config, softmax_scale=scaling, block_counts=block_counts)[None], None


@pytest.mark.parametrize("piece_size, alpha", [(0, 0.4), (8, 1.0)])
def test_sparse_is_near_the_reference(piece_size, alpha):
    """Near, since a block at the threshold may fall to either side. One layer, so that nothing follows from that."""
    # Of random weights, rows of a query block have their best pieces in nearly every block.
    options = dict(OPTIONS, alpha=alpha, piece_size=piece_size)
    hf.register(**options)
    ids = prompt()
    dense = logits(make_model("sdpa", layers=1), ids)
    before = hf.stats()
    got = logits(make_model("flashprefill", layers=1), ids)
    done = hf.stats() - before
    assert done.density < (1.0 if piece_size else 0.95)
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    attention = functools.partial(reference_attention, config=FlashPrefillConfig(**options), block_counts=counts)
    AttentionInterface.register("reference", attention)
    AttentionMaskInterface.register("reference", sdpa_mask)
    expected = logits(make_model("reference", layers=1), ids)
    kept, visible = counts.tolist()
    assert done.visible_blocks == visible
    assert abs(done.kept_blocks - kept) <= 0.01 * kept
    assert not got.isnan().any()
    assert distance(got, expected) < 0.5 * distance(got, dense)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 1024}, {"cache_implementation": "static"}])
def test_generation_is_sparse_and_then_decodes(options):
    hf.register(alpha=0.5, **OPTIONS)
    ids = prompt()
    before = hf.stats()
    make_model("flashprefill").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False,
        disable_compile=True, **options,
    )  # fmt: skip
    done = hf.stats() - before
    assert set(done.dense_tokens) == {"decode"}
    assert done.sparse_tokens + done.dense_tokens["decode"] == 2 * (LENGTH + 3)


def test_no_layer_waits_for_the_gpu():
    hf.register(alpha=0.5, **OPTIONS)
    model, ids = make_model("flashprefill"), prompt()

    def forwards():
        """A prefill, a chunk on top of it and a decode."""
        cache = model(ids[:, :1500], use_cache=True).past_key_values
        model(ids[:, 1500:-1], past_key_values=cache, use_cache=True)
        model(ids[:, -1:], past_key_values=cache, use_cache=True)

    def without_sync(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return hf.flash_prefill_attention(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    before = hf.stats()
    with torch.no_grad():
        forwards()
        AttentionInterface.register(hf.CONFIG_NAME, without_sync)
        forwards()
    done = hf.stats() - before
    assert (done.sparse_tokens, done.dense_tokens) == (2 * 2 * (LENGTH - 1), {"decode": 2 * 2})


def test_other_dtypes_and_head_sizes_are_dense():
    hf.register(alpha=0.5, **OPTIONS)
    before = hf.stats()
    logits(make_model("flashprefill", torch.float32), prompt())
    assert (hf.stats() - before).dense_tokens == {"dtype": 2 * LENGTH}
    q = torch.randn(1, 2, LENGTH, 48, device="cuda", dtype=torch.bfloat16)
    before = hf.stats()
    hf.flash_prefill_attention(torch.nn.Module().eval(), q, q, q, None)
    assert (hf.stats() - before).dense_tokens == {"head_size": LENGTH}
