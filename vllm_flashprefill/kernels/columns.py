"""The int32 rows by which the kernels know a batch, their columns by name.

Kernels read them as attributes of this module, since Triton compares the global constants of a kernel at each launch.
The key of its cache has a kernel's text in it and not these numbers: what moves, or a row that grows, is renamed.
"""

# A request, which is one sequence and its chunk.
BATCH = 0  # index along the batch dimension of q, and of k and v where they are not paged
QUERY_START = 1  # first token in q
QUERY_LEN = 2
CONTEXT_LEN = 3
KV_START = 4  # first token in k and v where they are not paged
TABLE_ROW = 5  # row of the block table where they are
MEAN_START = 6  # first row of its blocks in the mean keys
FIRST_TAIL_BLOCK = 7  # query blocks from here on attend to everything
REQUEST_COLUMNS = 8

# An item, which is one query block of a request.
REQUEST = 0
QUERY_BLOCK = 1
LIST_SLOT = 2  # first slot of its block lists (per head) in its slab
ITEM_COLUMNS = 3

# A part, which is some tiles of a pair's list, that are attended to apart from its others.
PAIR = 0  # -1 where nothing is to be done
FIRST_TILE = 1  # tile 0 is the query block itself, tile t the list's entry t - 1
NUM_TILES = 2
PART_COLUMNS = 3

# Counters, 0 between kernels.
NEXT_WORK = 0
NUM_PARTS = 1
NUM_COUNTERS = 2
