"""The backward kernels, which compute the scores again and keep no pair in memory.

With s_ij = α q_i·k_j + b(i, j), w = SiLU(s), and e_ij = SiLU'(s_ij) · (∂o_i · v_j):

    ∂q_i = α Σ_j e_ij k_j     ∂k_j = α Σ_i e_ij q_i     ∂v_j = Σ_i w_ij ∂o_i     ∂table[x] = Σ_{b(i,j)=x} e_ij

`backward_rows` is a program a block of rows: ∂q, what belongs to the rows' own pairs, and a row of sums for
the tables' gradients, which nothing else writes to, so that adding the rows up has one order.
`backward_memory` is a program a block of memory: ∂k and ∂v. Nothing is written by two programs, so results
never differ from run to run. The kernels have 2 · e, one factor less an element; it goes at the end.
"""

import triton
import triton.language as tl

from kernels.triton_bias import silu_of_half_and_slope
from kernels.triton_pairs import (
    BEYOND,
    MIXED,
    STEPPED,
    UNIFORM,
    Bias,
    add_bias,
    dot,
    load_block,
    load_step,
    load_tile,
    load_times,
    store_block,
)

BUCKETS = tl.constexpr(64)  # of a mixed tile that are summed at a time


@triton.jit(do_not_specialize=["octave"])
def backward_rows(
    q,  # (R, H, QK), its rows q_stride apart; so are k_self, and v_self (R, H, V)
    k,  # (M, H, QK)
    v,  # (M, H, V)
    k_self,
    v_self,
    gradient,  # (R, H, V) contiguous, as those that follow
    q_gradient,  # (R, H, QK)
    k_self_gradient,  # (R, H, QK)
    v_self_gradient,  # (R, H, V)
    sums,  # (programs, H, POSITIONS + TIMES) fp32 zeros: the tables' gradients
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
    MIXED_SUMS: tl.constexpr,  # nothing but the tables' gradients from mixed tiles; else everything but those
):
    program, head = programs + tl.program_id(0) * 8, tl.program_id(1)
    first, end = tl.load(program), tl.load(program + 1)
    memory_end, memory_first = tl.load(program + 2), tl.load(program + 3)
    table = tables + head * table_stride
    bias = Bias(table + (POSITIONS + TIMES) + origin, table, table + POSITIONS, position_edges)
    position_sums = sums + (tl.program_id(0).to(tl.int64) * HEADS + head) * (POSITIONS + TIMES)
    time_sums = position_sums + POSITIONS
    token = first + tl.arange(0, BLOCK_ROWS)
    prefix = tl.load(row_prefix + token, mask=token < end, other=BEYOND).to(tl.int32)
    clock = tl.load(row_clock + token, mask=token < end, other=0)
    queries = load_block(q + head * QK, first, end, q_stride, BLOCK_ROWS, QK, PADDED_QK, False)
    errors = load_block(gradient + head * V, first, end, HEADS * V, BLOCK_ROWS, V, PADDED_V, False)

    if not MIXED_SUMS:
        # The rows' own pairs, whose biases are the tables' first.
        own_values = load_block(v_self + head * V, first, end, v_self_stride, BLOCK_ROWS, V, PADDED_V, False)
        own_error = tl.sum(errors.to(tl.float32) * own_values.to(tl.float32), 1)
        own_keys = load_block(k_self + head * QK, first, end, k_self_stride, BLOCK_ROWS, QK, PADDED_QK, False)
        own = tl.sum(queries.to(tl.float32) * own_keys.to(tl.float32), 1) * half_alpha
        own += tl.load(bias.position) + tl.load(bias.time)
        own_weight, own_slope = silu_of_half_and_slope(own, APPROXIMATE)
        own_error += own_error * own_slope
        total = own_error[:, None] * own_keys.to(tl.float32)
        own_values = own_weight[:, None] * errors.to(tl.float32)
        store_block(v_self_gradient + head * V, own_values, first, end, HEADS * V, BLOCK_ROWS, V, PADDED_V)
        own_queries = (own_error * half_alpha)[:, None] * queries.to(tl.float32)
        k_self_gradient += head * QK
        store_block(k_self_gradient, own_queries, first, end, HEADS * QK, BLOCK_ROWS, QK, PADDED_QK)
        own_sum = tl.sum(own_error)
        tl.atomic_add(position_sums, own_sum, sem="relaxed")
        tl.atomic_add(time_sums, own_sum, sem="relaxed")

    for KIND in tl.static_range(MIXED if MIXED_SUMS else UNIFORM, MIXED + 1):
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
            _, slope = silu_of_half_and_slope(half, APPROXIMATE)
            error = dot(errors, values.T, None, PRECISION)
            error += error * slope
            if not MIXED_SUMS:
                total = dot(error.to(keys.dtype), keys, total, PRECISION)
            if KIND == UNIFORM:
                sum_ = tl.sum(error)
                if HAS_POSITION:
                    tl.atomic_add(position_sums + tile.position_low, sum_, sem="relaxed")
                if HAS_TIME:
                    tl.atomic_add(time_sums + tile.time_low, sum_, sem="relaxed")
            elif KIND == STEPPED:
                if HAS_TIME:
                    add_time_sums(time_sums, error, tile, steps, moment, BLOCK_ROWS)
                if HAS_POSITION:
                    ahead = prefix - (tile.first - memory_first)
                    add_position_sums(position_sums, error, bias, tile, ahead, BLOCK_MEMORY)
            elif MIXED_SUMS:
                add_mixed_sums(
                    position_sums,
                    time_sums,
                    error,
                    keys.dtype,
                    bias,
                    tile,
                    steps,
                    prefix - (tile.first - memory_first),
                    tl.load(ranks + other, mask=other < memory_end, other=0),
                    HAS_POSITION,
                    HAS_TIME,
                    PRECISION,
                    BLOCK_ROWS,
                    BLOCK_MEMORY,
                )
    if not MIXED_SUMS:
        total *= half_alpha
        store_block(q_gradient + head * QK, total, first, end, HEADS * QK, BLOCK_ROWS, QK, PADDED_QK)


@triton.jit
def add_position_sums(sums, error, bias, tile, prefix, BLOCK_MEMORY: tl.constexpr):
    """Adds a tile's errors up by bucket of position: what reaches one, less what reaches the next.

    `prefix` counts from the tile's first memory token.
    """
    sum_ = tl.sum(error)
    if tile.position_low < tile.position_high:
        position = tl.arange(0, BLOCK_MEMORY).to(tl.float32)
        for bucket in tl.range(tile.position_low + 1, tile.position_high + 1):
            reach = prefix.to(tl.float32) - tl.load(bias.position_edges + bucket)
            later = tl.sum(error * (position[None, :] <= reach[:, None]).to(tl.float32))
            tl.atomic_add(sums + bucket - 1, sum_ - later, sem="relaxed")
            sum_ = later
    tl.atomic_add(sums + tile.position_high, sum_, sem="relaxed")


@triton.jit
def add_time_sums(sums, error, tile, steps, rank, BLOCK_ROWS: tl.constexpr):
    """The same by bucket of time, of a stepped tile."""
    sum_ = tl.sum(error)
    if tile.time_low < tile.time_high:
        for bucket in tl.range(tile.time_low + 1, tile.time_high + 1):
            step = load_step(steps, tile, tile.time_high - bucket, BLOCK_ROWS)
            reached = rank.to(tl.float32)[None, :] <= step.to(tl.float32)[:, None]
            later = tl.sum(error * reached.to(tl.float32))
            tl.atomic_add(sums + bucket - 1, sum_ - later, sem="relaxed")
            sum_ = later
    tl.atomic_add(sums + tile.time_high, sum_, sem="relaxed")


@triton.jit
def add_mixed_sums(
    position_sums,
    time_sums,
    error,
    DTYPE: tl.constexpr,
    bias,
    tile,
    steps,
    prefix,  # counted from the tile's first memory token
    rank,
    HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_MEMORY: tl.constexpr,
):
    """Both sums of a tile with many buckets.

    In the order of position, or of time, what a row has in a bucket or an earlier one is what is left of the
    row from some token on. The product of a triangle of ones has what is left from every token on, and a
    bucket takes a look there for each row. All of it lies (memory or buckets, rows).
    """
    column, some = tl.arange(0, BLOCK_MEMORY), tl.arange(0, BUCKETS)
    if HAS_POSITION:
        left = sums_over(column[None, :] >= column[:, None], error, DTYPE, PRECISION)
        sum_ = 0.0
        for low in tl.range(tile.position_low, tile.position_high + 1, BUCKETS):
            bucket = low + some
            edge = tl.load(
                bias.position_edges + bucket + 1, mask=bucket < tile.position_high, other=BEYOND
            ).to(tl.int32)
            first = tl.maximum(prefix[None, :] - edge[:, None] + 1, 0)
            sum_ = add_differences(position_sums, left, first, bucket, tile.position_high, sum_, BLOCK_MEMORY)
    if HAS_TIME:
        left = sums_over(rank[None, :] >= column[:, None], error, DTYPE, PRECISION)
        sum_ = 0.0
        for low in tl.range(tile.time_low, tile.time_high + 1, BUCKETS):
            bucket = low + some
            step = (tile.steps + tile.time_high - 1 - bucket)[:, None] * BLOCK_ROWS
            at = steps + step + tl.arange(0, BLOCK_ROWS)[None, :]
            first = tl.load(at, mask=(bucket < tile.time_high)[:, None], other=-1).to(tl.int32) + 1
            sum_ = add_differences(time_sums, left, first, bucket, tile.time_high, sum_, BLOCK_MEMORY)


@triton.jit
def sums_over(chosen, error, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """For each row of `chosen` (…, memory) the sum of what it chooses of each row of `error`: (…, rows)."""
    ones = chosen.to(tl.float32).to(DTYPE)  # the interpreter turns no bool to bf16
    return dot(ones, error.to(DTYPE).T, None, PRECISION)


@triton.jit
def add_differences(sums, left, first, bucket, high, before, BLOCK_MEMORY: tl.constexpr):
    """Adds to each bucket what is `left` from its `first` on, less the same of the bucket before.

    Returns that of the last one.
    """
    found = tl.gather(left, tl.minimum(first, BLOCK_MEMORY - 1), 0)
    sum_ = tl.sum(tl.where(first < BLOCK_MEMORY, found, 0.0), 1)
    some = tl.arange(0, BUCKETS)
    last = tl.gather(sum_, tl.maximum(some - 1, 0), 0)
    difference = sum_ - tl.where(some > 0, last, before)
    tl.atomic_add(sums + bucket, difference, mask=bucket <= high, sem="relaxed")
    return tl.sum(tl.where(some == BUCKETS - 1, sum_, 0.0))


@triton.jit(do_not_specialize=["octave"])
def backward_memory(
    q,  # (R, H, QK), its rows q_stride apart
    k,  # (M, H, QK)
    v,  # (M, H, V)
    gradient,  # (R, H, V) contiguous, as those that follow
    k_gradient,  # (M, H, QK)
    v_gradient,  # (M, H, V)
    q_stride,
    k_stride,
    v_stride,
    row_prefix,  # (R,)
    row_clock,  # (R,)
    memory_times,  # (M,)
    programs,  # of memory, as triton_tiles.Tiles has them
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
    row_end, memory_first = tl.load(program + 2), tl.load(program + 3)
    table = tables + head * table_stride
    bias = Bias(table + (POSITIONS + TIMES) + origin, table, table + POSITIONS, position_edges)
    token = first + tl.arange(0, BLOCK_MEMORY)
    moment = tl.load(memory_times + token, mask=token < end, other=0)
    keys = load_block(k + head * QK, first, end, k_stride, BLOCK_MEMORY, QK, PADDED_QK, False)
    values = load_block(v + head * V, first, end, v_stride, BLOCK_MEMORY, V, PADDED_V, False)
    key_total = tl.zeros((BLOCK_MEMORY, PADDED_QK), tl.float32)
    value_total = tl.zeros((BLOCK_MEMORY, PADDED_V), tl.float32)
    for KIND in tl.static_range(3):
        for at in tl.range(tl.load(program + 4 + KIND), tl.load(program + 5 + KIND)):
            tile = load_tile(entries, at)
            queries = load_block(
                q + head * QK, tile.first, row_end, q_stride, BLOCK_ROWS, QK, PADDED_QK, KIND != MIXED
            )
            errors = load_block(
                gradient + head * V, tile.first, row_end, HEADS * V, BLOCK_ROWS, V, PADDED_V, KIND != MIXED
            )
            other = tile.first + tl.arange(0, BLOCK_ROWS)
            prefix = tl.load(row_prefix + other, mask=other < row_end, other=BEYOND).to(tl.int32)
            clock = load_times(row_clock, ranks, other, row_end, KIND)
            half = dot(keys, queries.T, None, PRECISION) * half_alpha
            half = add_bias(
                half,
                bias,
                tile,
                steps,
                prefix,
                clock,
                first - memory_first,
                moment,
                KIND,
                False,
                HAS_POSITION,
                HAS_TIME,
                PTX,
                WINDOW,
                BLOCK_ROWS,
                BLOCK_MEMORY,
            )
            weights, slope = silu_of_half_and_slope(half, APPROXIMATE)
            error = dot(values, errors.T, None, PRECISION)
            value_total = dot(weights.to(errors.dtype), errors, value_total, PRECISION)
            error += error * slope
            key_total = dot(error.to(queries.dtype), queries, key_total, PRECISION)
    key_total *= half_alpha
    store_block(k_gradient + head * QK, key_total, first, end, HEADS * QK, BLOCK_MEMORY, QK, PADDED_QK)
    store_block(v_gradient + head * V, value_total, first, end, HEADS * V, BLOCK_MEMORY, V, PADDED_V)
