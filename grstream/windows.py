"""The windows of a partition's users: chains of events that grow at the end and drop a chunk at the front.

Where an event belongs, and who is evicted, is decided by `RollingHistories`; this is how it is done, for many
users at once. With a `Pending`, new events are noted there behind the window that they came upon; a window
that changes in another way than by growing leaves to it the blocks that it still reads.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from grstream.arena import NO_BLOCK, Blocks, EventArena, Ints, Rows, block_of, blocks_of, row_at, row_of
from grstream.config import HistoriesConfig
from grstream.events import EventBatch
from grstream.keytable import Slots
from grstream.microbatch import Role
from grstream.pending import NewEvents, Pending, Sequences
from grstream.users import NO_SEQUENCE, NO_TIME, UserTable


class Windows:
    """Users and their events."""

    def __init__(self, config: HistoriesConfig, features: int, pending: Pending | None) -> None:
        self.arena = EventArena(features)
        self.users = UserTable()
        self.events = 0  # in all windows
        self.rolls = 0  # so far
        self._pending = pending
        self._window = config.window
        self.chunk = config.chunk if config.window else 1  # events dropped at once

    def rows(self, slots: Slots) -> Rows:
        """The arena's rows of these users' windows, one after another."""
        users = self.users
        return self.arena.rows(users.heads[slots], users.firsts(slots), users.lengths[slots])

    def append(
        self,
        batch: EventBatch,
        rows: Ints,
        slots: Slots,
        first: npt.NDArray[np.bool_],
        is_new: npt.NDArray[np.bool_],
        newest: Ints | None,
    ) -> None:
        """Append rows, grouped by user and in order, each group's first marked.

        `newest`: the greatest time of each user, where its last row is not known to have it.
        """
        users = self.users
        starts = np.flatnonzero(first)
        counts = np.diff(starts, append=len(rows))
        last = starts + counts - 1
        group = slots[starts]
        lengths = users.lengths[group]
        rank = np.arange(len(rows)) - np.repeat(starts, counts)
        numbers = np.repeat(users.appended[group], counts) + rank
        blocks = self._grow(slots, numbers, first)
        users.tails[group] = blocks[last]
        self.arena.write(row_at(blocks, numbers), batch, rows)
        self.events += len(rows)
        if is_new.any():
            held = np.repeat(lengths, counts) + rank  # before each event, counted without dropping any
            self._emit(batch, rows[is_new], slots[is_new], numbers[is_new], self.rolls_of(held[is_new]))
        users.appended[group] += counts
        users.lengths[group] += counts
        users.active[group] = batch.offsets[rows[last]]
        users.newest[group] = batch.times[rows[last]] if newest is None else newest
        rolls = self.rolls_of(lengths + counts)
        rolled = np.flatnonzero(rolls)
        if len(rolled):
            self._roll(group[rolled], rolls[rolled], ordered=newest is None)

    def _grow(self, slots: Slots, numbers: Ints, first: npt.NDArray[np.bool_]) -> Blocks:
        """The block of each row to be appended; new ones are linked to their chains."""
        users = self.users
        begins = row_of(numbers) == 0
        pieces = np.flatnonzero(begins | first)  # rows up to the next one of these share a block
        at = np.flatnonzero(begins)
        fresh = self.arena.allocate(len(at))
        blocks = users.tails[slots[pieces]]
        blocks[begins[pieces]] = fresh
        blocks = np.repeat(blocks, np.diff(pieces, append=len(slots)))
        previous = np.where(first[at], users.tails[slots[at]], blocks[at - 1])
        linked = previous != NO_BLOCK
        self.arena.link(previous[linked], fresh[linked])
        users.heads[slots[at[~linked]]] = fresh[~linked]
        return blocks

    def insert(self, batch: EventBatch, row: int, slot: Slots, position: int, is_new: bool) -> None:
        """Place one late event of one user before the event at `position` of its window."""
        users, arena = self.users, self.arena
        number = users.firsts(slot) + position
        if users.shared[slot] > number:
            self._own(slot)
        if row_of(users.appended[slot]) == 0:
            fresh = arena.allocate(1)
            arena.link(users.tails[slot], fresh)
            users.tails[slot] = fresh
        window = arena.rows(users.heads[slot], users.firsts(slot), users.lengths[slot] + 1)
        arena.copy(window[position:-1], window[position + 1 :])
        rows = np.array([row])
        arena.write(window[position : position + 1], batch, rows)
        users.appended[slot] += 1
        users.lengths[slot] += 1
        users.active[slot] = batch.offsets[row]
        self.events += 1
        if is_new:
            self._emit(batch, rows, slot, number, np.zeros(1, np.int64), Role.NEW_LATE)
        if users.lengths[slot] > self._window:
            self._roll(slot, np.ones(1, np.int64), ordered=False)

    def _own(self, slot: Slots) -> None:
        """Give a user its own copy of a chain that pending sequences read."""
        users, arena = self.users, self.arena
        firsts, lengths = users.firsts(slot), users.lengths[slot]
        heads, tails = arena.chain(firsts, lengths)
        arena.copy(self.rows(slot), arena.rows(heads, firsts, lengths))
        self._release(arena.blocks(users.heads[slot], blocks_of(firsts, lengths)))
        users.heads[slot], users.tails[slot] = heads, tails
        users.open[slot], users.shared[slot] = NO_SEQUENCE, 0

    def _roll(self, slots: Slots, rolls: Ints, *, ordered: bool) -> None:
        """Drop the oldest events; `ordered`: the newest event of each window has the greatest time."""
        users, arena = self.users, self.arena
        drop = rolls * self.chunk
        firsts = users.firsts(slots)
        steps = block_of(firsts + drop) - block_of(firsts)
        dropped = arena.blocks(users.heads[slots], steps)
        heads = arena.follow(users.heads[slots], steps)
        self._release(dropped)
        users.heads[slots] = heads
        users.tails[slots[heads == NO_BLOCK]] = NO_BLOCK
        users.lengths[slots] -= drop
        users.epochs[slots] += rolls
        self.events -= int(drop.sum())
        self.rolls += int(rolls.sum())
        if not self._window:
            users.newest[slots] = NO_TIME
        elif not ordered:
            users.newest[slots] = self._newest(slots)

    def _newest(self, slots: Slots) -> Ints:
        """The greatest time in each window; none is empty."""
        lengths = self.users.lengths[slots]
        return np.maximum.reduceat(self.arena.times[self.rows(slots)], np.cumsum(lengths) - lengths)

    def parts(self, users_at_once: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """All windows as columns, so many users at a time, the least recently active first."""
        users, arena = self.users, self.arena
        slots = users.by_activity()
        for start in range(0, len(slots), users_at_once):
            part = slots[start : start + users_at_once]
            rows = self.rows(part)
            yield {
                "users": users.table.keys(part),
                "epochs": users.epochs[part],
                "appended": users.appended[part],
                "active": users.active[part],
                "lengths": users.lengths[part],
                "items": arena.items[rows],
                "actions": arena.actions[rows],
                "times": arena.times[rows],
                "features": arena.features[rows].reshape(-1),
            }

    def load(self, part: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add the users and windows of such a part."""
        if not len(part["users"]):
            return
        users, arena = self.users, self.arena
        slots = users.add(part["users"], part["epochs"])
        users.appended[slots] = part["appended"]
        users.active[slots] = part["active"]
        users.lengths[slots] = part["lengths"]
        users.heads[slots], users.tails[slots] = arena.chain(users.firsts(slots), part["lengths"])
        rows = self.rows(slots)
        arena.items[rows] = part["items"]
        arena.actions[rows] = part["actions"]
        arena.times[rows] = part["times"]
        arena.features[rows] = part["features"].reshape(arena.features[rows].shape)
        self.events += len(rows)
        if self._window:
            users.newest[slots] = self._newest(slots)

    def remove(self, slots: Slots) -> None:
        if not len(slots):
            return
        users = self.users
        lengths = users.lengths[slots]
        self._release(self.arena.blocks(users.heads[slots], blocks_of(users.firsts(slots), lengths)))
        self.events -= int(lengths.sum())
        users.remove(slots)

    def _release(self, blocks: Blocks) -> None:
        if self._pending is not None:
            self._pending.hold(blocks)
        else:
            self.arena.release(blocks)

    def _emit(
        self, batch: EventBatch, rows: Ints, slots: Slots, numbers: Ints, rolls: Ints, role: Role = Role.NEW
    ) -> None:
        """Note new events, grouped by user and in order; `rolls`: how often its window rolls before each."""
        users, pending = self.users, self._pending
        assert pending is not None
        pieces = np.flatnonzero(
            np.append(True, (slots[1:] != slots[:-1]) | (rolls[1:] != rolls[:-1]))
        )  # events up to the next one of these come upon the same window
        users_of = slots[pieces]
        begin = users.firsts(users_of)
        firsts = begin + rolls[pieces] * self.chunk
        # An open sequence goes on as long as its window has not rolled.
        sequences = np.where(users.open_first[users_of] == firsts, users.open[users_of], NO_SEQUENCE)
        opening = np.flatnonzero(sequences == NO_SEQUENCE)
        if len(opening):
            opened, begin, at = users_of[opening], begin[opening], firsts[opening]
            heads = self.arena.follow(users.heads[opened], block_of(at) - block_of(begin))
            sequences[opening] = pending.open(Sequences(users.table.keys(opened), opened, heads, at))
        users.open[users_of] = sequences  # of a window that rolled on the way the last
        users.open_first[users_of] = firsts
        users.shared[slots] = np.maximum(users.shared[slots], numbers + 1)
        roles = np.full(len(rows), role, np.uint8)
        sequences = np.repeat(sequences, np.diff(pieces, append=len(rows)))
        pending.add(NewEvents(sequences, numbers, batch.offsets[rows], roles))

    def rolls_of(self, lengths: Ints) -> Ints:
        """How often a history rolls until it has taken in so many events, counted without dropping any."""
        over = lengths - self._window
        return np.where(over > 0, (over - 1) // self.chunk + 1, 0)
