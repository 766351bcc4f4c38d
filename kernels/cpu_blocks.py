"""How the CPU's attention cuts a Sight into blocks: dense, nearly without padding, small enough for a cache.

A group is some sequences of similar size, whose memory is padded to one width; a block is the next few rows
of each of them against the memory that those rows see. So arithmetic grows with the pairs in sight, and the
number of PyTorch calls with the blocks, not with the users. Arrays are reordered once on the way in and once
on the way out: rows to blocks, memory to groups, heads outermost in each.

A pair's bias is looked up by one number, its place in a table of all pairs of buckets, which heads and layers
share. Where all pairs of a block's sequences that stand at the same place have the same one (rows that follow
one another, times that say nothing or are not asked for), it is kept once for all of them.
"""

import dataclasses

import torch
from torch import Tensor

from kernels import jagged
from kernels.buckets import (
    TIME_BUCKETS,
    TIME_OFFSET,
    TIME_SHIFT,
    position_bucket,
)
from kernels.sight import Sight

BLOCK_PAIRS = 1 << 17  # of one head: 512 KiB of fp32
BLOCK_ROWS = 48  # rows of a sequence in a full block: memory later than the last row's is not computed
WASTE_SHARE = 0.1  # padded pairs a group may carry per real one
WASTE_PAIRS = 1 << 12  # and in any case: computing them takes less time than another block's PyTorch calls
MEMORY_PAIRS = 8  # a padded memory token costs about as much as so many padded pairs


@dataclasses.dataclass(frozen=True)
class Index:
    """Where each element of a reordered array comes from; `missing` ones come from nowhere and are zero."""

    source: Tensor
    missing: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        taken = x.index_select(0, self.source)
        return taken if self.missing is None else taken.index_fill_(0, self.missing, 0)


@dataclasses.dataclass(frozen=True)
class Block:
    """b sequences' next r rows against the first n memory tokens of each, for every head."""

    group: int
    rows: slice  # of the rows in blocks: H · b · r of them
    pairs: Tensor  # (b, r, n) int32, each pair's place in a pair table; (1, r, n) where sequences agree


@dataclasses.dataclass(frozen=True)
class Group:
    memory: slice  # of the memory in groups: H · b · width of them
    sequences: int  # b


@dataclasses.dataclass(frozen=True)
class Plan:
    """The blocks of a Sight. Indices are those of (element, head) in arrays of (elements · H, width)."""

    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    position_rows: int  # rows of the position table that pairs in sight reach
    to_blocks: Index  # rows -> padded rows of all blocks
    from_blocks: Index  # and back
    to_groups: Index  # memory -> padded memory of all groups
    from_groups: Index
    padding: Tensor | None  # rows in blocks that are repetitions, which must not count in a gradient

    def padded(self, x: Tensor, padding: float) -> Tensor:
        """Rows (R · H, width) in blocks, repetitions having the value `padding` instead."""
        taken = x.index_select(0, self.to_blocks.source)
        return taken if self.padding is None else taken.index_fill_(0, self.padding, padding)


def plan(sight: Sight, bits: int, timed: bool, heads: int) -> Plan:
    """The blocks for `heads` heads and tables of `bits` bits an octave (0: no position table).

    Raises ValueError where the sight's numbers disagree.
    """
    row_lengths, seen = sight.row_lengths.tolist(), _seen(sight)
    row_starts, memory_starts = jagged.starts(sight.row_lengths), jagged.starts(sight.memory_lengths)
    pair_index = _PairIndex(max(seen, default=0), bits, timed)
    rows, memory = _Padding(heads), _Padding(heads)
    groups: list[Group] = []
    blocks: list[Block] = []
    for members in _groups(row_lengths, seen):
        width, longest = max(seen[s] for s in members), max(row_lengths[s] for s in members)
        member = torch.tensor(members)
        place, memory_index, _ = memory.add(memory_starts, sight.memory_lengths, member, 0, width)
        groups.append(Group(place, len(members)))
        times = sight.memory_times[memory_index] if timed else memory_index  # (b, width)
        step = BLOCK_ROWS
        count = -(-longest // step)
        step = -(-longest // count)
        for first in range(0, longest, step):
            last = min(first + step, longest)
            place, index, real = rows.add(row_starts, sight.row_lengths, member, first, last)  # (b, r)
            prefix = sight.row_prefix[index] * real
            n = max(int(prefix.max()), 1)
            clock = sight.row_clock[index] if timed else index
            blocks.append(Block(len(groups) - 1, place, pair_index(prefix, real, clock, times[:, :n])))
    to_blocks, from_blocks = rows.both_ways(len(sight.row_prefix))
    to_groups, from_groups = memory.both_ways(len(sight.memory_times))
    return Plan(
        tuple(groups),
        tuple(blocks),
        pair_index.position_rows,
        to_blocks,
        from_blocks,
        to_groups,
        from_groups,
        rows.padding(),
    )


class _PairIndex:
    """Finds each pair's place in the pair table, whose last position row stands for pairs out of sight."""

    def __init__(self, longest: int, bits: int, timed: bool) -> None:
        self.timed = timed
        self.longest = longest
        difference = torch.arange(-longest, longest + 1)
        bucket = (
            position_bucket(difference, bits) if bits else torch.zeros_like(difference, dtype=torch.int32)
        )
        self.position_rows = int(bucket[-1]) + 1
        bucket = torch.where(difference > 0, bucket, self.position_rows)
        # For each p_i - p_j + longest where its bucket starts in a pair table, less the time offset.
        self.bases = (bucket * TIME_BUCKETS - TIME_OFFSET if timed else bucket).to(torch.int32)

    def __call__(self, prefix: Tensor, real: Tensor, clock: Tensor, times: Tensor) -> Tensor:
        """(b, r, n) int32, or (1, r, n), from (b, r), (b, r), (b, r) and (b, n)."""
        n = times.shape[1]
        # Rows that follow one another in every sequence: padded ones may go on, as nothing reads them.
        row = torch.arange(prefix.shape[1])
        regular = prefix[0, 0] + row
        if bool(((prefix == regular) | ~real).all()) and int(regular[-1]) <= self.longest:
            prefix = regular.unsqueeze(0)
        column = torch.arange(n, dtype=torch.int32)
        difference = (prefix + self.longest).to(torch.int32).unsqueeze(2) - column
        base = self.bases.index_select(0, difference.view(-1)).view(difference.shape)
        if not self.timed:
            return base
        passed = (clock.unsqueeze(2) - times.unsqueeze(1)).to(torch.float32)
        # buckets.time_bucket, in place, its offset being in the bases already
        bucket = (passed.view(torch.int32) >> TIME_SHIFT).clamp_(TIME_OFFSET, TIME_OFFSET + TIME_BUCKETS - 1)
        if len(bucket) > len(base) and bool((bucket == bucket[0, 0, 0]).all()):
            return base.add_(bucket[0, 0, 0])
        return bucket.add_(base)


def _seen(sight: Sight) -> list[int]:
    """The most memory tokens that a row of each sequence sees. Raises ValueError where numbers disagree."""
    rows, memory = len(sight.row_prefix), len(sight.memory_times)
    if int(sight.row_lengths.sum()) != rows or int(sight.memory_lengths.sum()) != memory:
        raise ValueError(f"the lengths do not sum to {rows} rows and {memory} memory tokens")
    owner = jagged.owners(sight.row_lengths, rows)
    prefix = sight.row_prefix
    if bool(((prefix < 0) | (prefix > sight.memory_lengths[owner])).any()):
        raise ValueError("a row's prefix must lie between 0 and the number of its sequence's memory tokens")
    return torch.zeros_like(sight.memory_lengths).scatter_reduce_(0, owner, prefix, "amax").tolist()


def _groups(row_lengths: list[int], seen: list[int]) -> list[list[int]]:
    """Sequences that may share blocks: similar in rows and in memory seen, and not too many."""
    groups: list[list[int]] = []
    real = widest = longest = 0
    # Rows by octave: within one, padding costs at most half, and the waste below bounds it further.
    some = (s for s in range(len(seen)) if seen[s])
    for s in sorted(some, key=lambda s: (row_lengths[s].bit_length(), seen[s])):
        rows, width = max(longest, row_lengths[s]), max(widest, seen[s])
        real += (row_lengths[s] + MEMORY_PAIRS) * seen[s]
        count = len(groups[-1]) + 1 if groups else 1
        waste = count * (rows + MEMORY_PAIRS) * width - real
        if (
            not groups
            or count * min(rows, BLOCK_ROWS) * width > BLOCK_PAIRS
            or waste > max(WASTE_SHARE * real, WASTE_PAIRS)
        ):
            groups.append([])
            rows, width = row_lengths[s], seen[s]
            real = (rows + MEMORY_PAIRS) * width
        groups[-1].append(s)
        longest, widest = rows, width
    return groups


class _Padding:
    """Collects where the elements of padded blocks come from, block after block."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.size = 0
        self.sources: list[Tensor] = []
        self.real: list[Tensor] = []

    def add(
        self, starts: Tensor, lengths: Tensor, member: Tensor, first: int, last: int
    ) -> tuple[slice, Tensor, Tensor]:
        """Elements [first, last) of each member, its last one repeated past its end, and which are real.

        Where they lie, and both as (b, last - first).
        """
        columns = torch.arange(first, last)
        length = lengths[member].unsqueeze(1)
        index = starts[member].unsqueeze(1) + columns.minimum(length - 1)
        real = columns < length
        head = torch.arange(self.heads).view(-1, 1, 1)
        self.sources.append((index * self.heads + head).flatten())  # (H, b, last - first)
        self.real.append(real.expand(self.heads, -1, -1).flatten())
        place = slice(self.size, self.size + self.sources[-1].numel())
        self.size = place.stop
        return place, index, real

    def padding(self) -> Tensor | None:
        if not self.real:
            return None
        padding = (~torch.cat(self.real)).nonzero().squeeze(1)
        return padding if len(padding) else None

    def both_ways(self, total: int) -> tuple[Index, Index]:
        """The index into the padded blocks and the one back to the `total` elements' heads."""
        if not self.sources:
            nothing = torch.empty(0, dtype=torch.int64)
            return Index(nothing, None), Index(nothing, None)
        source = torch.cat(self.sources)
        real = torch.cat(self.real).nonzero().squeeze(1)
        inverse = source.new_full((total * self.heads,), -1)
        inverse[source[real]] = real
        missing = (inverse < 0).nonzero().squeeze(1)
        return Index(source, None), Index(inverse.clamp_(min=0), missing if len(missing) else None)
