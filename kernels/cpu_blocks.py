"""How the CPU's attention cuts a Sight into blocks: dense, nearly without padding, small enough for a cache.

A group is some sequences of similar size, whose memory is padded to one width; a block is the next few rows
of each of them against the memory that those rows see. So arithmetic grows with the pairs in sight, and the
number of PyTorch calls with the blocks, not with the users. Arrays are reordered once on the way in and once
on the way out: rows to blocks, memory to groups, heads outermost in each.

A pair's bias is looked up by one number, its place in a table of all pairs of buckets, which heads and layers
share. Where all pairs of a block's sequences that stand at the same place have the same one (rows that follow
one another, times that say nothing or are not asked for), it is kept once for all of them; where all rows see
the same (candidates at one time), once for all rows.

Rows that are the memory itself can have their own pairs among the others: a row then sees one token more.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import jagged
from kernels.buckets import TIME_BUCKETS, TIME_OFFSET, TIME_SHIFT, UNKNOWN_TIME, position_bucket
from kernels.sight import Sight

BLOCK_PAIRS = 1 << 17  # of one head: 512 KiB of fp32
BLOCK_ROWS = 48  # rows of a sequence in a block: memory later than the last row's is not computed
WASTE_SHARE = 0.1  # padded pairs a group may carry per real one
WASTE_PAIRS = 1 << 12  # and in any case: computing them takes less time than another block's PyTorch calls
KEPT_PAIRS = 1 << 24  # of all sequences, up to which pairs' places are kept for other layers: 64 MiB
MEMORY_PAIRS = 8  # a padded memory token costs about as much as so many padded pairs


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """A reordering of (elements, H, width) into (places, width), a place for an element's head, and back."""

    heads: int
    source: Tensor  # (places,) element · H + head
    inverse: Tensor  # (elements · H,) a place, any where there is none
    missing: Tensor | None  # (…,) elements · H + head that have no place
    padding: Tensor | None  # (…,) places that repeat an element which has another one

    @functools.cached_property
    def _sources(self) -> dict[int, Tensor]:
        return {self.heads: self.source}

    def take(self, x: Tensor, out: Tensor, padding: float | None = None) -> None:
        """Puts x (elements, H, width) in places, into `out` (places, width).

        Repetitions have the value `padding` instead if it is given.
        """
        elements, heads, width = x.shape
        apart = x.stride(0)
        if x.stride()[1:] != (width, 1) or apart % width or apart < heads * width:
            x, apart = x.contiguous(), heads * width
        # Columns of a wider array are taken as they lie: it is read as places of this width.
        stride = apart // width
        if stride not in self._sources:
            element, head = self.source // heads, self.source % heads
            self._sources[stride] = element * stride + head
        flat = x.as_strided(((elements - 1) * stride + heads, width), (width, 1))
        torch.index_select(flat, 0, self._sources[stride], out=out)
        if padding is not None and self.padding is not None:
            out.index_fill_(0, self.padding, padding)

    def give_back(self, x: Tensor, otherwise: Tensor | None = None) -> Tensor:
        """x (places, width) to (elements · H, width), those without a place as in `otherwise` or 0."""
        taken = x.index_select(0, self.inverse)
        if self.missing is None:
            return taken
        if otherwise is None:
            return taken.index_fill_(0, self.missing, 0)
        return taken.index_copy_(0, self.missing, otherwise.index_select(0, self.missing))


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """b sequences' next r rows against the first n memory tokens of each, for every head."""

    group: int
    batch: int  # H · b
    rows: int  # r
    seen: int  # n
    start: int  # its first place among all rows'
    first: bool  # of its group, seeing all of its memory
    find_pairs: Callable[[], Tensor]
    kept: bool

    @functools.cached_property
    def _pairs(self) -> Tensor:
        return self.find_pairs()

    @property
    def pairs(self) -> Tensor:
        """int32, each pair's place in a pair table: (b or 1, r or 1, n), 1 where sequences or rows agree."""
        return self._pairs if self.kept else self.find_pairs()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The blocks of a Sight, each group's together and the one that sees most first."""

    blocks: tuple[Block, ...]
    groups: tuple[tuple[int, int], ...]  # of each: padded memory tokens of a sequence, first place in memory
    position_rows: int  # rows of the position table that pairs in sight reach
    rows: Order
    memory: Order
    scratch: dict[Any, Any] = dataclasses.field(default_factory=dict)  # buffers, which all passes use again


def rows_are_memory(sight: Sight) -> bool:
    """Whether row i of a sequence stands where its memory token i does."""
    if len(sight.row_prefix) != len(sight.memory_times):
        return False
    return (
        torch.equal(sight.row_lengths, sight.memory_lengths)
        and torch.equal(sight.row_times, sight.memory_times)
        and torch.equal(sight.row_prefix, jagged.positions(sight.row_lengths, len(sight.row_prefix)))
    )


def plan(sight: Sight, bits: int, timed: bool, heads: int, own: bool) -> Plan:
    """The blocks for `heads` heads and tables of `bits` bits an octave (0: no position table).

    With `own` rows are the memory and see themselves there. Raises ValueError where the sight's numbers
    disagree.
    """
    row_lengths, seen = sight.row_lengths.tolist(), _seen(sight)
    if own:
        seen = row_lengths
    rows = _Places(sight.row_lengths, row_lengths, heads)
    memory = _Places(sight.memory_lengths, sight.memory_lengths.tolist(), heads)
    pair_index = _PairIndex(sight, max(seen, default=0), bits, timed, own)
    kept = sum(r * n for r, n in zip(row_lengths, seen, strict=True)) <= KEPT_PAIRS
    blocks: list[Block] = []
    groups: list[tuple[int, int]] = []
    for members in _groups(row_lengths, seen):
        width, longest = max(seen[s] for s in members), max(row_lengths[s] for s in members)
        groups.append((width, memory.add(members, 0, width)))
        pairs = pair_index(members, longest, width, rows, memory)
        step = -(-longest // -(-longest // BLOCK_ROWS))
        cuts = [(first, min(first + step, longest)) for first in range(0, longest, step)]
        most = [min(max(*pairs.sees[first:last], 1), width) for first, last in cuts]
        order = sorted(range(len(cuts)), key=lambda at: -most[at])
        for at in order:
            first, last = cuts[at]
            start = rows.add(members, first, last)
            find = functools.partial(pairs.of, first, last, most[at])
            shape = (len(members) * heads, last - first, most[at], start)
            blocks.append(Block(len(groups) - 1, *shape, at == order[0], find, kept))
    return Plan(
        tuple(blocks),
        tuple(groups),
        pair_index.position_rows,
        rows.order(len(sight.row_prefix)),
        memory.order(len(sight.memory_times)),
    )


class _PairIndex:
    """Finds each pair's place in the pair table, whose last position row stands for pairs out of sight."""

    def __init__(self, sight: Sight, longest: int, bits: int, timed: bool, own: bool) -> None:
        self.sight, self.longest, self.timed, self.own = sight, longest, timed, own
        difference = torch.arange(-longest, longest + 1)  # p_i - p_j, one more where rows see themselves
        distance = difference - int(own)
        bucket = position_bucket(distance, bits) if bits else torch.zeros_like(distance, dtype=torch.int32)
        self.position_rows = int(bucket[-1]) + 1
        bucket = torch.where(difference > 0, bucket, self.position_rows)
        # For each difference + longest where its bucket starts in a pair table, less the time offset.
        self.bases = (bucket * TIME_BUCKETS - TIME_OFFSET if timed else bucket).to(torch.int32)
        self.columns = torch.arange(longest, dtype=torch.int32)
        # A row's own pair is in the first bucket of time, also where its time is unknown.
        self.mend = own and timed and bool((sight.memory_times == UNKNOWN_TIME).any())

    def __call__(
        self, members: list[int], longest: int, width: int, rows: "_Places", memory: "_Places"
    ) -> "_GroupPairs":
        prefix, sees = torch.arange(1, longest + 1).unsqueeze(0), list(range(1, longest + 1))
        clock = times = None
        if self.timed or not self.own:
            index, real = rows.elements(members, longest)
            if not self.own:
                prefix, sees = self._prefixes(index, real)
            if self.timed:
                clock = self.sight.row_clock[index]
                times = self.sight.memory_times[index if self.own else memory.elements(members, width)[0]]
                if bool((times == times[0, 0]).all()) and bool((clock == clock[0, 0]).all()):
                    clock, times = clock[:1], times[:1]  # one for all sequences
                clock, times = clock.unsqueeze(2), times.unsqueeze(1)
        start = (prefix + self.longest).to(torch.int32).unsqueeze(2)
        alike = (start[:, 1:] == start[:, :-1]).all(0)
        if clock is not None:
            alike = alike & (clock[:, 1:] == clock[:, :-1]).all(0)
        return _GroupPairs(self, start, sees, clock, times, [False, *alike.squeeze(1).tolist()])

    def _prefixes(self, index: Tensor, real: Tensor) -> tuple[Tensor, list[int]]:
        """The rows' prefixes (b, longest), or (1, longest) where sequences agree, and the largest of each."""
        prefix = self.sight.row_prefix[index]
        # Rows that follow one another in every sequence: padded ones may go on, as nothing reads them.
        regular = prefix[:1, :1] + torch.arange(prefix.shape[1])
        if int(regular[0, -1]) <= self.longest and bool(((prefix == regular) | ~real).all()):
            prefix = regular
        return prefix, prefix.amax(0).tolist()


@dataclasses.dataclass(frozen=True, eq=False)
class _GroupPairs:
    """What a group's pairs are found from."""

    index: _PairIndex
    start: Tensor  # (b or 1, longest, 1) int32, where in the bases a row's pair with the first token is
    sees: list[int]  # (longest,) the most that a sequence's row sees
    clock: Tensor | None  # (b or 1, longest, 1)
    times: Tensor | None  # (b or 1, 1, width)
    alike: list[bool]  # (longest,) whether a row sees what the one before it does, at the same time

    def of(self, first: int, last: int, n: int) -> Tensor:
        """Rows [first, last) against the first n memory tokens: (b or 1, r or 1, n) int32."""
        if all(self.alike[first + 1 : last]):
            last = first + 1
        place = self.start[:, first:last] - self.index.columns[:n]
        base = self.index.bases.index_select(0, place.view(-1)).view(place.shape)
        if self.clock is None or self.times is None:
            return base
        passed = (self.clock[:, first:last] - self.times[:, :, :n]).to(torch.float32)
        # buckets.time_bucket, in place, its offset being in the bases already
        pairs = (passed.view(torch.int32) >> TIME_SHIFT).clamp_(TIME_OFFSET, TIME_OFFSET + TIME_BUCKETS - 1)
        pairs = pairs.add_(base) if len(pairs) >= len(base) else pairs + base
        if self.index.mend:
            pairs.masked_fill_(place == self.index.longest + 1, 0)
        return pairs


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


class _Places:
    """Collects which elements of packed sequences stand where, part after part, and makes an Order of it.

    A part has elements [first, last) of each of some sequences, heads outermost; the last element of a
    sequence is repeated past its end.
    """

    def __init__(self, lengths: Tensor, length_list: list[int], heads: int) -> None:
        self.lengths, self.length_list, self.heads = lengths, length_list, heads
        self.starts = jagged.starts(lengths)
        self.start_list: list[int] = self.starts.tolist()
        self.size = 0
        self.runs: tuple[list[int], ...] = ([], [], [], [], [])  # start, length, first, count, head of each

    def elements(self, members: list[int], longest: int) -> tuple[Tensor, Tensor]:
        """The first elements of each sequence, and which are real: (b, longest)."""
        member, columns = torch.tensor(members), torch.arange(longest)
        lengths = self.lengths[member].unsqueeze(1)
        return self.starts[member].unsqueeze(1) + columns.minimum(lengths - 1), columns < lengths

    def add(self, members: list[int], first: int, last: int) -> int:
        """Adds a part, and says where it starts."""
        runs = len(members) * self.heads
        start, length, firsts, counts, heads = self.runs
        start += [self.start_list[s] for s in members] * self.heads
        length += [self.length_list[s] for s in members] * self.heads
        firsts += [first] * runs
        counts += [last - first] * runs
        heads += [head for head in range(self.heads) for _ in members]
        self.size += runs * (last - first)
        return self.size - runs * (last - first)

    def order(self, elements: int) -> Order:
        if not self.size:
            nothing = torch.empty(0, dtype=torch.int64)
            return Order(self.heads, nothing, nothing, None, None)
        runs = torch.tensor(self.runs)
        counts = runs[3]
        start, length, first, _, head = runs.repeat_interleave(counts, 1)
        column = first + jagged.positions(counts)
        source = (start + column.minimum(length - 1)) * self.heads + head
        padded = column >= length
        inverse = torch.full((elements * self.heads + 1,), -1)
        # Repetitions all write to one place more, which is cut off.
        inverse[torch.where(padded, elements * self.heads, source)] = torch.arange(len(source))
        inverse = inverse[:-1]
        missing, padding = (some.nonzero().squeeze(1) for some in (inverse < 0, padded))
        return Order(
            self.heads,
            source,
            inverse.clamp_(min=0),
            missing if len(missing) else None,
            padding if len(padding) else None,
        )
