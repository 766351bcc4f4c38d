"""`kernels.paged` for a GPU: a program is a tile of a sequence's rows and a head, and goes through its pages.

    o_i = Σ_{j < prefix_i} SiLU(α q_i·k_j + b(i, j)) v_j  +  SiLU(α q_i·k_self_i + b(i, i)) v_self_i

The candidates of a request have one prefix and one time, so that all rows of a tile have the same bias on a
memory token: those tiles (UNIFORM) look it up once a token instead of once a pair. Which tile is which is
found from the rows themselves; each kind is a launch of its own, so that one does not pay for the other's
registers. Nothing a row's sum goes through depends on the rest of its tile or on other sequences (law 2).
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import jagged
from kernels.buckets import position_bits
from kernels.paged import PagedSight
from kernels.triton_bias import UNSEEN, position_bucket, silu_of_half, time_bucket

_UNSEEN = tl.constexpr(UNSEEN)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _bias(
    position_table,
    time_table,
    difference,
    passed,
    HEADS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_TIME: tl.constexpr,
):
    """The bias of pairs that lie so many tokens and milliseconds apart."""
    if BITS > 0:
        bias = tl.load(position_table + position_bucket(difference, BITS) * HEADS).to(tl.float32)
        if HAS_TIME:
            bias += tl.load(time_table + time_bucket(passed) * HEADS).to(tl.float32)
    elif HAS_TIME:
        bias = tl.load(time_table + time_bucket(passed) * HEADS).to(tl.float32)
    else:
        bias = tl.zeros(difference.shape, tl.float32)
    return bias


@triton.jit
def paged_kernel(
    q,  # (R, H, QK), its rows q_stride apart; so are k_self, and v_self (R, H, V)
    k_self,
    v_self,
    k_pages,  # (P, PAGE, H, QK)
    v_pages,  # (P, PAGE, H, V)
    page_times,  # (P, PAGE)
    pages,
    row_prefix,  # (R,)
    row_clock,  # (R,)
    tiles,  # (T, 4): first row, row after the last, first of the sequence's pages, tokens seen
    out,  # (R, H, V) contiguous
    position_table,  # (position_rows(BITS), H)
    time_table,  # (TIME_BUCKETS, H)
    q_stride,
    k_self_stride,
    v_self_stride,
    k_page_stride,
    k_token_stride,
    k_head_stride,
    v_page_stride,
    v_token_stride,
    v_head_stride,
    alpha,
    HEADS: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    PADDED_QK: tl.constexpr,
    PADDED_V: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_MEMORY: tl.constexpr,
    BITS: tl.constexpr,  # of the position buckets; 0 without
    HAS_TIME: tl.constexpr,
    UNIFORM: tl.constexpr,
    SOFTMAX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, head = tiles + tl.program_id(0) * 4, tl.program_id(1)
    first, end = tl.load(tile), tl.load(tile + 1)
    own_pages, seen = pages + tl.load(tile + 2), tl.load(tile + 3)
    k_pages += head.to(tl.int64) * k_head_stride
    v_pages += head.to(tl.int64) * v_head_stride
    position_table += head
    time_table += head

    row = first + tl.arange(0, BLOCK_ROWS)
    real = row < end
    row = row.to(tl.int64)
    column, value_column = tl.arange(0, PADDED_QK), tl.arange(0, PADDED_V)
    within, value_within = (column < QK)[None, :], (value_column < V)[None, :]
    of_row = head * QK + column[None, :]
    queries = tl.load(q + row[:, None] * q_stride + of_row, mask=real[:, None] & within, other=0)
    own_keys = tl.load(k_self + row[:, None] * k_self_stride + of_row, mask=real[:, None] & within, other=0)
    of_row = head * V + value_column[None, :]
    own_values = tl.load(
        v_self + row[:, None] * v_self_stride + of_row, mask=real[:, None] & value_within, other=0
    ).to(tl.float32)

    own = tl.sum(queries.to(tl.float32) * own_keys.to(tl.float32), 1) * alpha
    if BITS > 0:
        own += tl.load(position_table).to(tl.float32)
    if HAS_TIME:
        own += tl.load(time_table).to(tl.float32)
    highest, mass = own * _LOG2E, tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if SOFTMAX:
        total = own_values
    else:
        total = silu_of_half(0.5 * own, APPROXIMATE)[:, None] * own_values

    if UNIFORM:
        prefix, clock = tl.load(row_prefix + first).to(tl.int32), tl.load(row_clock + first)
    else:
        prefix = tl.load(row_prefix + row, mask=real, other=0).to(tl.int32)[:, None]
        clock = tl.load(row_clock + row, mask=real, other=0)[:, None]
    PAGE_BITS: tl.constexpr = PAGE.bit_length() - 1
    scale = alpha * (_LOG2E if SOFTMAX else 0.5)
    for start in range(0, seen, BLOCK_MEMORY):
        token = start + tl.arange(0, BLOCK_MEMORY)
        there = token < seen
        if PAGE >= BLOCK_MEMORY:
            page = tl.load(own_pages + (start >> PAGE_BITS))
        else:
            page = tl.load(own_pages + (token >> PAGE_BITS), mask=there, other=0)
        place = token & (PAGE - 1)
        keys = tl.load(
            k_pages + (page * k_page_stride + place * k_token_stride)[:, None] + column[None, :],
            mask=there[:, None] & within,
            other=0,
        )
        values = tl.load(
            v_pages + (page * v_page_stride + place * v_token_stride)[:, None] + value_column[None, :],
            mask=there[:, None] & value_within,
            other=0,
        )
        moment = tl.load(page_times + page * PAGE + place, mask=there, other=0)
        if not UNIFORM:
            token, moment = token[None, :], moment[None, :]
        difference = prefix - token
        bias = _bias(position_table, time_table, difference, clock - moment, HEADS, BITS, HAS_TIME)
        bias *= _LOG2E if SOFTMAX else 0.5
        if SOFTMAX or not UNIFORM:  # otherwise what is out of sight has a value of 0
            bias = tl.where(difference > 0, bias, _UNSEEN)
        if UNIFORM:
            bias = bias[None, :]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + bias
        if SOFTMAX:
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights, fading = tl.exp2(scores - higher[:, None]), tl.exp2(highest - higher)
            highest, mass = higher, mass * fading + tl.sum(weights, 1)
            total *= fading[:, None]
        else:
            weights = silu_of_half(scores, APPROXIMATE)
        total = tl.dot(weights.to(values.dtype), values, total, input_precision=PRECISION)
    if SOFTMAX:
        total /= mass[:, None]
    at = row[:, None] * (HEADS * V) + head * V + value_column[None, :]
    tl.store(out + at, total, mask=real[:, None] & value_within)


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a tile is cut: what compiles without spilling registers, which a test asserts."""

    rows: int
    memory: int  # tokens at a time; a page, where that is smaller
    warps: int
    stages: int
    precision: str = "ieee"  # of products of fp32


def shape(dtype: torch.dtype, widest: int, uniform: bool, hip: bool) -> Shape:
    """For heads that are `widest` wide and pages of `dtype`. `rows` is the same for both kinds of tiles.

    fp32 runs on NVIDIA's tensor cores as three products of TF32, whose error is 2^-22 where that of one would
    be 2^-11; AMD's multiply fp32 itself.
    """
    narrow, wide = dtype != torch.float32, widest > 128
    if hip:
        if narrow:
            return Shape(32 if wide else 64, 32, 4, 1)
        return Shape(32, 16 if wide else 32, 4, 1)
    if narrow:
        return Shape(64, 64 if uniform else 32, 8 if wide else 4, 2 if wide else 3)
    if wide:
        return Shape(
            16, 16, 8, 2, "tf32x3"
        )  # with pages of 16 tokens it spills some 30 registers all the same
    return Shape(32, 32 if uniform else 16, 8, 2, "tf32x3")


def attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    sight: PagedSight,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    alpha: float,
    softmax: bool,
) -> Tensor:
    rows, heads, width = q.shape
    value_width = v_pages.shape[-1]
    if k_pages.stride(-1) != 1 or v_pages.stride(-1) != 1:
        raise ValueError("the last dimension of k_pages and v_pages must be contiguous")
    q, k_self, v_self = (_by_row(x.to(k_pages.dtype)) for x in (q, k_self, v_self))
    out = torch.empty(rows, heads, value_width, dtype=torch.float32, device=q.device)
    padded_qk, padded_v = (max(16, triton.next_power_of_2(x)) for x in (width, value_width))
    hip = torch.version.hip is not None
    shapes = {kind: shape(k_pages.dtype, max(padded_qk, padded_v), kind, hip) for kind in (True, False)}
    for uniform, tiles in sight.planned(_tiles, shapes[True].rows):
        if not len(tiles):
            continue
        cut = shapes[uniform]
        paged_kernel[(len(tiles), heads)](
            q,
            k_self,
            v_self,
            k_pages,
            v_pages,
            sight.page_times.contiguous(),
            sight.pages,
            sight.row_prefix,
            sight.row_clock,
            tiles,
            out,
            out if position_bias is None else position_bias.contiguous(),
            out if time_bias is None else time_bias.contiguous(),
            *(x.stride(0) for x in (q, k_self, v_self)),
            *k_pages.stride()[:3],
            *v_pages.stride()[:3],
            alpha,
            HEADS=heads,
            QK=width,
            V=value_width,
            PADDED_QK=padded_qk,
            PADDED_V=padded_v,
            PAGE=sight.page_tokens,
            BLOCK_ROWS=cut.rows,
            BLOCK_MEMORY=min(cut.memory, sight.page_tokens),
            BITS=0 if position_bias is None else position_bits(len(position_bias)),
            HAS_TIME=time_bias is not None,
            UNIFORM=uniform,
            SOFTMAX=softmax,
            APPROXIMATE=k_pages.dtype != torch.float32 and q.is_cuda and not hip,
            PRECISION=cut.precision,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return out


def _tiles(sight: PagedSight, block: int) -> tuple[tuple[bool, Tensor], tuple[bool, Tensor]]:
    """The uniform tiles and the others, those with most work first: (T, 4) int32 each."""
    counts = (sight.row_lengths + block - 1) // block
    total = int(counts.sum())
    owner, rows = jagged.owners(counts, total), jagged.starts(sight.row_lengths)
    first = rows[owner] + jagged.positions(counts, total) * block
    end = torch.minimum(first + block, (rows + sight.row_lengths)[owner])
    tile = jagged.owners(end - first, len(sight.row_prefix))

    def extreme(values: Tensor, which: str) -> Tensor:
        return torch.zeros_like(first).scatter_reduce_(0, tile, values, which, include_self=False)

    seen = extreme(sight.row_prefix, "amax")
    uniform = seen == extreme(sight.row_prefix, "amin")
    uniform &= extreme(sight.row_clock, "amax") == extreme(sight.row_clock, "amin")
    tiles = torch.stack((first, end, sight.page_starts[owner], seen), 1).to(torch.int32)
    tiles = tiles[torch.argsort(seen + (uniform.long() << 32), descending=True, stable=True)]
    first_mixed = int(uniform.sum())
    return (True, tiles[:first_mixed]), (False, tiles[first_mixed:])


def _by_row(x: Tensor) -> Tensor:
    """(R, H, d) with a row's heads side by side; the rows may lie apart, as slices of a projection do."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
