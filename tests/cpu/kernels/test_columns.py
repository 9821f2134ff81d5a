from vllm_flashprefill.kernels import columns

# Triton's cache may hold kernels that were compiled with these.
KNOWN = {
    "BATCH": 0, "QUERY_START": 1, "QUERY_LEN": 2, "CONTEXT_LEN": 3, "KV_START": 4, "TABLE_ROW": 5, "MEAN_START": 6,
    "FIRST_TAIL_BLOCK": 7, "REQUEST_COLUMNS": 8, "REQUEST": 0, "QUERY_BLOCK": 1, "LIST_SLOT": 2, "ITEM_COLUMNS": 3,
    "PAIR": 0, "FIRST_TILE": 1, "NUM_TILES": 2, "PART_COLUMNS": 3, "NEXT_WORK": 0, "NUM_PARTS": 1, "NUM_COUNTERS": 2,
}  # fmt: skip


def test_a_name_keeps_its_number():
    found = {name: number for name, number in vars(columns).items() if name.isupper()}
    assert found == KNOWN
