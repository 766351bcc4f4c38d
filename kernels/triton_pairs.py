"""What the attention kernels do to a tile of pairs: load its tokens and add its biases.

Scores are halved on their way, since SiLU is taken at half its argument (`triton_bias`), and so are the
tables that come in here. The bias of position is read by difference, not by bucket: a table of one head holds
that of difference x at -x, and UNSEEN where x ≤ 0, which takes pairs out of sight at no cost.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels import triton_tiles
from kernels.triton_bias import TIME_OFFSET, TIME_SHIFT

UNIFORM = tl.constexpr(triton_tiles.UNIFORM)
STEPPED = tl.constexpr(triton_tiles.STEPPED)
MIXED = tl.constexpr(triton_tiles.MIXED)
MOST_STEPS = tl.constexpr(triton_tiles.MOST_STEPS)
BEYOND = tl.constexpr(1 << 30)  # prefix of a row that is not there
TIME_ROWS = tl.constexpr(128)  # of the longer table of times


class Bias(NamedTuple):
    """Pointers to one head's tables, halved."""

    by_difference: Any  # at difference 0
    position: Any
    time: Any
    position_edges: Any  # the least difference of each position bucket, float32


class Tile(NamedTuple):
    """What the plan says of a tile."""

    first: Any  # token of the other side, global
    time_low: Any
    time_high: Any
    position_low: Any
    position_high: Any
    most: Any  # that one of its rows sees
    steps: Any  # where its steps begin


@triton.jit
def load_tile(entries, at):
    entry = entries + at * 4
    first, packed = tl.load(entry).to(tl.int32), tl.load(entry + 1)
    low, high = packed.to(tl.int32), (packed >> 32).to(tl.int32)
    most, steps = tl.load(entry + 2).to(tl.int32), tl.load(entry + 3).to(tl.int32)
    return Tile(first, low & 0xFF, (low >> 8) & 0xFF, low >> 16, high, most, steps)


@triton.jit
def load_block(
    base,
    first,
    end,
    stride,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Tokens [first, first + BLOCK) of a head: (BLOCK, PADDED), zero from `end` on and from column WIDTH on.

    WHOLE says that the block does not reach past `end`.
    """
    token, column = tl.arange(0, BLOCK), tl.arange(0, PADDED)
    at = base + first.to(tl.int64) * stride + token[:, None] * stride + column[None, :]
    if WHOLE and PADDED == WIDTH:
        return tl.load(at)
    if WHOLE:
        return tl.load(at, mask=(column < WIDTH)[None, :], other=0.0)
    if PADDED == WIDTH:
        return tl.load(at, mask=(first + token < end)[:, None], other=0.0)
    return tl.load(at, mask=(first + token < end)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_block(
    base, value, first, end, stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """The inverse of `load_block`: what lies past `end` or WIDTH is not written."""
    token, column = tl.arange(0, BLOCK), tl.arange(0, PADDED)
    at = base + first.to(tl.int64) * stride + token[:, None] * stride + column[None, :]
    mask = (first + token < end)[:, None] & (column < WIDTH)[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """`total` plus a product; "widened" for the interpreter, which multiplies the bits of bf16."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def over(x, rows_first: tl.constexpr, rows: tl.constexpr):
    """A vector of a tile's rows, or of its memory, along its axis of the tile."""
    if rows_first == rows:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def look_up(table, index):
    """table[index] for a vector and a matrix, through shared memory and in the layout of `index`."""
    found = tl.gather(table, tl.reshape(index, [index.shape[0] * index.shape[1]]), 0)
    return tl.reshape(found, index.shape)


@triton.jit
def add_where_less(x, a, b, step, PTX: tl.constexpr):
    """x + step where a < b, both int32, else x: a comparison and an addition under its predicate."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .pred less; setp.lt.s32 less, $2, $3; mov.f32 $0, $1; @less add.f32 $0, $1, $4; }",
            "=f,f,r,r,f",
            [x, a, b, step],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return x + tl.where(a < b, step, 0.0)


@triton.jit
def load_times(times, ranks, token, end, KIND: tl.constexpr):
    """What is compared of tokens' times in a tile of a kind: their ranks, or the times."""
    if KIND == MIXED:
        return tl.load(times + token, mask=token < end, other=0)
    else:
        return tl.load(ranks + token)


@triton.jit
def load_step(steps, tile, step, BLOCK: tl.constexpr):
    """What ranks are compared with to part a tile's pairs, for each of the program's own tokens."""
    at = (tile.steps + step) * BLOCK + tl.arange(0, BLOCK)
    return tl.load(steps + at).to(tl.int32)


@triton.jit
def time_row(passed):
    """Where in the longer table of times a difference is: its bucket, had the last one an end."""
    rounded = passed.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.maximum(rounded >> TIME_SHIFT, TIME_OFFSET) - TIME_OFFSET


@triton.jit
def add_bias(
    half,
    bias,
    tile,
    steps,  # the plan's
    prefix,  # of the tile's rows
    clock,  # of its rows, or what `load_times` gives of them if not ROWS_FIRST
    position,  # of its first memory token, in its sequence
    moment,  # of its memory tokens, or what `load_times` gives of them if ROWS_FIRST
    KIND: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr,
    PTX: tl.constexpr,
    WINDOW: tl.constexpr,  # a power of 2 that the differences of any tile's pairs fit
    BLOCK_ROWS: tl.constexpr,
    BLOCK_MEMORY: tl.constexpr,
):
    """Half the scores plus half the biases of (rows, memory), or of (memory, rows) if not ROWS_FIRST."""
    if KIND == UNIFORM:
        return half + (tl.load(bias.position + tile.position_low) + tl.load(bias.time + tile.time_low))
    if KIND == MIXED and HAS_TIME:
        passed = over(clock, ROWS_FIRST, True) - over(moment, ROWS_FIRST, False)
        half += look_up(tl.load(bias.time + tl.arange(0, TIME_ROWS)), time_row(passed))
    if KIND == MIXED or HAS_POSITION:
        # The differences in a tile lie side by side; rows past the end are like the one that sees most.
        ahead = tl.maximum(tile.most - prefix, 0)
        window = bias.by_difference + (position - tile.most) + tl.arange(0, WINDOW)
        index = over(ahead, ROWS_FIRST, True) + over(tl.arange(0, BLOCK_MEMORY), ROWS_FIRST, False)
        half += look_up(tl.load(window), index)
    if KIND == STEPPED and HAS_TIME:
        # From the last bucket down, a step where a pair is in an earlier one.
        half += tl.load(bias.time + tile.time_high)
        for STEP in tl.static_range(MOST_STEPS):
            bucket = tl.maximum(tile.time_high - STEP, tile.time_low)
            below = tl.maximum(bucket - 1, tile.time_low)
            step = tl.load(bias.time + below) - tl.load(bias.time + bucket)
            if ROWS_FIRST:
                half = add_where_less(
                    half, load_step(steps, tile, STEP, BLOCK_ROWS)[:, None], moment[None, :], step, PTX
                )
            else:
                half = add_where_less(
                    half, clock[None, :], load_step(steps, tile, STEP, BLOCK_MEMORY)[:, None], step, PTX
                )
    return half
