"""How the CPU's attention cuts a Sight into blocks: dense, nearly without padding, small enough for a cache.

A group is some sequences of similar size, whose memory is padded to one width; a block is the next few rows
of each of them against the memory that those rows see. So arithmetic grows with the pairs in sight, and the
number of PyTorch calls with the blocks, not with the users. Arrays are reordered once on the way in and once
on the way out: rows to blocks, memory to groups, heads outermost in each.

A pair's bias is looked up by one number, its place in a table of all pairs of buckets, which heads and layers
share. Where all pairs of a block's sequences that stand at the same place have the same one (rows that follow
one another, times that say nothing or are not asked for), it is kept once for all of them.

Rows that are the memory itself can have their own pairs among the others: a row then sees one token more.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from kernels import jagged
from kernels.buckets import TIME_BUCKETS, TIME_OFFSET, TIME_SHIFT, UNKNOWN_TIME, position_bucket
from kernels.sight import Sight

BLOCK_PAIRS = 1 << 17  # of one head: 512 KiB of fp32
BLOCK_ROWS = 48  # rows of a sequence in a block: memory later than the last row's is not computed
WASTE_SHARE = 0.1  # padded pairs a group may carry per real one
WASTE_PAIRS = 1 << 12  # and in any case: computing them takes less time than another block's PyTorch calls
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

    def take(self, x: Tensor, padding: float | None = None) -> Tensor:
        """x (elements, H, width) in places, repetitions having the value `padding` instead if it is given."""
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
        taken = flat.index_select(0, self._sources[stride])
        if padding is not None and self.padding is not None:
            taken.index_fill_(0, self.padding, padding)
        return taken

    def give_back(self, x: Tensor, otherwise: Tensor | None = None) -> Tensor:
        """x (places, width) to (elements · H, width), those without a place as in `otherwise` or 0."""
        taken = x.index_select(0, self.inverse)
        if self.missing is None:
            return taken
        if otherwise is None:
            return taken.index_fill_(0, self.missing, 0)
        return taken.index_copy_(0, self.missing, otherwise.index_select(0, self.missing))


@dataclasses.dataclass(frozen=True)
class Block:
    """b sequences' next r rows against the first n memory tokens of each, for every head."""

    group: int
    sequences: int  # b
    rows: int  # r
    seen: int  # n
    first: bool  # of its group, seeing all of its memory
    pairs: Tensor  # (b · r · n,) int32, each pair's place in a pair table; (r · n,) where sequences agree


@dataclasses.dataclass(frozen=True)
class Plan:
    """The blocks of a Sight, each group's together and the one that sees most first."""

    blocks: tuple[Block, ...]
    widths: tuple[int, ...]  # of each group: padded memory tokens of a sequence
    block_places: list[int]  # H · b · r of each block
    group_places: list[int]  # H · b · width of each group
    position_rows: int  # rows of the position table that pairs in sight reach
    rows: Order
    memory: Order


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
    prefixes, clock, times = sight.row_prefix, sight.row_clock, sight.memory_times
    if own:
        prefixes, seen = prefixes + 1, row_lengths
    row_starts, memory_starts = jagged.starts(sight.row_lengths), jagged.starts(sight.memory_lengths)
    pair_index = _PairIndex(sight, max(seen, default=0), bits, timed, own)
    rows, memory = _Places(heads), _Places(heads)
    blocks: list[Block] = []
    widths: list[int] = []
    for members in _groups(row_lengths, seen):
        width, longest = max(seen[s] for s in members), max(row_lengths[s] for s in members)
        member = torch.tensor(members)
        memory_index, real = _spread(memory_starts[member], sight.memory_lengths[member], width)
        memory.put(memory_index, real)
        index, real = _spread(row_starts[member], sight.row_lengths[member], longest)  # (b, longest)
        pairs = pair_index(prefixes[index], real, clock[index], times[memory_index])
        step = -(-longest // -(-longest // BLOCK_ROWS))
        cuts = [(first, min(first + step, longest)) for first in range(0, longest, step)]
        most = [pairs.most(first, last) for first, last in cuts]
        order = sorted(range(len(cuts)), key=lambda at: -most[at])
        for at in order:
            first, last = cuts[at]
            rows.put(index[:, first:last], real[:, first:last])
            shape = (len(widths), len(members), last - first, most[at])
            blocks.append(Block(*shape, at == order[0], pairs.of(first, last, most[at]).view(-1)))
        widths.append(width)
    return Plan(
        tuple(blocks),
        tuple(widths),
        rows.sizes,
        memory.sizes,
        pair_index.position_rows,
        rows.order(len(sight.row_prefix)),
        memory.order(len(sight.memory_times)),
    )


def _spread(starts: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The first elements of each sequence, its last one repeated past its end, and which are real.

    Both (b, longest).
    """
    columns = torch.arange(longest)
    index = starts.unsqueeze(1) + columns.minimum((lengths - 1).unsqueeze(1))
    return index, columns < lengths.unsqueeze(1)


class _PairIndex:
    """Finds each pair's place in the pair table, whose last position row stands for pairs out of sight."""

    def __init__(self, sight: Sight, longest: int, bits: int, timed: bool, own: bool) -> None:
        self.timed, self.own, self.longest = timed, own, longest
        difference = torch.arange(-longest, longest + 1)  # p_i - p_j, less one where rows see themselves
        distance = difference - int(own)
        bucket = position_bucket(distance, bits) if bits else torch.zeros_like(distance, dtype=torch.int32)
        self.position_rows = int(bucket[-1]) + 1
        bucket = torch.where(difference > 0, bucket, self.position_rows)
        # For each difference + longest where its bucket starts in a pair table, less the time offset.
        self.bases = (bucket * TIME_BUCKETS - TIME_OFFSET if timed else bucket).to(torch.int32)
        # A row's own pair is in the first bucket of time, also where its time is unknown.
        self.mend = own and timed and bool((sight.memory_times == UNKNOWN_TIME).any())

    def __call__(self, prefix: Tensor, real: Tensor, clock: Tensor, times: Tensor) -> "_GroupPairs":
        """A group's, from (b, longest), (b, longest), (b, longest) and (b, width)."""
        # Rows that follow one another in every sequence: padded ones may go on, as nothing reads them.
        regular = prefix[:1, :1] + torch.arange(prefix.shape[1])
        if self.own or (int(regular[0, -1]) <= self.longest and bool(((prefix == regular) | ~real).all())):
            prefix = regular
        else:
            prefix = prefix * real  # a padded row sees nothing
        if bool((times == times[0, 0]).all()) and bool((clock == clock[0, 0]).all()):
            clock, times = clock[:1], times[:1]  # one for all sequences
        return _GroupPairs(self, prefix, prefix.amax(0).tolist(), clock, times)


@dataclasses.dataclass(frozen=True, eq=False)
class _GroupPairs:
    index: _PairIndex
    prefix: Tensor  # (b or 1, longest)
    sees: list[int]  # (longest,) the most that a sequence's row sees
    clock: Tensor  # (b or 1, longest)
    times: Tensor  # (b or 1, width)

    def most(self, first: int, last: int) -> int:
        return min(max(*self.sees[first:last], 1), self.times.shape[1])

    def of(self, first: int, last: int, n: int) -> Tensor:
        """Rows [first, last) against the first n memory tokens: (b or 1, r, n) int32."""
        longest, bases = self.index.longest, self.index.bases
        column = torch.arange(n, dtype=torch.int32)
        difference = (self.prefix[:, first:last] + longest).to(torch.int32).unsqueeze(2) - column
        base = bases.index_select(0, difference.view(-1)).view(difference.shape)
        if not self.index.timed:
            return base
        passed = (self.clock[:, first:last].unsqueeze(2) - self.times[:, :n].unsqueeze(1)).to(torch.float32)
        # buckets.time_bucket, in place, its offset being in the bases already
        bucket = (passed.view(torch.int32) >> TIME_SHIFT).clamp_(TIME_OFFSET, TIME_OFFSET + TIME_BUCKETS - 1)
        bucket = bucket.add_(base) if len(bucket) >= len(base) else bucket + base
        return bucket.masked_fill_(difference == longest + 1, 0) if self.index.mend else bucket


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
    """Collects which elements stand where, part after part, and makes an Order of it."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.sizes: list[int] = []
        self.elements: list[Tensor] = []
        self.real: list[Tensor] = []

    def put(self, index: Tensor, real: Tensor) -> None:
        self.elements.append(index.reshape(-1))
        self.real.append(real.reshape(-1))
        self.sizes.append(index.numel() * self.heads)

    def order(self, elements: int) -> Order:
        if not self.elements:
            nothing = torch.empty(0, dtype=torch.int64)
            return Order(self.heads, nothing, nothing, None, None)
        head = torch.arange(self.heads).unsqueeze(1)
        source = torch.cat([(part * self.heads + head).view(-1) for part in self.elements])
        padded = torch.cat([(~real).expand(self.heads, -1).reshape(-1) for real in self.real])
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
