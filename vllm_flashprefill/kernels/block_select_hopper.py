"""Stages 2 and 3 on Hopper, in Gluon: one warp loads tiles, two warpgroups score half of each.

As block_select.py, with the tensor copy engine and one warpgroup's exponentials running under the other's products.
The warpgroups take turns at writing the lists, so that one writes while the other scores the next pair.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from vllm_flashprefill.kernels.sparse_attention_hopper import _TRITON_3_5

STAGES = gl.constexpr(3)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _keeps_all(request_ptr, query_block, log2_alpha, NUM_SINK_BLOCKS: gl.constexpr, NUM_WINDOW_BLOCKS: gl.constexpr):
    tail = query_block >= gl.load(request_ptr + 7)
    return tail | (query_block < NUM_SINK_BLOCKS + NUM_WINDOW_BLOCKS) | (log2_alpha == float("-inf"))


@gluon.jit
def _producer(
    q_desc, mean_desc, requests_ptr, items_ptr, num_pairs, first_item, log2_alpha, num_mean_rows, q_rows_per_batch,
    q_rows_per_head, shared,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, NUM_SINK_BLOCKS: gl.constexpr,
    NUM_WINDOW_BLOCKS: gl.constexpr, Q_COLUMNS: gl.constexpr,
):  # fmt: skip
    q_buffers, _, mean_buffers, _, q_ready, q_free, _, mean_ready, mean_free, _ = shared
    HALF_BLOCK: gl.constexpr = BLOCK // 2
    q_bytes: gl.constexpr = 2 * q_desc.block_type.nbytes
    tile_bytes: gl.constexpr = 2 * mean_desc.block_type.nbytes
    scored = 0
    step = 0
    for pair in range(gl.program_id(0), num_pairs, gl.num_programs(0)):
        head = pair % NUM_HEADS
        item_ptr = items_ptr + (first_item + pair // NUM_HEADS) * 3
        request_ptr = requests_ptr + gl.load(item_ptr) * 8
        query_block = gl.load(item_ptr + 1)
        if not _keeps_all(request_ptr, query_block, log2_alpha, NUM_SINK_BLOCKS, NUM_WINDOW_BLOCKS):
            # May lie before or past the chunk's rows: what is loaded there is masked.
            q_row = gl.load(request_ptr) * q_rows_per_batch + head * q_rows_per_head + gl.load(request_ptr + 1)
            q_row += query_block * BLOCK - gl.load(request_ptr + 3)
            mbarrier.wait(q_free, (scored + 1) & 1)
            mbarrier.expect(q_ready, q_bytes)
            column = head * Q_COLUMNS
            tma.async_copy_global_to_shared(q_desc, [q_row, column], q_ready, q_buffers.index(0))
            tma.async_copy_global_to_shared(q_desc, [q_row + HALF_BLOCK, column], q_ready, q_buffers.index(1))
            scored += 1
            mean_row = head // GROUP * num_mean_rows + gl.load(request_ptr + 6)
            for start in range(0, query_block + 1, BLOCK):
                slot = step % STAGES
                ready = mean_ready.index(slot)
                mbarrier.wait(mean_free.index(slot), (step // STAGES + 1) & 1)
                mbarrier.expect(ready, tile_bytes)
                row = mean_row + start
                tma.async_copy_global_to_shared(mean_desc, [row, 0], ready, mean_buffers.index(2 * slot))
                tma.async_copy_global_to_shared(
                    mean_desc, [row + HALF_BLOCK, 0], ready, mean_buffers.index(2 * slot + 1)
                )
                step += 1


@gluon.jit
def _log2_sum(s, scale):
    """s: [mean keys, query rows]. log2 of the sum over rows of exp2(scale * s)."""
    largest = gl.maximum(gl.max(s, axis=1), -1.0e30) * scale
    return largest + gl.log2(gl.sum(gl.exp2(s * scale - largest[:, None]), axis=1))


@gluon.jit
def _consumer(
    requests_ptr, items_ptr, lists_ptr, counts_ptr, scores_ptr, num_pairs, first_item, scale, log2_alpha, num_rows,
    stride_scores, shared,
    HALF: gl.constexpr, NUM_HEADS: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK: gl.constexpr,
    BLOCK_LIST: gl.constexpr, NUM_SINK_BLOCKS: gl.constexpr, NUM_WINDOW_BLOCKS: gl.constexpr,
):  # fmt: skip
    (
        q_buffers,
        half_buffers,
        mean_buffers,
        largest_buffers,
        q_ready,
        q_free,
        q_half_ready,
        mean_ready,
        mean_free,
        ready,
    ) = shared
    ROWS: gl.constexpr = BLOCK // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    list_layout: gl.constexpr = gl.BlockedLayout([BLOCK_LIST // 128], [32], [4], [0])
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, s_layout)
    offs_n = HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    offs_m = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, s_layout))
    offs_list = gl.arange(0, BLOCK_LIST, layout=list_layout)

    scored = 0
    step = 0
    turn = HALF
    for pair in range(gl.program_id(0), num_pairs, gl.num_programs(0)):
        head = pair % NUM_HEADS
        item_ptr = items_ptr + (first_item + pair // NUM_HEADS) * 3
        request_ptr = requests_ptr + gl.load(item_ptr) * 8
        query_block = gl.load(item_ptr + 1)
        keep_all = _keeps_all(request_ptr, query_block, log2_alpha, NUM_SINK_BLOCKS, NUM_WINDOW_BLOCKS)
        scores_row_ptr = scores_ptr + (pair % num_rows).to(gl.int64) * stride_scores
        parity = scored & 1
        if not keep_all:
            # Each warpgroup turns its half of the rows into the means' precision, for both.
            mbarrier.wait(q_ready, parity)
            q = q_buffers.index(HALF).load(io_layout).to(gl.float32)
            mbarrier.arrive(q_free, count=1)
            q_half = half_buffers.index(parity)
            q_half.slice(HALF * ROWS, ROWS, dim=0).store(
                gl.minimum(gl.maximum(q, -65504.0), 65504.0).to(mean_buffers.dtype)
            )
            fence_async_shared()
            mbarrier.arrive(q_half_ready, count=1)
            mbarrier.wait(q_half_ready, parity)

            query_len = gl.load(request_ptr + 2)
            context_len = gl.load(request_ptr + 3)
            # [ROWS]
            largest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
            # Blocks before the query's own are seen whole by every row: no mask, if no row is outside the chunk.
            all_rows = (query_block * BLOCK >= context_len) & ((query_block + 1) * BLOCK <= context_len + query_len)
            unmasked_end = gl.where(all_rows, query_block // BLOCK * BLOCK, 0)
            for start in range(0, unmasked_end, BLOCK):
                slot = step % STAGES
                mbarrier.wait(mean_ready.index(slot), step // STAGES & 1)
                # [ROWS, BLOCK]
                s = warpgroup_mma(mean_buffers.index(2 * slot + HALF), q_half.permute((1, 0)), zeros, use_acc=False)
                mbarrier.arrive(mean_free.index(slot), count=1)
                step += 1
                score = _log2_sum(s, scale)
                largest = gl.maximum(largest, score)
                gl.store(scores_row_ptr + start + offs_n, score)
            rows = query_block * BLOCK + offs_m - context_len
            mask_rows = (rows >= 0) & (rows < query_len)
            # Its own block is scored by the row that sees it whole: its last, or the sequence's last so far.
            own_block_row = gl.minimum((query_block + 1) * BLOCK, context_len + query_len) - 1 - context_len
            for start in range(unmasked_end, query_block + 1, BLOCK):
                slot = step % STAGES
                mbarrier.wait(mean_ready.index(slot), step // STAGES & 1)
                s = warpgroup_mma(mean_buffers.index(2 * slot + HALF), q_half.permute((1, 0)), zeros, use_acc=False)
                mbarrier.arrive(mean_free.index(slot), count=1)
                step += 1
                blocks = start + offs_n
                visible = (blocks < query_block)[:, None] & mask_rows[None, :]
                visible = visible | ((blocks == query_block)[:, None] & (rows == own_block_row)[None, :])
                score = _log2_sum(gl.where(visible, s, float("-inf")), scale)
                largest = gl.maximum(largest, score)
                gl.store(scores_row_ptr + blocks, score, mask=blocks <= query_block)
            largest_buffers.index(2 * parity + HALF).store(gl.full([1], gl.max(largest, axis=0), gl.float32, one))
            mbarrier.arrive(ready.index(parity), count=1)

        if turn & 1 == 0:
            threshold = float("-inf")
            if not keep_all:
                mbarrier.wait(ready.index(parity), scored // 2 & 1)
                threshold = gl.max(largest_buffers.index(2 * parity).load(one), axis=0)
                threshold = gl.maximum(threshold, gl.max(largest_buffers.index(2 * parity + 1).load(one), axis=0))
                threshold += log2_alpha
            list_start = gl.load(item_ptr + 2).to(gl.int64) * NUM_HEADS + head.to(gl.int64) * (query_block + 1)
            count = 0
            for start in range(0, query_block + 1, BLOCK_LIST):
                # [BLOCK_LIST]
                blocks = start + offs_list
                mask_blocks = blocks <= query_block
                score = gl.load(scores_row_ptr + blocks, mask=mask_blocks & (not keep_all), other=float("-inf"))
                kept = (score >= threshold) | (blocks < NUM_SINK_BLOCKS) | (query_block - blocks < NUM_WINDOW_BLOCKS)
                kept = ((kept | keep_all) & mask_blocks).to(gl.int32)
                slots = list_start + count + gl.associative_scan(kept, 0, _add) - 1
                gl.store(lists_ptr + slots, blocks, mask=kept != 0)
                count += gl.sum(kept, axis=0)
            gl.store(counts_ptr + pair, count)
        if not keep_all:
            scored += 1
        turn += 1


@gluon.jit(
    do_not_specialize=[
        "num_pairs", "first_item", "num_mean_rows", "q_rows_per_batch", "q_rows_per_head", "num_rows", "stride_scores",
    ]
)  # fmt: skip
def _block_select_hopper_kernel(
    q_desc,
    mean_desc,
    requests_ptr,
    items_ptr,
    lists_ptr,
    counts_ptr,
    scores_ptr,
    num_pairs,
    first_item,
    scale,
    log2_alpha,
    num_mean_rows,
    q_rows_per_batch,
    q_rows_per_head,
    num_rows,
    stride_scores: gl.int64,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_LIST: gl.constexpr,
    NUM_SINK_BLOCKS: gl.constexpr,
    NUM_WINDOW_BLOCKS: gl.constexpr,
    Q_COLUMNS: gl.constexpr,
):
    q_buffers = gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK // 2, HEAD_SIZE], q_desc.layout)
    half_buffers = gl.allocate_shared_memory(mean_desc.dtype, [2, BLOCK, HEAD_SIZE], mean_desc.layout)
    mean_buffers = gl.allocate_shared_memory(mean_desc.dtype, [2 * STAGES, BLOCK // 2, HEAD_SIZE], mean_desc.layout)
    largest_buffers = gl.allocate_shared_memory(gl.float32, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_half_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mean_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mean_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=2)
    mbarrier.init(q_half_ready, count=2)
    for n in gl.static_range(STAGES):
        mbarrier.init(mean_ready.index(n), count=1)
        mbarrier.init(mean_free.index(n), count=2)
    for n in gl.static_range(2):
        mbarrier.init(ready.index(n), count=2)
    fence_async_shared()

    # A constant stays one only inside the call.
    # fmt: off
    shared = (q_buffers, half_buffers, mean_buffers, largest_buffers, q_ready, q_free, q_half_ready, mean_ready,
              mean_free, ready)
    if _TRITON_3_5:
        gl.warp_specialize(
            (requests_ptr, items_ptr, lists_ptr, counts_ptr, scores_ptr, num_pairs, first_item, scale, log2_alpha,
             num_rows, stride_scores, shared, gl.constexpr(0), NUM_HEADS, HEAD_SIZE, BLOCK, BLOCK_LIST,
             NUM_SINK_BLOCKS, NUM_WINDOW_BLOCKS),
            _consumer,
            ((requests_ptr, items_ptr, lists_ptr, counts_ptr, scores_ptr, num_pairs, first_item, scale, log2_alpha,
              num_rows, stride_scores, shared, gl.constexpr(1), NUM_HEADS, HEAD_SIZE, BLOCK, BLOCK_LIST,
              NUM_SINK_BLOCKS, NUM_WINDOW_BLOCKS),
             (q_desc, mean_desc, requests_ptr, items_ptr, num_pairs, first_item, log2_alpha, num_mean_rows,
              q_rows_per_batch, q_rows_per_head, shared, NUM_HEADS, GROUP, BLOCK, NUM_SINK_BLOCKS,
              NUM_WINDOW_BLOCKS, Q_COLUMNS)),
            (_consumer, _producer), [4, 1], [240, 24],
        )
    else:
        gl.warp_specialize(
            [(_consumer, (requests_ptr, items_ptr, lists_ptr, counts_ptr, scores_ptr, num_pairs, first_item, scale,
                          log2_alpha, num_rows, stride_scores, shared, gl.constexpr(0), NUM_HEADS, HEAD_SIZE, BLOCK,
                          BLOCK_LIST, NUM_SINK_BLOCKS, NUM_WINDOW_BLOCKS)),
             (_consumer, (requests_ptr, items_ptr, lists_ptr, counts_ptr, scores_ptr, num_pairs, first_item, scale,
                          log2_alpha, num_rows, stride_scores, shared, gl.constexpr(1), NUM_HEADS, HEAD_SIZE, BLOCK,
                          BLOCK_LIST, NUM_SINK_BLOCKS, NUM_WINDOW_BLOCKS)),
             (_producer, (q_desc, mean_desc, requests_ptr, items_ptr, num_pairs, first_item, log2_alpha,
                          num_mean_rows, q_rows_per_batch, q_rows_per_head, shared, NUM_HEADS, GROUP, BLOCK,
                          NUM_SINK_BLOCKS, NUM_WINDOW_BLOCKS, Q_COLUMNS))],
            [4, 1], [240, 24],
        )
    # fmt: on
