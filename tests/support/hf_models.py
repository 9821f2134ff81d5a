"""Small models of transformers, and what is counted of them."""

import copy
import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_flashprefill import hf

# Prunes wherever it may, so that a wrong mask, scale or position shows.
# Blocks scored whole: of random weights, some row of a query block likes a piece of nearly every block.
EAGER_TO_PRUNE = dict(
    min_sparse_tokens=0, num_sink_blocks=1, num_window_blocks=1, num_dense_tail_blocks=0, piece_size=0
)
SHAPE = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,
    initializer_range=0.5,
    bos_token_id=1,
    eos_token_id=99,
    pad_token_id=0,
)
LENGTH = 700
TOLERANCE = dict(rtol=1e-3, atol=2e-3)


@functools.cache
def weights(model_class, config_class, options=()):
    torch.manual_seed(0)
    return model_class(config_class(**SHAPE, **dict(options))).eval()


def make_model(implementation, model_class=LlamaForCausalLM, config_class=LlamaConfig, **options):
    model = copy.deepcopy(weights(model_class, config_class, tuple(options.items())))
    model.set_attn_implementation(implementation)
    return model


def prompt(batch=1, length=LENGTH):
    return torch.randint(2, 98, (batch, length), generator=torch.Generator().manual_seed(1))


class Run:
    """The logits of one forward, and what was counted meanwhile."""

    @torch.no_grad()
    def __init__(self, model, ids, **arguments):
        before = hf.stats()
        self.logits = model(ids, **arguments).logits
        self.stats = hf.stats() - before


def generate(model, ids, **options):
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **options)


def check_dense(run, reason, tokens, sparse=0):
    assert run.stats.dense_tokens == {reason: tokens}
    assert run.stats.sparse_tokens == sparse


class Layer(torch.nn.Module):
    is_causal = False
