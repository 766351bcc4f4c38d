"""The forward kernel: one program is a block of rows and a head, and goes through the memory its rows see.

    o_i = Σ_{j < prefix_i} SiLU(α q_i·k_j + b(i, j)) v_j  +  SiLU(α q_i·k_self_i + b(i, i)) v_self_i

Each kind of tile (`triton_tiles`) has a loop of its own.
"""

import triton
import triton.language as tl

from kernels.triton_bias import silu_of_half
from kernels.triton_pairs import (
    BEYOND,
    MIXED,
    Bias,
    add_bias,
    dot,
    load_block,
    load_tile,
    load_times,
    store_block,
)


@triton.jit(do_not_specialize=["octave"])
def forward(
    q,  # (R, H, QK), its rows q_stride apart; so are k_self, and v_self (R, H, V)
    k,  # (M, H, QK)
    v,  # (M, H, V)
    k_self,
    v_self,
    out,  # (R, H, V) contiguous
    q_stride,
    k_stride,
    v_stride,
    k_self_stride,
    v_self_stride,
    row_prefix,  # (R,)
    row_clock,  # (R,)
    memory_times,  # (M,)
    programs,  # of rows, as triton_tiles.Tiles has them
    entries,
    ranks,
    steps,
    tables,  # (H, table_stride) fp32: the halved biases by position, by time and by difference
    position_edges,  # the least difference of each bucket
    table_stride,
    origin,  # where in the biases by difference that of 0 is
    half_alpha,
    octave,  # of the longest history, for tuning
    POSITIONS: tl.constexpr,  # rows of the position table
    TIMES: tl.constexpr,
    HEADS: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    PADDED_QK: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_MEMORY: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
):
    program, head = programs + tl.program_id(0) * 8, tl.program_id(1)
    first, end = tl.load(program), tl.load(program + 1)
    memory_end, memory_first = tl.load(program + 2), tl.load(program + 3)
    table = tables + head * table_stride
    bias = Bias(table + (POSITIONS + TIMES) + origin, table, table + POSITIONS, position_edges)
    token = first + tl.arange(0, BLOCK_ROWS)
    prefix = tl.load(row_prefix + token, mask=token < end, other=BEYOND).to(tl.int32)
    clock = tl.load(row_clock + token, mask=token < end, other=0)
    queries = load_block(q + head * QK, first, end, q_stride, BLOCK_ROWS, QK, PADDED_QK, False)
    own_keys = load_block(k_self + head * QK, first, end, k_self_stride, BLOCK_ROWS, QK, PADDED_QK, False)
    own_values = load_block(v_self + head * V, first, end, v_self_stride, BLOCK_ROWS, V, PADDED_V, False)
    own = tl.sum(queries.to(tl.float32) * own_keys.to(tl.float32), 1) * half_alpha
    own += tl.load(bias.position) + tl.load(bias.time)
    total = silu_of_half(own, APPROXIMATE)[:, None] * own_values.to(tl.float32)
    for KIND in tl.static_range(3):
        for at in tl.range(tl.load(program + 4 + KIND), tl.load(program + 5 + KIND)):
            tile = load_tile(entries, at)
            keys = load_block(
                k + head * QK, tile.first, memory_end, k_stride, BLOCK_MEMORY, QK, PADDED_QK, KIND != MIXED
            )
            values = load_block(
                v + head * V, tile.first, memory_end, v_stride, BLOCK_MEMORY, V, PADDED_V, KIND != MIXED
            )
            other = tile.first + tl.arange(0, BLOCK_MEMORY)
            moment = load_times(memory_times, ranks, other, memory_end, KIND)
            half = dot(queries, keys.T, None, PRECISION) * half_alpha
            half = add_bias(
                half,
                bias,
                tile,
                steps,
                prefix,
                clock,
                tile.first - memory_first,
                moment,
                KIND,
                True,
                HAS_POSITION,
                HAS_TIME,
                PTX,
                WINDOW,
                BLOCK_ROWS,
                BLOCK_MEMORY,
            )
            weights = silu_of_half(half, APPROXIMATE).to(values.dtype)
            total = dot(weights, values, total, PRECISION)
    store_block(out + head * V, total, first, end, HEADS * V, BLOCK_ROWS, V, PADDED_V)
