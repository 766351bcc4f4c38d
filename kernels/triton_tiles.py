"""Which tiles of pairs there are, and what each one's biases look like: the plan of the Triton kernels.

A tile is up to `block_rows` rows of a sequence against up to `block_memory` of its memory tokens. Both biases
are bucketed by logarithm, so away from the diagonal a tile holds few buckets, often one of each. From the
least and greatest position and time of a tile's rows and memory, whatever their order, follows the range of
buckets it can hold, and with it the cheapest arithmetic that is still exact:

    UNIFORM  one position bucket and one time bucket, every pair in sight: one scalar is added
    STEPPED  every pair in sight and few time buckets: each adds a step where a pair's times reach its edge
    MIXED    anything else: pairs out of sight, many buckets

Where a step lies is a number of tokens, whatever the times: tokens have ranks by time within their block, and
a pair has reached a bucket's edge where the one's rank is at least, or at most, what a search for the other's
time plus or minus the edge finds.

Tiles without a pair in sight are left out. What belongs to a program (a tile of rows with all its tiles of
memory, or the other way round) is listed kind by kind, programs with most work first. The plan depends on
lengths, prefixes and times alone: it serves all heads and layers of a pass.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from kernels import jagged
from kernels.buckets import TIME_BUCKETS, position_bucket, position_rows, time_bucket
from kernels.sight import Sight

UNIFORM, STEPPED, MIXED = range(3)
MOST_STEPS = 2  # of a stepped tile: a step takes 2 instructions a pair, looking a time's bias up about 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Programs and the tiles each goes through, for one block size. All on the sight's device."""

    # (P, 8) int32: a program's own first token and end, the end of the sequence's other side, the start of
    # its memory, then in `entries` where each kind's tiles begin and the last one's end.
    programs: Tensor
    # (E, 4) int64: the other side's first token; the least and greatest bucket of time and of position, in 8,
    # 8, 16 and 32 bits; the most memory tokens that one of its rows sees; where in `steps` its own begin.
    entries: Tensor
    ranks: Tensor  # (elements of the other side,) int32: their places in their blocks by time
    # (steps, block) int16, for each of a program's own tokens: what its neighbours' ranks are compared with.
    # Step x of a tile parts the pairs in buckets before the last but x from the others. A stepped tile has
    # MOST_STEPS, a mixed one as many as it has edges of buckets, if sums by bucket were asked for.
    steps: Tensor
    window: int  # the most differences of position in a tile, out of sight or not


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """One side of the pairs cut into blocks: where each begins and ends, and its range of times."""

    sequence: Tensor  # (B,)
    first: Tensor  # (B,) global index
    end: Tensor  # (B,)
    of_element: Tensor  # (elements,) block of each
    times: Tensor  # (elements,)
    count: Tensor  # (S,) blocks of each sequence
    earliest: Tensor  # (B,)
    latest: Tensor  # (B,)


@functools.cache
def edges(bits: int | None) -> Tensor:
    """The least difference of each bucket: (buckets,) int64, of time, or of position with 2^bits an octave.

    An empty bucket has its successor's. Found by bisection, so `kernels.buckets` alone defines them.
    """
    bucket = torch.arange(TIME_BUCKETS if bits is None else position_rows(bits))
    low, high = torch.zeros_like(bucket), torch.full_like(bucket, 2**62)
    for _ in range(63):
        middle = (low + high) >> 1
        reached = (time_bucket(middle) if bits is None else position_bucket(middle, bits)) >= bucket
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    return high


def tiles(
    sight: Sight,
    bits: int | None,
    timed: bool,
    block_rows: int,
    block_memory: int,
    by_memory: bool = False,
    sums: bool = False,
) -> Tiles:
    """The programs of rows, or with `by_memory` of memory blocks.

    `bits` says how fine the position buckets are, None that there are none, `timed` whether time has any.
    `sums` asks for the steps of mixed tiles, which sums by bucket take.
    Raises ValueError where lengths do not sum up or a prefix is not one.
    """
    _check(sight)
    rows = _blocks(sight.row_lengths, sight.row_clock, block_rows)
    memory = _blocks(sight.memory_lengths, sight.memory_times, block_memory)
    least, most = _range(sight.row_prefix, rows)

    # Every pair of a row block and a memory block that it sees any token of.
    seen = (most + block_memory - 1) // block_memory
    row = jagged.owners(seen)
    index = jagged.positions(seen)  # which block of the sequence's memory
    other = jagged.starts(memory.count)[rows.sequence[row]] + index
    position_low = position_high = time_low = time_high = torch.zeros_like(row)
    if bits is not None:
        nearest = torch.clamp(least[row] - (index + 1) * block_memory + 1, min=1)
        position_low = position_bucket(nearest, bits).long()
        position_high = position_bucket(most[row] - index * block_memory, bits).long()
    if timed:
        time_low = time_bucket(rows.earliest[row] - memory.latest[other]).long()
        time_high = time_bucket(rows.latest[row] - memory.earliest[other]).long()

    owner, mine, there, theirs = (other, memory, row, rows) if by_memory else (row, rows, other, memory)
    whole = theirs.end - theirs.first == (block_rows if by_memory else block_memory)
    in_sight = (least[row] >= (index + 1) * block_memory) & whole[there]
    kind = torch.full_like(row, MIXED)
    kind[in_sight & (time_high - time_low <= MOST_STEPS)] = STEPPED
    kind[in_sight & (time_low == time_high) & (position_low == position_high)] = UNIFORM

    listed = torch.argsort(owner * 3 + kind, stable=True)
    of_kind = torch.bincount(owner * 3 + kind, minlength=3 * len(mine.first)).view(-1, 3)
    ends = torch.cumsum(of_kind.flatten(), 0).view(-1, 3)
    bounds = torch.cat((ends[:, :1] - of_kind[:, :1], ends), 1)  # (P, 4)
    memory_first = jagged.starts(sight.memory_lengths)
    other_end = (
        jagged.starts(sight.row_lengths) + sight.row_lengths
        if by_memory
        else memory_first + sight.memory_lengths
    )
    ranges = (mine.first, mine.end, other_end[mine.sequence], memory_first[mine.sequence])
    programs = torch.cat((torch.stack(ranges, 1), bounds), 1)
    work = bounds[:, 3] - bounds[:, 0]
    packed = time_low | time_high << 8 | position_low << 16 | position_high << 32
    order, ranks = _by_time(theirs)
    counts = torch.where(kind == STEPPED, MOST_STEPS, 0)
    if sums:
        counts = torch.where(kind == MIXED, time_high - time_low, counts)
    if not timed:
        counts.zero_()
    entries = torch.stack((theirs.first[there], packed, most[row], jagged.starts(counts)), 1)
    tile = jagged.owners(counts)
    edge = (
        edges(None)
        .to(row.device)[torch.maximum(time_high[tile] - jagged.positions(counts), time_low[tile])]
        .unsqueeze(1)
    )
    width = block_memory if by_memory else block_rows
    own = mine.times[_elements(mine, owner[tile], width)[0]]
    index, real = _elements(theirs, there[tile], block_rows + block_memory - width)
    others = theirs.times[order][index].masked_fill_(~real, 2**62)
    # By rows a pair is in an earlier bucket where t_j > t_i - edge, by memory where t_i < t_j + edge.
    found = torch.searchsorted(others, own + edge if by_memory else own - edge, right=not by_memory)
    steps = (found if by_memory else found - 1).to(torch.int16)
    return Tiles(
        programs[torch.argsort(work, descending=True, stable=True)].to(torch.int32).contiguous(),
        entries[listed],
        ranks.to(torch.int32),
        steps,
        int((most - least).max()) + block_memory if len(most) else block_memory,
    )


def _elements(blocks: _Blocks, which: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Indices of the elements of some blocks, the last one repeated past their ends, and which are real."""
    index = blocks.first[which].unsqueeze(1) + torch.arange(width, device=which.device)
    last = blocks.end[which].unsqueeze(1) - 1
    return torch.minimum(index, last), index <= last


def _by_time(blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """Elements ordered by time within their blocks, and each one's place there."""
    order = torch.argsort(blocks.times, stable=True)
    order = order[torch.argsort(blocks.of_element[order], stable=True)]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - blocks.first[blocks.of_element]
    return order, ranks


def _check(sight: Sight) -> None:
    rows, memory = len(sight.row_prefix), len(sight.memory_times)
    if int(sight.row_lengths.sum()) != rows or int(sight.memory_lengths.sum()) != memory:
        raise ValueError(f"the lengths do not sum to {rows} rows and {memory} memory tokens")
    most = sight.memory_lengths[jagged.owners(sight.row_lengths, rows)]
    if bool(((sight.row_prefix < 0) | (sight.row_prefix > most)).any()):
        raise ValueError("a row's prefix must lie between 0 and the number of its sequence's memory tokens")


def _blocks(lengths: Tensor, times: Tensor, block: int) -> _Blocks:
    count = (lengths + block - 1) // block
    sequence = jagged.owners(count)
    first = jagged.starts(lengths)[sequence] + jagged.positions(count) * block
    end = torch.minimum(first + block, (jagged.starts(lengths) + lengths)[sequence])
    of_element = jagged.owners(end - first, len(times))
    blocks = _Blocks(sequence, first, end, of_element, times, count, first, end)
    earliest, latest = _range(times, blocks)
    return dataclasses.replace(blocks, earliest=earliest, latest=latest)


def _range(values: Tensor, blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """The least and greatest value of each block."""
    low = torch.zeros_like(blocks.first).scatter_reduce_(
        0, blocks.of_element, values, "amin", include_self=False
    )
    high = torch.zeros_like(blocks.first).scatter_reduce_(
        0, blocks.of_element, values, "amax", include_self=False
    )
    return low, high
