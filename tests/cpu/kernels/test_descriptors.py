"""How vLLM's KV caches, and queries, lie as the matrices of tensor descriptors."""

import itertools

import pytest
import torch

descriptors = pytest.importorskip("vllm_flashprefill.kernels.descriptors")
pytestmark = pytest.mark.skipif(descriptors.TensorDescriptor is None, reason="this Triton has no tensor descriptors")

LAYERS, PAGES, PAGE_SIZE, HEAD_SIZE = 4, 6, 16, 128
# The six layouts of vLLM 0.26.0 and newer: how [layers, pages, heads, tokens, keys and values] lie in memory.
LAYOUTS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}


def laid_out(shape, order):
    """Numbered elements of that shape, of which the order says how they lie."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.int32)
    return numbers.view([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(order))])


def caches(num_heads):
    """{name: keys and values, [pages, tokens, heads, D] views of one layer}"""
    shape = (LAYERS, PAGES, num_heads, PAGE_SIZE, 2 * HEAD_SIZE)
    views = {
        name: laid_out(shape, order)[1].transpose(1, 2).split(HEAD_SIZE, dim=-1) for name, order in LAYOUTS.items()
    }
    shape = (PAGES, 2, PAGE_SIZE, num_heads, HEAD_SIZE)
    views["[pages, 2, tokens, heads, D]"] = laid_out(shape, (0, 1, 2, 3, 4)).unbind(1)
    views["[pages, 2, heads, tokens, D]"] = laid_out(shape, (0, 1, 3, 2, 4)).unbind(1)
    views["[2, pages, tokens, heads, D]"] = laid_out(shape, (1, 0, 2, 3, 4)).unbind(1)
    # A page of a hybrid model may be longer than its tokens.
    longer = laid_out((PAGES, 2 * PAGE_SIZE + 3, num_heads, HEAD_SIZE), (0, 1, 2, 3))
    views["pages with a gap"] = longer[:, :PAGE_SIZE], longer[:, PAGE_SIZE : 2 * PAGE_SIZE]
    return views


@pytest.mark.parametrize("num_heads", [1, 2, 8])
@pytest.mark.parametrize("name", caches(2))
def test_every_cache_of_vllm_is_a_matrix(name, num_heads):
    keys, values = caches(num_heads)[name]
    assert keys.stride() == values.stride()
    for x in (keys, values):
        assert descriptors.no_matrix(x) is None
        check_matrix(x, descriptors.as_matrix(x))


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((1, 40, 6, HEAD_SIZE), (0, 1, 2, 3)),
        ((2, 40, 6, HEAD_SIZE), (0, 1, 2, 3)),
        ((2, 40, 6, HEAD_SIZE), (0, 2, 1, 3)),
        ((2, 40, 6, HEAD_SIZE), (2, 0, 1, 3)),
    ],
)
def test_queries_are_matrices(shape, order):
    check_matrix(laid_out(shape, order), descriptors.as_matrix(laid_out(shape, order)))


def test_the_strides_of_the_default_layout():
    """Heads lie 2 D apart within a token's row."""
    keys, _ = caches(8)["LBNHC"]
    matrix = descriptors.as_matrix(keys)
    assert matrix.shape == (PAGES * PAGE_SIZE, 15 * HEAD_SIZE)
    assert matrix.strides == (16 * HEAD_SIZE, 1)
    assert (matrix.rows_per_batch, matrix.rows_per_head, matrix.columns_per_head) == (PAGE_SIZE, 0, 2 * HEAD_SIZE)


def check_matrix(x, matrix):
    """Each element is where the matrix says, and the matrix ends within the tensor's memory."""
    rows, columns = matrix.shape
    assert max(matrix.strides) * x.element_size() % 16 == 0
    memory = torch.as_strided(x, (rows, columns), matrix.strides, x.storage_offset())
    last = x.storage_offset() + (rows - 1) * matrix.strides[0] + columns
    assert last <= x.untyped_storage().nbytes() // x.element_size()
    num_pages, num_tokens, num_heads, head_size = x.shape
    for page, head in itertools.product(range(num_pages), range(num_heads)):
        row = page * matrix.rows_per_batch + head * matrix.rows_per_head
        column = head * matrix.columns_per_head
        assert torch.equal(memory[row : row + num_tokens, column : column + head_size], x[page, :, head])


NUMBERS = torch.arange(1 << 20, dtype=torch.int16)


@pytest.mark.parametrize(
    ("strides", "offset", "reason"),
    [
        ((16 * 260, 260, 128, 1), 0, "begin at multiples of 16 bytes"),
        ((16 * 256, 256, 128, 1), 1, "begin at multiples of 16 bytes"),
        ((4096, 64, 2048, 1), 0, "tokens that overlap"),
        ((16 * 256 + 8, 256, 128, 1), 0, "pages of no whole number of tokens"),
        ((16 * 256, 256, 64, 1), 0, "heads neither within a token's row nor whole rows apart"),
        ((8192, 256, 16 * 256 + 8, 1), 0, "heads neither within a token's row nor whole rows apart"),
        ((16 * 256, 256, 192, 1), 0, "heads of one token among those of the next"),
    ],
)
def test_what_is_no_matrix_is_said(strides, offset, reason):
    x = NUMBERS.as_strided((6, 16, 2, 128), strides, offset)
    assert reason in descriptors.no_matrix(x)
    assert f"the strides {strides} of torch.int16" in descriptors.no_matrix(x)
    assert descriptors.as_matrix(x) is None
