"""Laws 3, 6 and 7: histories are a fold over the log, whoever reads it and however it is cut.

`Fold` is the definition, one event at a time in plain Python.
"""

import bisect
import dataclasses
import itertools
import tempfile
from pathlib import Path
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from grstream.config import HistoriesConfig
from grstream.events import EventBatch, Tombstones
from grstream.histories import RollingHistories
from grstream.keys import ABSENT
from grstream.ledger import Disposition, Ledger
from grstream.microbatch import MicroBatch, Role
from grstream.schema import Schema

PARTITION = 3
FEATURES = 2
SCHEMA = Schema(("click",), ("context.place", "item.genre"))


@dataclasses.dataclass(frozen=True)
class Event:
    offset: int
    user: int
    time: int
    key: int
    new: bool
    forgets: bool = False  # a tombstone of the user

    @property
    def item(self) -> int:  # tells every event apart
        return self.offset * 7 + 1


@dataclasses.dataclass
class Kept:
    epoch: int
    events: list[Event]
    appended: int = 0
    active: int = 0


class Fold:
    """What each event does, and the history that it came upon."""

    def __init__(self, config: HistoriesConfig) -> None:
        self.config = config
        self.users: dict[int, Kept] = {}
        self.accepted: dict[int, int] = {}
        self.duplicates: set[int] = set()
        self.came_upon: dict[int, tuple[list[Event], Role]] = {}
        self.counted = dict.fromkeys(("late", "too_late", "duplicates", "rolls", "evicted"), 0)

    def take(self, event: Event) -> None:
        config = self.config
        if event.forgets:
            self.users.pop(event.user, None)
            return
        if event.key != ABSENT:
            last = self.accepted.get(event.key)
            if last is not None and event.offset - last <= config.duplicate_window:
                self.duplicates.add(event.offset)
                self.counted["duplicates"] += 1
                return
            self.accepted[event.key] = event.offset
        kept = self.users.setdefault(event.user, Kept(event.offset, []))
        at = len(kept.events)
        newest = max((e.time for e in kept.events), default=event.time)
        if newest - config.lateness_ms <= event.time < newest:
            self.counted["late"] += 1
            while at and kept.events[at - 1].time > event.time:
                at -= 1
        elif event.time < newest:
            self.counted["too_late"] += 1
        role = Role.NEW if at == len(kept.events) else Role.NEW_LATE
        self.came_upon[event.offset] = (kept.events[:at], role)
        kept.events.insert(at, event)
        kept.appended += 1
        kept.active = event.offset
        if len(kept.events) > config.window:
            del kept.events[: config.chunk if config.window else 1]
            kept.epoch += 1
            self.counted["rolls"] += 1
        while (
            len(self.users) > config.max_users
            or sum(len(k.events) for k in self.users.values()) > config.max_events
        ):
            del self.users[min(self.users, key=lambda u: self.users[u].active)]
            self.counted["evicted"] += 1


def append(histories: RollingHistories, records: list[Event]) -> None:
    events = [e for e in records if not e.forgets]
    tombstones = Tombstones.of([(e.offset, e.user) for e in records if e.forgets])
    histories.append(batch_of(events), np.array([e.new for e in events], np.bool_), tombstones)


def batch_of(events: list[Event]) -> EventBatch:
    def column(values) -> np.ndarray:
        return np.array(list(values), np.int64)

    items = column(e.item for e in events)
    return EventBatch(
        partition=PARTITION,
        offsets=column(e.offset for e in events),
        users=column(e.user for e in events),
        items=items,
        actions=(items % 5).astype(np.int32),
        times=column(e.time for e in events),
        features=np.stack([items + 1, items * 2], axis=1),
        event_keys=column(e.key for e in events),
        item_names={int(k): f"item-{k}" for k in items if k % 2},
    )


@st.composite
def configs(draw) -> HistoriesConfig:
    window = draw(st.sampled_from([0, 1, 2, 5, 16, 17, 40]))
    budget = draw(st.sampled_from(["loose", "users", "events", "both"]))
    return HistoriesConfig(
        window=window,
        chunk=draw(st.integers(1, max(window, 1))),
        lateness_ms=draw(st.sampled_from([0, 3, 20, 1000])),
        duplicate_window=draw(st.sampled_from([0, 1, 5, 30, 1000])),
        max_users=draw(st.integers(1, 6)) if budget in ("users", "both") else 1000,
        max_events=draw(st.integers(1, 60)) if budget in ("events", "both") else 1000,
    )


@st.composite
def logs(draw) -> list[Event]:
    """Offsets with gaps, few users so that windows roll, times that jump back, ids that come again."""
    random = Random(draw(st.integers(0, 2**32)))  # one draw: hundreds would be slow
    count = draw(st.integers(0, 150))
    users = draw(st.sampled_from([1, 2, 5, 12]))
    jump = draw(st.sampled_from([0, 2, 30]))
    repeats = draw(st.sampled_from([0.0, 0.3]))
    replayed = draw(st.sampled_from([0.0, 0.3]))
    forgotten = draw(st.sampled_from([0.0, 0.1]))
    offset, events = random.randrange(3), []
    for i in range(count):
        user = min(int(random.expovariate(1) * users / 2), users - 1)
        time = 1000 + i + (random.randint(-jump, jump) if random.random() < 0.4 else 0)
        key = random.randint(1, 15) if random.random() < repeats else random.choice([ABSENT, 1000 + i])
        forgets = random.random() < forgotten
        events.append(Event(offset, user, time, key, random.random() >= replayed, forgets))
        offset += 1 if random.random() < 0.9 else random.randint(2, 9)
    return events


cuts = st.lists(st.integers(0, 150), max_size=12).map(sorted)


def pieces(events: list[Event], at: list[int]) -> list[list[Event]]:
    bounds = [0, *(min(a, len(events)) for a in at), len(events)]
    return [events[a:b] for a, b in itertools.pairwise(bounds)]


def fold(config: HistoriesConfig, events: list[Event]) -> Fold:
    reference = Fold(config)
    for event in events:
        reference.take(event)
    return reference


def make(config: HistoriesConfig, track_new: bool = True) -> RollingHistories:
    return RollingHistories(config, features=FEATURES, partition=PARTITION, track_new=track_new)


def assert_state(histories: RollingHistories, reference: Fold) -> None:
    for user in range(-1, 13):
        history = histories.history(user)
        kept = reference.users.get(user, Kept(0, []))
        expected = batch_of(kept.events)
        for name in ("items", "actions", "times", "features"):
            np.testing.assert_array_equal(getattr(history, name), getattr(expected, name))
        assert history.item_names == expected.item_names
        assert (history.epoch, history.appended) == (kept.epoch, kept.appended)
    counters = dataclasses.asdict(histories.counters())
    assert {k: counters[k] for k in reference.counted} == reference.counted
    assert counters["users"] == len(reference.users)
    assert counters["events"] == sum(len(k.events) for k in reference.users.values())


def sequences(batch: MicroBatch):
    """Of each sequence: its user, and per event item, role, and offset where new."""
    offsets = iter(batch.offsets.tolist())
    start = 0
    for user, length in zip(batch.users.tolist(), batch.lengths.tolist(), strict=True):
        rows = range(start, start + length)
        yield (
            user,
            [
                (int(batch.items[i]), Role(batch.roles[i]), next(offsets) if batch.roles[i] else None)
                for i in rows
            ],
        )
        start += length
    assert start == len(batch.items)


def assert_packed(batches: list[MicroBatch], events: list[Event], reference: Fold) -> None:
    """Each new event stands once, behind exactly what it came upon; each offset has its disposition."""
    events = [e for e in events if not e.forgets]  # whose offsets are not the histories' to settle
    by_offset = {e.offset: e for e in events}
    seen = []
    for batch in batches:
        for user, row in sequences(batch):
            for i, (item, role, offset) in enumerate(row):
                if role is Role.CONTEXT:
                    continue
                before, expected_role = reference.came_upon[offset]
                assert (by_offset[offset].user, by_offset[offset].item) == (user, item)
                assert [r[0] for r in row[:i]] == [e.item for e in before]
                assert role is expected_role
                seen.append(offset)
            assert row[-1][1] is not Role.CONTEXT
        np.testing.assert_array_equal(batch.features[:, 0], batch.items + 1)
        np.testing.assert_array_equal(batch.actions, batch.items % 5)
        new = batch.roles != Role.CONTEXT
        assert batch.item_names == {k: f"item-{k}" for k in batch.items[new].tolist() if k % 2}
        assert batch.newest_event_ms == max(batch.times[new].tolist(), default=0)
        assert (batch.partitions == PARTITION).all()
    assert sorted(seen) == [e.offset for e in events if e.new and e.offset in reference.came_upon]
    ledger = Ledger(r for batch in batches for r in batch.ranges)  # raises where two overlap
    for event in events if events else []:
        ended = [r.disposition for r in ledger if r.start <= event.offset < r.stop]
        duplicate = event.offset in reference.duplicates
        assert ended == [Disposition.DUPLICATE if duplicate else Disposition.TRAINED] * event.new


def run(config: HistoriesConfig, events: list[Event], at: list[int], packs: list[int]) -> tuple:
    """Append in pieces cut at `at`, pack after the pieces listed; the end, and the micro-batches."""
    histories, batches = make(config), []
    for i, piece in enumerate(pieces(events, at)):
        append(histories, piece)
        if i in packs:
            batches.append(histories.pack())
    batches.append(histories.pack())
    return histories, batches


@settings(max_examples=250, deadline=None)
@given(config=configs(), events=logs(), at=cuts, packs=st.lists(st.integers(0, 12), max_size=6))
def test_histories_are_a_fold_and_new_events_stand_behind_what_they_came_upon(
    config, events, at, packs
) -> None:
    histories, batches = run(config, events, at, packs)
    reference = fold(config, events)
    assert_state(histories, reference)
    assert_packed(batches, events, reference)


@settings(max_examples=80, deadline=None)
@given(config=configs(), events=logs(), one=cuts, other=cuts, packed_at=st.integers(0, 150))
def test_cuts_change_neither_the_state_nor_the_micro_batches(config, events, one, other, packed_at) -> None:
    runs = []
    for at in (one, other):
        at = sorted([*at, packed_at])
        runs.append(run(config, events, at, [bisect.bisect_left(at, packed_at)]))
    for a, b in zip(*(batches for _, batches in runs), strict=True):
        assert a.to_block().equals(b.to_block())
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in ("one", "other")]
        for path, (histories, _) in zip(paths, runs, strict=True):
            histories.snapshot(path, 10_000, SCHEMA)
        assert paths[0].read_bytes() == paths[1].read_bytes()


@settings(max_examples=80, deadline=None)
@given(
    config=configs(), events=logs(), at=cuts, restored_after=st.integers(0, 12), writer_tracks=st.booleans()
)
def test_a_restored_reader_goes_on_as_if_it_had_read_everything(
    config, events, at, restored_after, writer_tracks
) -> None:
    reference = fold(config, events)
    histories, batches, emitted = make(config, writer_tracks), [], []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "snapshot"
        for i, piece in enumerate(pieces(events, at)):
            append(histories, piece)
            emitted += piece
            if i == restored_after:
                next_offset = emitted[-1].offset + 1 if emitted else 0
                histories.snapshot(path, next_offset, SCHEMA)
                histories, resumed_at = RollingHistories.restore(
                    path, config, schema=SCHEMA, partition=PARTITION
                )
                assert resumed_at == next_offset
                emitted, writer_tracks = [], True
        assert_state(histories, reference)
        if writer_tracks:
            batches.append(histories.pack())
            assert_packed(batches, emitted, reference)


@settings(max_examples=60, deadline=None)
@given(config=configs(), events=logs(), at=cuts)
def test_a_reader_that_does_not_train_has_the_same_histories(config, events, at) -> None:
    server = make(config, track_new=False)
    trainer, _ = run(config, events, [], [])
    for piece in pieces(events, at):
        append(server, piece)
        for user in range(12):
            server.history(user)
    assert_state(server, fold(config, events))
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in ("server", "trainer")]
        for path, histories in zip(paths, (server, trainer), strict=True):
            histories.snapshot(path, 10_000, SCHEMA)
        assert paths[0].read_bytes() == paths[1].read_bytes()


@settings(max_examples=60, deadline=None)
@given(config=configs(), events=logs())
def test_a_history_that_begins_anew_has_an_epoch_beyond_all_that_its_user_had(config, events) -> None:
    histories = make(config)
    highest: dict[int, int] = dict.fromkeys(range(13), -1)
    present: set[int] = set()
    for event in events:
        append(histories, [event])
        for user in highest:
            held = histories.history(user)
            if not held.appended:
                present.discard(user)
                continue
            assert held.epoch >= highest[user] if user in present else held.epoch > highest[user]
            present.add(user)
            highest[user] = held.epoch
