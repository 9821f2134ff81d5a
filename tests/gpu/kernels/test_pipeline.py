"""Each stage and all of them against the reference."""

import pytest
import torch

pytest.importorskip("triton")

from tests.support.kernel_cases import (
    check_all,
    check_attention,
    check_e4m3_codes,
    check_fp8_products,
    check_nan_queries,
    check_select,
    check_value_tiles,
    make_batch,
    sparse_config,
)
from tests.support.request import Request

SCALE = 0.125

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="products in e4m3 are for Hopper GPUs",
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [0, 16, 48, 128, 256])
@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.8, "piece_size": 8, "candidate_alpha": 0.05}, {"alpha": 0.9, "piece_size": 16}],
    ids=str,
)
def test_ragged_batch_of_chunks(options, page_size, dim, dtype):
    config = sparse_config(**options)
    requests = [Request(3000, 0, 500), Request(1), Request(700, 1300, 1000), Request(129, 640), Request(1100, 57)]
    if not page_size:
        requests = [Request(3000), Request(1), Request(129), Request(128), Request(2001)]
    check_all(
        make_batch(requests, page_size=page_size, dim=dim, dtype=dtype, device="cuda", config=config), config, SCALE
    )


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("kv_dtype", [None, torch.uint8])
def test_attention_sinks(kv_dtype, page_size, dim):
    config = sparse_config(alpha=0.8, piece_size=8)
    how = dict(page_size=page_size, dim=dim, dtype=torch.bfloat16, kv_dtype=kv_dtype, device="cuda", config=config)
    check_all(make_batch([Request(2000, 300), Request(1), Request(129)], sinks=True, **how), config, SCALE)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("kv_dtype", [None, torch.uint8])
def test_keys_and_values_of_a_head_beside_each_other(kv_dtype, heads_first, page_size, dim, caplog):
    """As in vLLM 0.26.0 and newer; where pages allow it by the same kernels as ever."""
    config = sparse_config()
    requests = [Request(3000, 0, 500), Request(1), Request(700, 1300, 1000), Request(129, 640), Request(1100, 57)]
    how = dict(page_size=page_size, dim=dim, dtype=torch.bfloat16, kv_dtype=kv_dtype, device="cuda", config=config)
    check_all(make_batch(requests, heads_first=heads_first, beside=True, **how), config, SCALE)
    assert "of keys or values" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("q_e4m3", [False, True])
@pytest.mark.parametrize(
    "kv_dtype, kv_scales", [(torch.uint8, "head"), (torch.uint8, "one"), (torch.float8_e4m3fn, "none")]
)
def test_e4m3_cache(kv_dtype, kv_scales, q_e4m3, page_size, dim, dtype, caplog):
    config = sparse_config()
    requests = [Request(3000, 0, 500), Request(1), Request(700, 1300, 1000), Request(129, 640)]
    batch = make_batch(
        requests, page_size=page_size, dim=dim, dtype=dtype, kv_dtype=kv_dtype, kv_scales=kv_scales, q_e4m3=q_e4m3,
        device="cuda", config=config,
    )  # fmt: skip
    check_all(batch, config, SCALE)
    assert dim == 256 or "slower" not in caplog.text


@needs_hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 48, 128])
@pytest.mark.parametrize("q_e4m3", [False, True])
@pytest.mark.parametrize("kv_scales", ["none", "one", "head"])
def test_e4m3_products(kv_scales, q_e4m3, page_size, dim, caplog):
    config = sparse_config(alpha=0.8, piece_size=8)
    requests = [Request(3000, 0, 500), Request(1), Request(700, 1300, 1000), Request(129, 640), Request(300, 8000)]
    how = dict(page_size=page_size, dim=dim, dtype=torch.bfloat16, kv_dtype=torch.uint8, device="cuda", config=config)
    batch = make_batch(requests, kv_scales=kv_scales, q_e4m3=q_e4m3, **how)
    check_value_tiles(batch)
    check_fp8_products(batch, config, SCALE)
    assert "slower" not in caplog.text


@needs_hopper
@pytest.mark.parametrize("options", [{"sinks": True}, {"slab_bytes": 1000}, {"heads_first": True, "beside": True}])
def test_e4m3_products_of_other_batches(options, caplog):
    config = sparse_config()
    how = dict(page_size=16, heads=8, dim=128, dtype=torch.float16, kv_dtype=torch.uint8, device="cuda", config=config)
    batch = make_batch([Request(3000), Request(1000, 57)], kv_scales="head", q_e4m3=True, **options, **how)
    check_value_tiles(batch)
    check_fp8_products(batch, config, SCALE)
    assert "slower" not in caplog.text


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [0, 16, 128])
@pytest.mark.parametrize("kind", ["bf16", "e4m3", "e4m3 queries"])
@pytest.mark.parametrize("part_tiles", [1, 3, None])
def test_split_lists(part_tiles, kind, page_size, dim, caplog):
    """Parts of every length, more of them than there is room for, and what the schedule chooses for a long append."""
    config = sparse_config(alpha=0.8, piece_size=8)
    how = dict(page_size=page_size, dim=dim, dtype=torch.bfloat16, device="cuda", config=config, part_tiles=part_tiles)
    if kind != "bf16":
        how.update(kv_dtype=torch.uint8, kv_scales="head", q_e4m3=kind != "e4m3")
    requests = [Request(3000, 0, 500), Request(1), Request(700, 1300, 1000), Request(129, 640)]
    if part_tiles is None:
        requests = [Request(300, 12_345)]
    if not page_size:
        if kind != "bf16":
            pytest.skip("a cache in e4m3 has pages")
        requests = [Request(5000), Request(1)]
    batch = make_batch(requests, sinks=part_tiles == 3, **how)
    assert batch.schedule.slabs[0].part_tiles
    check_all(batch, config, SCALE)
    if kind == "e4m3 queries" and dim < 256 and torch.cuda.get_device_capability()[0] == 9:
        check_fp8_products(batch, config, SCALE)
    assert dim == 256 or "slower" not in caplog.text


def test_e4m3_codes():
    for native in (False, *([True] if torch.cuda.get_device_capability() >= (8, 9) else [])):
        check_e4m3_codes("cuda", native=native)


def test_e4m3_without_the_instruction(monkeypatch):
    from vllm_flashprefill.kernels import block_mean, sparse_attention

    for module in (block_mean, sparse_attention):
        monkeypatch.setattr(module, "has_e4m3_instruction", lambda device: False)
    config = sparse_config()
    for page_size in (16, 128):
        batch = make_batch(
            [Request(2000, 300)], page_size=page_size, dim=128, kv_dtype=torch.uint8, kv_scales="head",
            device="cuda", config=config,
        )  # fmt: skip
        check_all(batch, config, SCALE)


@pytest.mark.parametrize("piece_size", [0, 8])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_tiles_of_gpus_with_little_shared_memory(dim, piece_size, monkeypatch):
    from vllm_flashprefill.kernels import configs

    monkeypatch.setattr(configs, "gpu_kind", lambda device: "small")
    config = sparse_config(alpha=0.8 if piece_size else 0.3, piece_size=piece_size)
    for page_size in (0, 16):
        batch = make_batch(
            [Request(2000, 300), Request(129, 640)], page_size=page_size, heads=8, dim=dim, dtype=torch.bfloat16,
            device="cuda", config=config,
        )  # fmt: skip
        check_all(batch, config, SCALE)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (4, 1), (28, 4), (8, 1)])
def test_grouped_heads(heads, kv_heads):
    config = sparse_config()
    for page_size in (0, 16):
        batch = make_batch(
            [Request(1500)], page_size=page_size, heads=heads, kv_heads=kv_heads, dim=128,
            dtype=torch.bfloat16, device="cuda", config=config,
        )  # fmt: skip
        check_all(batch, config, SCALE)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [16, 128])
def test_caches_with_heads_before_tokens_and_fused_queries(page_size, dim):
    config = sparse_config()
    batch = make_batch(
        [Request(2000), Request(129, 640), Request(700, 1300, 1000)], page_size=page_size, heads=8, dim=dim,
        dtype=torch.bfloat16, heads_first=True, fused_qkv=True, device="cuda", config=config,
    )  # fmt: skip
    check_all(batch, config, SCALE)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 255, 256, 257, 1000, 1024, 1500])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_lengths(length, alpha):
    config = sparse_config(alpha=alpha)
    for page_size in (0, 16, 128):
        check_all(
            make_batch([Request(length)], page_size=page_size, dim=128, device="cuda", config=config), config, SCALE
        )


@pytest.mark.parametrize(
    "options",
    [
        {"num_sink_blocks": 0, "num_window_blocks": 1, "num_dense_tail_blocks": 0},
        {"num_sink_blocks": 5, "num_window_blocks": 9, "num_dense_tail_blocks": 7},
    ],
)
def test_what_is_always_kept(options):
    config = sparse_config(alpha=1.0, **options)
    check_all(make_batch([Request(4000)], dim=128, device="cuda", config=config), config, SCALE)


def test_slabs_change_nothing():
    config = sparse_config()
    requests = [Request(3000), Request(1000)]
    whole = check_all(make_batch(requests, dim=128, device="cuda", config=config), config, SCALE)
    batch = make_batch(requests, dim=128, device="cuda", config=config, slab_bytes=1000)
    assert len(batch.schedule.slabs) > 5
    assert torch.equal(check_all(batch, config, SCALE), whole)


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.1}, {"piece_size": 8, "candidate_alpha": 0.01, "alpha": 0.6}],
    ids=str,
)
def test_many_mean_tiles(options):
    """More key blocks than one tile of the list and of the scores."""
    config = sparse_config(**options)
    batch = make_batch(
        [Request(256, 90_000, 1000)], page_size=16, dim=128, dtype=torch.bfloat16, device="cuda", config=config
    )
    wrong, total = check_select(batch, config, SCALE)
    check_attention(batch, config, SCALE)
    print(f"{wrong} of {total} at the threshold")


@pytest.mark.parametrize("piece_size, candidate_alpha", [(4, 0.0), (4, 0.05), (32, 0.05), (64, 1.0)])
def test_pieces_of_other_sizes(piece_size, candidate_alpha):
    config = sparse_config(alpha=0.9, piece_size=piece_size, candidate_alpha=candidate_alpha)
    for dim in (64, 128, 256):
        batch = make_batch([Request(1500, 441), Request(2000)], page_size=16, dim=dim, device="cuda", config=config)
        check_all(batch, config, SCALE)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.8, "piece_size": 8}], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_queries_that_are_not_numbers(options, dim):
    config = sparse_config(**options)
    check_nan_queries(make_batch([Request(2000)], dim=dim, device="cuda", config=config), config, SCALE)


def test_large_logits():
    config = sparse_config()
    batch = make_batch([Request(1500)], dim=128, device="cuda", config=config)
    check_all(batch, config, 20.0)
