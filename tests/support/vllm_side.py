"""What vLLM makes of a model and says of a batch, and what is seen of its classes at work."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from vllm_flashprefill import counters
from vllm_flashprefill.backend.layer_routing import has_quantised_query
from vllm_flashprefill.patches.versions import installed_vllm, support_for

MAX_TOKENS = 8192
LAYER = "model.layers.1.self_attn.attn"
Q_SCALE, K_SCALE, V_SCALE = 0.02, 0.05, 0.03


@dataclass(frozen=True)
class Shape:
    """What an attention layer and its cache are made for."""

    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    page_size: int
    kv_cache_dtype: str = "auto"
    scales_by_head: bool = False
    has_sinks: bool = False

    @property
    def scale(self):
        return self.head_size**-0.5

    @property
    def quantised(self):
        return self.kv_cache_dtype != "auto"

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.") + ("-e4m3" if self.quantised else "")
        dtype += "-scales by head" * self.scales_by_head + "-sinks" * self.has_sinks
        return f"{self.heads}/{self.kv_heads}x{self.head_size}-{dtype}-pages{self.page_size}"


@functools.cache
def vllm_config(heads, kv_heads, head_size, dtype, kv_cache_dtype, full_graphs):
    from vllm.engine.arg_utils import EngineArgs

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": heads * head_size,
        "head_dim": head_size,
        "intermediate_size": 512,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "max_position_embeddings": MAX_TOKENS,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        made = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=MAX_TOKENS,
            max_num_batched_tokens=MAX_TOKENS,
            max_num_seqs=64,
            enforce_eager=not full_graphs,
        ).create_engine_config()
    # Not asked for: before 0.24.0 a CPU has none.
    made.cache_config.cache_dtype = kv_cache_dtype
    return made


def our_backend():
    """FlashPrefill's FlashAttention backend for the installed vLLM."""
    module = f"vllm_flashprefill.patches.{support_for(installed_vllm()).flash_attn}"
    return importlib.import_module(module).FlashPrefillFlashAttnBackend


def heads_before_tokens():
    """Whether a cache is [pages, G, page size, 2 * D] in this vLLM, as it is from 0.26.0 on."""
    return support_for(installed_vllm()).flash_attn == "vllm_0_26_0_flash_attn"


def sinks(shape, device):
    """[heads] logits: one that takes nearly all, one that takes nearly nothing, and some between."""
    return torch.linspace(-20, 20, shape.heads, dtype=shape.dtype, device=device)


class Side:
    """A builder and an impl of one backend, made as vLLM makes them.

    builder_class: in place of the backend's. impl: arguments of the impl that differ from the shape's.
    """

    def __init__(self, backend, own_builder, shape, device, full_graphs, builder_class=None, **impl):
        from vllm.config import set_current_vllm_config
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        self.vllm_config = config = vllm_config(
            shape.heads, shape.kv_heads, shape.head_size, shape.dtype, shape.kv_cache_dtype, full_graphs
        )
        if hasattr(config.cache_config, "get_resolved_kv_cache_layout"):
            # vLLM's default, which an engine works out when all its layers are there.
            config.cache_config.kv_cache_layout = "LBNHC"
        spec = dict(
            block_size=shape.page_size,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            dtype=torch.uint8 if shape.quantised else shape.dtype,
            use_mla=False,
        )
        spec = {name: value for name, value in spec.items() if name in FullAttentionSpec.__dataclass_fields__}
        arguments = dict(kv_cache_spec=FullAttentionSpec(**spec), layer_names=[LAYER], vllm_config=config)
        known = inspect.signature(own_builder.__init__).parameters
        arguments = {name: value for name, value in arguments.items() if name in known}
        with set_current_vllm_config(config):
            impl = (
                dict(
                    num_heads=shape.heads,
                    head_size=shape.head_size,
                    scale=shape.scale,
                    num_kv_heads=shape.kv_heads,
                    alibi_slopes=None,
                    sliding_window=None,
                    kv_cache_dtype=shape.kv_cache_dtype,
                    **({"sinks": sinks(shape, device)} if shape.has_sinks else {}),
                )
                | impl
            )
            self.impl = backend.get_impl_cls()(**impl)
            scales = (Q_SCALE, K_SCALE, V_SCALE) if shape.quantised else (1, 1, 1)
            of_heads = torch.arange(1, shape.kv_heads + 1) if shape.scales_by_head else torch.ones(())
            q_scale, k_scale, v_scale = (x * of_heads.to(device, torch.float32) for x in scales)
            if not has_quantised_query(self.impl):
                # The impl quantises it itself, all heads alike.
                q_scale = q_scale.flatten()[:1]
            quantises = has_quantised_query(self.impl)
            self.layer = SimpleNamespace(
                layer_name=LAYER, impl=self.impl, _q_scale=q_scale, _k_scale=k_scale, _v_scale=v_scale,
                query_quant=self.quantise_query if quantises else None,
            )  # fmt: skip
            # Where the builder finds what to compile the kernels for.
            layers = config.compilation_config.static_forward_context
            layers[LAYER] = self.layer
            try:
                self.builder = (builder_class or backend.get_builder_cls())(**arguments, device=device)
            finally:
                del layers[LAYER]

    def quantise_query(self, query, scale):
        """As vLLM's layer does: [tokens, H * D], and a scale for the heads of each KV head or one for all."""
        by_head = query.unflatten(1, (scale.numel(), -1)).float() / scale.view(-1, 1)
        return by_head.clamp(-448, 448).to(torch.float8_e4m3fn).flatten(1), scale

    def set_config(self, config):
        self.impl.flashprefill_config = self.builder.flashprefill_config = config


def common_fields():
    """Names of what this vLLM's model runner says of a batch."""
    from vllm.v1.attention.backends.utils import CommonAttentionMetadata

    return CommonAttentionMetadata.__dataclass_fields__.keys()


def common_values(starts, seq_lens, host_lens, known_lens, block_table, slot_mapping):
    """What the model runner says of a batch, by name; more than some versions have.

    Args:
        starts, seq_lens, host_lens, known_lens: arrays [requests + 1] and [requests]; tokens of each as the device
            and the host count them, and with those that the model runner knows beyond the step.
    """
    starts, seq_lens, host_lens = (torch.from_numpy(x).int() for x in (starts, seq_lens, host_lens))
    computed = host_lens - starts.diff()
    device = block_table.device
    return dict(
        query_start_loc=starts.clone().to(device),
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to(device),
        seq_lens_cpu=host_lens,
        seq_lens_cpu_upper_bound=host_lens.clone(),
        num_computed_tokens_cpu=computed,
        num_reqs=len(seq_lens),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(starts.diff().max()),
        max_seq_len=int(host_lens.max()),
        block_table_tensor=block_table,
        slot_mapping=slot_mapping,
        is_prefilling=computed < torch.from_numpy(known_lens) - 1,
    )


def common_metadata(values):
    from vllm.v1.attention.backends.utils import CommonAttentionMetadata

    return CommonAttentionMetadata(**{name: value for name, value in values.items() if name in common_fields()})


@contextlib.contextmanager
def recorded_forward(impl_class):
    """Arguments by name of each call of vLLM's own `forward`."""
    calls, forward = [], impl_class.forward
    parameters = inspect.signature(forward)

    def record(*args, **kwargs):
        calls.append(parameters.bind(*args, **kwargs).arguments)
        return forward(*args, **kwargs)

    with mock.patch.object(impl_class, "forward", record):
        yield calls


@contextlib.contextmanager
def counted():
    """The statistics of what happens inside but for its seconds, once it is over."""
    result = SimpleNamespace()
    before = counters._to_stats(counters.recorder()._counters)
    yield result
    after = counters._to_stats(counters.recorder()._counters) - before
    result.stats = dataclasses.replace(after, selection_seconds=0.0, attention_seconds=0.0)
