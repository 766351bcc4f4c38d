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
_MOST = tl.constexpr(2**32 - 1)


class Bias(NamedTuple):
    """Pointers to one head's tables, halved."""

    by_difference: Any  # at difference 0
    position: Any
    time: Any
    position_edges: Any  # the least difference of each position bucket, float32
    time_edges: Any  # and of each time bucket, int64


class Tile(NamedTuple):
    """What the plan says of a tile."""

    first: Any  # token of the other side, global
    time_low: Any
    time_high: Any
    position_low: Any
    position_high: Any
    before: Any  # a millisecond before the other side's earliest time


@triton.jit
def load_tile(entries, at):
    entry = entries + at * 3
    packed = tl.load(entry + 1)
    low, high = packed.to(tl.int32), (packed >> 32).to(tl.int32)
    return Tile(
        tl.load(entry).to(tl.int32), low & 0xFF, (low >> 8) & 0xFF, low >> 16, high, tl.load(entry + 2)
    )


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
    """`total` plus the product of two matrices. "widened" is for the interpreter, which multiplies bf16's bits."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def offset(time, since):
    """Milliseconds from `since` to `time`, held to what uint32 holds."""
    return tl.minimum(tl.maximum(time - since, 0), _MOST).to(tl.uint32)


@triton.jit
def over(x, rows_first: tl.constexpr, rows: tl.constexpr):
    """A vector of a tile's rows, or of its memory, along its axis of the tile."""
    if rows_first == rows:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def gather(table, index, PTX: tl.constexpr):
    """table[index] of a float32 table that stays in L1, in the layout of `index`.

    `tl.load` would be given a layout of its own, and its result a detour through shared memory.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 at; mad.wide.s32 at, $1, 4, $2; ld.global.nc.f32 $0, [at]; }",
            "=f,r,l",
            [index, table.to(tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(table + index)


@triton.jit
def add_where_less(x, a, b, step, PTX: tl.constexpr):
    """x + step where a < b, both uint32, else x: a comparison and an addition under its predicate."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .pred less; setp.lt.u32 less, $2, $3; mov.f32 $0, $1; @less add.f32 $0, $1, $4; }",
            "=f,f,r,r,f",
            [x, a, b, step],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return x + tl.where(a < b, step, 0.0)


@triton.jit
def load_times(times, offsets, token, end, KIND: tl.constexpr):
    """What is compared of tokens' times in a tile of a kind: their offsets, or the times."""
    if KIND == MIXED:
        return tl.load(times + token, mask=token < end, other=0)
    else:
        return tl.load(offsets + token).to(tl.uint32, bitcast=True)


@triton.jit
def add_bias(
    half,
    bias,
    tile,
    prefix,  # of the tile's rows
    clock,  # of its rows, or what `load_times` gives of them if not ROWS_FIRST
    position,  # of its memory tokens, in their sequence
    moment,  # of its memory tokens, or what `load_times` gives of them if ROWS_FIRST
    KIND: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr,
    PTX: tl.constexpr,
):
    """Half the scores plus half the biases of (rows, memory), or of (memory, rows) if not ROWS_FIRST."""
    if KIND == UNIFORM:
        return half + (tl.load(bias.position + tile.position_low) + tl.load(bias.time + tile.time_low))
    if KIND == MIXED or HAS_POSITION:
        back = over(position, ROWS_FIRST, False) - over(prefix, ROWS_FIRST, True)
        half += gather(bias.by_difference, back, PTX)
    if KIND == MIXED and HAS_TIME:
        passed = over(clock, ROWS_FIRST, True) - over(moment, ROWS_FIRST, False)
        rounded = passed.to(tl.float32).to(tl.int32, bitcast=True)
        half += gather(bias.time - TIME_OFFSET, tl.maximum(rounded >> TIME_SHIFT, TIME_OFFSET), PTX)
    if KIND == STEPPED and HAS_TIME:
        # From the last bucket down, a step where a pair is in an earlier one.
        half += tl.load(bias.time + tile.time_high)
        for STEP in tl.static_range(MOST_STEPS):
            bucket = tl.maximum(tile.time_high - STEP, tile.time_low)
            below = tl.maximum(bucket - 1, tile.time_low)
            step = tl.load(bias.time + below) - tl.load(bias.time + bucket)
            less, more = time_compared(bias, tile, clock, moment, bucket, ROWS_FIRST)
            half = add_where_less(half, less, more, step, PTX)
    return half


@triton.jit
def time_compared(bias, tile, clock, moment, bucket, ROWS_FIRST: tl.constexpr):
    """A pair of a stepped tile is in a bucket before `bucket` where the first is less than the second.

    Arithmetic is done on what varies along axis 0, of which a thread holds little.
    """
    edge = tl.load(bias.time_edges + bucket)
    if ROWS_FIRST:
        return offset(clock - edge, tile.before)[:, None], moment[None, :]
    else:
        return clock[None, :], offset(moment + edge, tile.before)[:, None]
