"""The newest events of each user of a partition, as trainer and server both see them (laws 3, 6 and 7).

`RollingHistories` is a pure fold over the offsets of a partition: however the log is cut into batches, the
histories, their epochs and the disposition of every offset come out the same, bit for bit. One event at a
time the fold is this; the code does it for many at once:

1. An id accepted at most `duplicate_window` offsets before makes the event a duplicate, and that is all.
2. Let T be the greatest time in the user's history. An event at T or later is appended. One earlier by at
   most `lateness_ms` is *late*: from the end it is placed before the events that are later than it. One
   earlier still is *too late*, and appended as it is.
3. A history of more than `window` events drops the oldest `chunk` of them at once, and its epoch goes up by
   one. A user's first epoch is the offset of its first event, so that a user who was evicted and comes again
   never repeats an epoch. (Without a window nothing is kept, and every event is a roll.)
4. While there are more than `max_users` users or `max_events` events, the least recently active user is
   evicted.
5. A tombstone drops its user and the history; what the user does later begins another, under a new epoch.
   Ids stay in the duplicate window until they leave it, so that an event of before the tombstone that is sent
   once more does not bring the user back; such a key is a hash, from which neither user nor event is read.

What a reader needs besides, to train (`track_new`): the new events since the last `pack`, each behind exactly
the history that it came upon. That never influences the fold.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Self

import numpy as np
import numpy.typing as npt

from grstream import snapshots
from grstream.arena import Ints
from grstream.config import ExposuresConfig, HistoriesConfig
from grstream.duplicates import DuplicateWindow
from grstream.events import EventBatch, Tombstones
from grstream.exposures import KEPT, ExposureJoin
from grstream.item_names import ItemNames
from grstream.keys import Keys
from grstream.keytable import Slots
from grstream.ledger import Disposition, OffsetRange
from grstream.microbatch import MicroBatch
from grstream.pending import Pending
from grstream.schema import Schema, placed
from grstream.users import NO_SEQUENCE, grouped
from grstream.windows import Windows

_ROWS_AT_ONCE = 1 << 16
_ROWS_WHEN_FULL = 1 << 10  # each time that rows and evictions interfere, the rest of these is looked at anew
_BEFORE_ALL = -(2**63)  # offsets of a backfill may be negative
_SNAPSHOT_USERS = 1 << 14  # users in one part of a snapshot: some hundred MB with long windows


@dataclasses.dataclass(frozen=True)
class History:
    """A user's window, oldest event first: n events, F features."""

    items: Keys  # (n,)
    actions: npt.NDArray[np.int32]  # (n,)
    times: npt.NDArray[np.int64]  # (n,) milliseconds since 1970
    features: npt.NDArray[np.int64]  # (n, F)
    epoch: int  # one more whenever the oldest events are dropped; 0 for an unknown user
    appended: int  # events ever appended since the user's first (or the first after an eviction)
    item_names: dict[int, str] = dataclasses.field(default_factory=dict)  # of items whose ids are strings


@dataclasses.dataclass(frozen=True)
class _Happened:
    late: int
    too_late: int
    duplicates: int
    rolls: int
    evicted: int  # users


@dataclasses.dataclass(frozen=True)
class Counters(_Happened):
    """What a partition's histories hold now, and what happened to its events so far."""

    users: int
    events: int  # in all windows
    bytes: int  # allocated
    open_exposures: int
    closed_early: int  # exposures, because too many events waited


class OffsetOrderError(ValueError):
    """Events must come in the order of their offsets, each once."""


class RollingHistories:
    """The histories of one partition. Not thread-safe."""

    def __init__(
        self,
        config: HistoriesConfig,
        *,
        features: int,
        partition: int = 0,
        track_new: bool = True,
        exposures: ExposuresConfig | None = None,
    ) -> None:
        self._config = config
        self._partition = partition
        self._join = ExposureJoin(exposures) if exposures and track_new else None
        self._pending = Pending(partition, self._join) if track_new else None
        self._learns_corrections = exposures is not None and exposures.late_labels == "train"
        self._windows = Windows(config, features, self._pending)
        self._duplicates = DuplicateWindow(config.duplicate_window)
        self._names = ItemNames()
        self._last_offset = _BEFORE_ALL
        self._late = self._too_late = self._duplicate = self._evicted = 0

    # -- the fold ---------------------------------------------------------------------------------------

    def append(
        self,
        batch: EventBatch,
        new: npt.NDArray[np.bool_] | None = None,
        tombstones: Tombstones | None = None,
    ) -> None:
        """Take in a batch and the tombstones among it, whose offsets lie beyond all before.

        `new` says which rows are to be emitted by `pack` (default: all). The others were consumed before;
        they change the histories all the same, and their dispositions are not recorded again. New events of a
        user that a tombstone forgets are emitted all the same: what stands before it in the log was learned
        from, whenever that comes to be packed. The tombstone's own offset is the caller's to settle.
        """
        tombstones = tombstones or Tombstones.of()
        self._check(batch, tombstones)
        self._names.update(batch.item_names)
        # Events and tombstones by turns: as many events as come before the next tombstone, then all that
        # follow it without an event between.
        ahead = np.searchsorted(batch.offsets, tombstones.offsets)  # events before each tombstone
        begin = 0
        for stop in np.unique(ahead).tolist():
            self._fold(batch.rows(begin, stop), None if new is None else new[begin:stop])
            self._forget(np.unique(tombstones.users[ahead == stop]))
            begin = stop
        if begin:
            batch, new = batch.rows(begin, len(batch)), None if new is None else new[begin:]
        self._fold(batch, new)
        if len(tombstones):
            self._last_offset = max(self._last_offset, int(tombstones.offsets[-1]))
        if self._pending is not None:
            self._pending.seal(self._last_offset, self._windows.arena)
        self._names.prune(self._windows.arena.used)

    def _fold(self, batch: EventBatch, new: npt.NDArray[np.bool_] | None) -> None:
        if not len(batch):
            return
        self._last_offset = int(batch.offsets[-1])
        accepted = self._duplicates.accept(batch.event_keys, batch.offsets)
        self._duplicate += len(batch) - int(accepted.sum())
        if self._pending is not None:
            ends = np.where(accepted, np.int8(Disposition.TRAINED), np.int8(Disposition.DUPLICATE))
            if self._join is not None:
                self._join.take(batch, accepted, ends)
            settled = slice(None) if new is None else new
            self._pending.settle_rows(batch.offsets[settled], ends[settled])
            if self._join is not None:
                learned = ends == Disposition.TRAINED
                if self._learns_corrections:
                    learned |= ends == Disposition.CORRECTION
                new = learned if new is None else new & learned
        rows = np.flatnonzero(accepted)
        while len(rows):
            room = min(
                self._config.max_users - len(self._windows.users),
                self._config.max_events - self._windows.events,
            )
            at_once = _ROWS_AT_ONCE if room > len(rows) else _ROWS_WHEN_FULL
            rows = rows[self._take(batch, rows[:at_once], new) :]

    def _forget(self, users: Keys) -> None:
        slots = self._windows.users.table.find(users)
        self._windows.remove(slots[slots >= 0])
        if self._join is not None:
            self._join.forget(users)

    def _check(self, batch: EventBatch, tombstones: Tombstones) -> None:
        if batch.partition != self._partition:
            raise ValueError(f"these are histories of partition {self._partition}, got {batch.partition}")
        features = self._windows.arena.features.shape[1]
        if batch.features.shape[1:] != (features,):
            raise ValueError(f"expected {features} features an event, got {batch.features.shape}")
        for offsets in (batch.offsets, tombstones.offsets):
            if len(offsets) and (offsets[0] <= self._last_offset or (np.diff(offsets) <= 0).any()):
                raise OffsetOrderError(
                    f"expected ascending offsets beyond {self._last_offset}, got a batch of "
                    f"{len(offsets)} from {offsets[0]} to {offsets[-1]}"
                )

    def _take(self, batch: EventBatch, rows: Ints, new: npt.NDArray[np.bool_] | None) -> int:
        """Fold in a leading part of these rows, at least one, and evict; returns how many."""
        table = self._windows.users.table
        keys = batch.users[rows]
        slots = table.find(keys)
        missing = np.flatnonzero(slots < 0)
        # New users get provisional slots beyond the table until it is known how many rows are taken.
        stop = table.stop
        new_keys, seen_at, inverse = np.unique(keys[missing], return_index=True, return_inverse=True)
        seen_at = missing[seen_at]
        slots[missing] = stop + inverse
        count, over_users, over_events = len(rows), 0, 0
        if len(table) + len(new_keys) > self._config.max_users or (
            self._windows.events + count > self._config.max_events
        ):
            count, over_users, over_events = self._within_budget(slots, seen_at)
            rows, slots = rows[:count], slots[:count]
        if len(new_keys):
            taken = seen_at < count
            added = np.full(len(new_keys), -1)
            added[taken] = self._windows.users.add(new_keys[taken], batch.offsets[rows[seen_at[taken]]])
            provisional = slots >= stop
            slots[provisional] = added[slots[provisional] - stop]
        self._place(batch, rows, slots, new)
        evicted = self._windows.users.idle(over_users, over_events)
        self._evicted += len(evicted)
        self._windows.remove(evicted)
        return count

    def _within_budget(self, slots: Slots, seen_at: Ints) -> tuple[int, int, int]:
        """How many rows may be folded in before evicting, and what is then to be evicted: users, events.

        Evicting after each event, as the fold has it, and once at the end come to the same if none of the
        evicted is active in these rows. Or if it is one row.
        """
        users = self._windows.users
        stop = users.table.stop
        order, starts = grouped(slots)
        counts = np.diff(starts, append=len(order))
        group = slots[order[starts]]
        known = group < stop
        held = np.where(known, users.lengths[np.where(known, group, 0)], 0) if stop else np.zeros_like(group)
        rank = np.arange(len(order)) - np.repeat(starts, counts)
        held_before = np.repeat(held, counts) + rank
        rolled = self._windows.rolls_of(held_before + 1) - self._windows.rolls_of(held_before)
        growth = np.empty_like(order)
        growth[order] = 1 - rolled * self._windows.chunk
        over_events = (
            self._windows.events + np.maximum.accumulate(np.cumsum(growth)) - self._config.max_events
        )
        arrivals = np.zeros_like(order)
        arrivals[seen_at] = 1
        over_users = len(users) + np.cumsum(arrivals) - self._config.max_users
        count = len(slots)
        while count > 1:
            need = int(over_users[count - 1]), int(over_events[count - 1])
            evicted = users.idle(*need)
            active = np.flatnonzero(np.isin(slots[:count], evicted))
            if len(active):
                count = max(int(active[0]), 1)
            elif len(evicted) < need[0] or users.lengths[evicted].sum() < need[1]:
                count //= 2  # some who come in these rows are to be evicted in these rows
            else:
                break
        return count, int(over_users[count - 1]), int(over_events[count - 1])

    def _place(self, batch: EventBatch, rows: Ints, slots: Slots, new: npt.NDArray[np.bool_] | None) -> None:
        """Fold rows in, users side by side: in each pass of each user all that is in order, then one late."""
        is_new = np.zeros(len(rows), np.bool_)
        if self._pending is not None:
            is_new[:] = True if new is None else new[rows]
        order, starts = grouped(slots)
        rows, slots, is_new = rows[order], slots[order], is_new[order]
        while len(rows):
            first = np.zeros(len(rows), np.bool_)
            first[starts] = True
            times = batch.times[rows]
            before = np.empty_like(times)
            before[1:] = times[:-1]
            before[starts] = self._windows.users.newest[slots[starts]]
            early = times < before
            if not self._config.window or not early.any():
                self._windows.append(batch, rows, slots, first, is_new, None)
                return
            # The times before a user's first late event are its running maximum; beyond it they may not be.
            counts = np.diff(starts, append=len(rows))
            behind = np.cumsum(early, dtype=np.int64)
            behind -= np.repeat(behind[starts] - early[starts], counts)
            ordered, late = behind == 0, (behind == 1) & early
            if ordered.any():
                self._windows.append(
                    batch, rows[ordered], slots[ordered], first[ordered], is_new[ordered], None
                )
            self._place_late(batch, rows[late], slots[late], is_new[late])
            rest = (behind > 0) & ~late
            rows, slots, is_new = rows[rest], slots[rest], is_new[rest]
            starts = np.flatnonzero(np.append(True, slots[1:] != slots[:-1])) if len(slots) else slots

    def _place_late(self, batch: EventBatch, rows: Ints, slots: Slots, is_new: npt.NDArray[np.bool_]) -> None:
        """One event of each of these users, earlier than the newest in its history."""
        users, arena = self._windows.users, self._windows.arena
        too_late = users.newest[slots] - batch.times[rows] > self._config.lateness_ms
        self._too_late += int(too_late.sum())
        self._late += len(rows) - int(too_late.sum())
        at_end = too_late.copy()
        for i in np.flatnonzero(~too_late):
            slot, time = slots[i : i + 1], batch.times[rows[i]]
            window = self._windows.rows(slot)
            not_later = np.flatnonzero(arena.times[window] <= time)
            position = int(not_later[-1]) + 1 if len(not_later) else 0
            at_end[i] = position == len(window)
            if not at_end[i]:
                self._windows.insert(batch, int(rows[i]), slot, position, bool(is_new[i]))
        rows, slots, is_new = rows[at_end], slots[at_end], is_new[at_end]
        if len(rows):
            self._windows.append(
                batch, rows, slots, np.ones(len(rows), np.bool_), is_new, users.newest[slots]
            )

    # -- new events -------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """New events that the next packs may hold: since the last one, and before every open exposure."""
        return len(self._to_pack())

    @property
    def settles(self) -> bool:
        """Whether the next pack settles anything."""
        return self._to_pack().settles

    def settle(self, range_: OffsetRange) -> None:
        """Record offsets that ended otherwise: dead letters, tombstones, control records."""
        if range_.partition != self._partition:
            raise ValueError(f"these are histories of partition {self._partition}, got {range_}")
        self._to_pack().settle(range_)

    def pack(self, read_ms: int = 0, limit: int | None = None) -> MicroBatch:
        """What came since the last pack: new events behind their histories, and settled offsets.

        Not more than `limit` new events, and nothing from the oldest open exposure on. `read_ms`: wall clock
        when the oldest of them was read.
        """
        batch, sequences, slots = self._to_pack().pack(self._windows.arena, self._names, read_ms, limit)
        users = self._windows.users
        slots = slots[users.open[slots] == sequences]  # the others have another one, or another user
        users.open[slots] = NO_SEQUENCE
        users.shared[slots] = 0
        return batch

    def _to_pack(self) -> Pending:
        if self._pending is None:
            raise RuntimeError("these histories were made with track_new=False: they have nothing to pack")
        return self._pending

    # -- reading ----------------------------------------------------------------------------------------

    def history(self, user: int) -> History:
        """A user's window, by user key; empty for an unknown user. Changes nothing."""
        users, arena = self._windows.users, self._windows.arena
        slot = users.table.find(np.array([user], np.int64))
        if slot[0] < 0:
            rows, epoch, appended = np.empty(0, np.int64), 0, 0
        else:
            rows = self._windows.rows(slot)
            epoch, appended = int(users.epochs[slot][0]), int(users.appended[slot][0])
        items = arena.items[rows]
        return History(
            items=items,
            actions=arena.actions[rows],
            times=arena.times[rows],
            features=arena.features[rows],
            epoch=epoch,
            appended=appended,
            item_names=self._names.of(items),
        )

    def counters(self) -> Counters:
        held = self._windows.arena.nbytes + self._windows.users.nbytes + self._duplicates.nbytes
        join = self._join
        return Counters(
            open_exposures=0 if join is None else len(join),
            closed_early=0 if join is None else join.closed_early,
            users=len(self._windows.users),
            events=self._windows.events,
            bytes=held + (0 if join is None else join.nbytes),
            **dataclasses.asdict(self._happened()),
        )

    def _happened(self) -> _Happened:
        return _Happened(
            late=self._late,
            too_late=self._too_late,
            duplicates=self._duplicate,
            rolls=self._windows.rolls,
            evicted=self._evicted,
        )

    # -- snapshots --------------------------------------------------------------------------------------

    def snapshot(self, path: pathlib.Path, next_offset: int, schema: Schema) -> None:
        """Write the histories as of `next_offset`, the first that they have not seen; what their bits mean.

        The file is a function of the log alone. New events that wait for a pack are not part of it.
        """
        if next_offset <= self._last_offset:
            raise OffsetOrderError(f"these histories are already at {self._last_offset}, not {next_offset}")
        header = {
            "next_offset": next_offset,
            "identity": _identity(self._config, self._partition),
            "schema": dataclasses.asdict(schema),
            "happened": dataclasses.asdict(self._happened()),
        }
        if self._join is not None:
            header["exposures"] = self._join.state()[0]
        snapshots.write(path, header, self._parts(next_offset))

    def _parts(self, next_offset: int) -> Iterator[snapshots.Part]:
        names: dict[int, str] = {}
        for part in self._windows.parts(_SNAPSHOT_USERS):
            names.update(self._names.of(np.unique(part["items"])))
            yield part
        keys, offsets = self._duplicates.entries(next_offset)
        exposures = {} if self._join is None else self._join.state()[1]
        yield {
            "duplicate_keys": keys,
            "duplicate_offsets": offsets,
            "name_keys": np.array(sorted(names), np.int64),
            "names": [names[k] for k in sorted(names)],
            **{f"exposure_{name}": column for name, column in exposures.items()},
        }

    @classmethod
    def restore(
        cls,
        path: pathlib.Path,
        config: HistoriesConfig,
        *,
        schema: Schema,
        partition: int = 0,
        track_new: bool = True,
        exposures: ExposuresConfig | None = None,
    ) -> tuple[Self, int]:
        """Histories as they were, and the offset to go on from; features new to `schema` are absent in them.

        Raises SnapshotError for a damaged file, or one written with another configuration.
        """
        histories = cls(
            config,
            features=len(schema.features),
            partition=partition,
            track_new=track_new,
            exposures=exposures,
        )
        with snapshots.opened(path) as (header, parts):
            expected = _identity(config, partition)
            if header["identity"] != expected:
                raise snapshots.SnapshotError(
                    f"{path} was written with {header['identity']}, expected {expected}: "
                    "go back to that configuration, or delete it and rebuild from the log"
                )
            written = Schema(**{name: tuple(names) for name, names in header["schema"].items()})
            problem = schema.not_grown_from(written)
            if problem is not None:
                raise snapshots.SnapshotError(
                    f"{path} was written with other actions and features: {problem}; "
                    "go back to that configuration, or delete it and rebuild from the log"
                )
            columns = schema.columns_in(written)
            histories._last_offset = header["next_offset"] - 1
            happened = _Happened(**header["happened"])
            histories._windows.rolls = happened.rolls
            histories._late, histories._too_late = happened.late, happened.too_late
            histories._duplicate, histories._evicted = happened.duplicates, happened.evicted
            for part in parts:
                if schema.features != written.features:
                    held = part["features"].reshape(len(part["items"]), len(written.features))
                    part["features"] = placed(held, columns)
                histories._windows.load(part)
                histories._duplicates.accept(part["duplicate_keys"], part["duplicate_offsets"])
                histories._names.update(zip(part["name_keys"].tolist(), part["names"], strict=True))
                if histories._join is not None and "exposures" in header:
                    open_ones = {name: part[f"exposure_{name}"] for name in KEPT}
                    histories._join.load(header["exposures"], open_ones)
        return histories, histories._last_offset + 1


def _identity(config: HistoriesConfig, partition: int) -> dict[str, int]:
    """What the content of a snapshot depends on besides the log and the schema."""
    # Format 1 named neither actions nor features, and keys of features were of other namespaces.
    return {"format": 2, "partition": partition, **config.model_dump()}
