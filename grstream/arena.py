"""Columns of events in blocks of sixteen; a history is a chain of blocks.

Nothing is copied when a history grows or drops its oldest events, and a dropped block stays readable until
somebody releases it: a sequence that still needs the old window just holds on to its blocks.

The events of a chain are numbered from the first that was ever written to it; number n stands in row
n % BLOCK of its block. So whoever knows the block and the number of a first event knows all the others.
"""

import numpy as np
import numpy.typing as npt

from grstream.events import EventBatch

Blocks = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]  # indices into the columns: block * BLOCK + row of the block
Ints = npt.NDArray[np.int64]

BLOCK = 16  # events; of 64-bit columns two cache lines, and half of it is the average waste of a history
NO_BLOCK = -1
_SHIFT, _MASK = BLOCK.bit_length() - 1, BLOCK - 1
# Columns grow by realloc, which for large arrays moves pages instead of copying; so growth can be small.
_GROWTH = 1.2
_MIN_BLOCKS = 64


class EventArena:
    """Items, actions, times and F features of events, by row."""

    def __init__(self, features: int) -> None:
        self.items = np.empty(0, np.int64)
        self.actions = np.empty(0, np.int32)
        self.times = np.empty(0, np.int64)
        self.features = np.empty((0, features), np.int64)
        self._next = np.empty(0, np.int64)  # by block: the one after it in its chain
        self._free = np.empty(0, np.int64)  # a stack of released blocks
        self._freed = 0
        self._stop = 0

    @property
    def nbytes(self) -> int:
        columns = (self.items, self.actions, self.times, self.features, self._next, self._free)
        return sum(column.nbytes for column in columns)

    @property
    def used(self) -> Rows:
        """The items column as far as any event was ever written: what is stored, and leftovers."""
        return self.items[: self._stop * BLOCK]

    def allocate(self, count: int) -> Blocks:
        """Blocks that stand at the end of their chains."""
        reused = min(count, self._freed)
        self._freed -= reused
        fresh = np.arange(self._stop, self._stop + count - reused)
        blocks = np.concatenate([self._free[self._freed : self._freed + reused], fresh])
        self._stop += len(fresh)
        if self._stop > len(self._next):
            capacity = max(self._stop, int(len(self._next) * _GROWTH), _MIN_BLOCKS)
            for column in (self.items, self.actions, self.times):
                column.resize(capacity * BLOCK, refcheck=False)
            self.features.resize((capacity * BLOCK, self.features.shape[1]), refcheck=False)
            self._next.resize(capacity, refcheck=False)
        self._next[blocks] = NO_BLOCK
        return blocks

    def release(self, blocks: Blocks) -> None:
        if self._freed + len(blocks) > len(self._free):
            self._free.resize(max(self._freed + len(blocks), int(len(self._free) * _GROWTH)), refcheck=False)
        self._free[self._freed : self._freed + len(blocks)] = blocks
        self._freed += len(blocks)

    def link(self, blocks: Blocks, following: Blocks) -> None:
        self._next[blocks] = following

    def follow(self, blocks: Blocks, steps: Ints) -> Blocks:
        """Where each chain is so many blocks further on."""
        blocks = blocks.copy()
        walking = np.flatnonzero(steps > 0)
        walked = 0
        while len(walking):
            blocks[walking] = self._next.take(blocks.take(walking))
            walked += 1
            walking = walking[steps.take(walking) > walked]
        return blocks

    def blocks(self, heads: Blocks, counts: Ints) -> Blocks:
        """The first so many blocks of each chain, one chain after another."""
        stops = np.cumsum(counts)
        out = np.empty(stops[-1] if len(stops) else 0, np.int64)
        walking = np.flatnonzero(counts)
        block, at, stop = heads[walking], (stops - counts)[walking], stops[walking]
        while len(block):
            out[at] = block
            at += 1
            more = at < stop
            if not more.all():
                block, at, stop = block[more], at[more], stop[more]
            block = self._next.take(block)
        return out

    def rows(self, heads: Blocks, firsts: Ints, counts: Ints) -> Rows:
        """The rows of each chain's events from number `first`, which stands in its head, on."""
        lead = firsts & _MASK
        blocks = np.where(counts > 0, blocks_of(firsts, counts), 0)
        chains = self.blocks(heads, blocks) << _SHIFT
        # Of the rows of all these blocks, laid out one after another, each chain's events are a range.
        shift = ((np.cumsum(blocks) - blocks) << _SHIFT) + lead - (np.cumsum(counts) - counts)
        at = np.repeat(shift, counts)
        at += np.arange(len(at))
        rows = chains.take(at >> _SHIFT)
        at &= _MASK
        rows += at
        return rows

    def write(self, rows: Rows, batch: EventBatch, batch_rows: Ints) -> None:
        """Store events of a batch."""
        self.items[rows] = batch.items[batch_rows]
        self.actions[rows] = batch.actions[batch_rows]
        self.times[rows] = batch.times[batch_rows]
        if self.features.shape[1]:
            self.features[rows] = batch.features[batch_rows]

    def copy(self, source: Rows, target: Rows) -> None:
        """Copy events; the two may overlap."""
        for column in (self.items, self.actions, self.times, self.features):
            column[target] = column[source]

    def chain(self, firsts: Ints, counts: Ints) -> tuple[Blocks, Blocks]:
        """New chains for so many events from number `first` on: heads and tails, NO_BLOCK where none.

        A chain whose first number stands within a block gets that block even for no events.
        """
        lengths = blocks_of(firsts, counts)
        blocks = self.allocate(int(lengths.sum()))
        stops = np.cumsum(lengths)
        if len(blocks):
            self._next[blocks[:-1]] = blocks[1:]
            self._next[blocks[stops[lengths > 0] - 1]] = NO_BLOCK
            blocks = np.append(blocks, NO_BLOCK)
        else:
            blocks = np.array([NO_BLOCK])
        heads = np.where(lengths > 0, blocks[np.where(lengths > 0, stops - lengths, -1)], NO_BLOCK)
        tails = np.where(lengths > 0, blocks[np.where(lengths > 0, stops - 1, -1)], NO_BLOCK)
        return heads, tails


def block_of(numbers: Ints) -> Ints:
    """Which block of its chain, counted from event 0, an event stands in."""
    return numbers >> _SHIFT


def row_of(numbers: Ints) -> Ints:
    """Which row of that block."""
    return numbers & _MASK


def row_at(blocks: Blocks, numbers: Ints) -> Rows:
    """The row of each event among all rows."""
    return (blocks << _SHIFT) + (numbers & _MASK)


def blocks_of(firsts: Ints, counts: Ints) -> Ints:
    """How many blocks a chain has that holds so many events from number `first` on.

    Where all are dropped but the next event's block is begun already, that one.
    """
    return ((firsts & _MASK) + counts + _MASK) >> _SHIFT
