"""Laws 3, 4, 6 and 7 where impressions are joined with the actions that name them.

`Join` is the definition of the join, one event at a time in plain Python, beside `Fold`, the histories'.
"""

import dataclasses
import itertools
import tempfile
from pathlib import Path
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from grstream import snapshots
from grstream.config import ExposuresConfig, HistoriesConfig
from grstream.events import EventBatch, Tombstones
from grstream.histories import RollingHistories
from grstream.keys import ABSENT
from grstream.ledger import Disposition, Ledger, OffsetRange
from grstream.microbatch import MicroBatch, Role
from tests.laws.test_histories import FEATURES, PARTITION, SCHEMA, Event, Fold, batch_of

STRANGER = 2**60  # like no other number here
HISTORIES = HistoriesConfig(
    window=7, chunk=3, lateness_ms=20, duplicate_window=30, max_users=4, max_events=20
)


@dataclasses.dataclass(frozen=True)
class Shown(Event):
    exposure: int = ABSENT
    actions: int = 1


@dataclasses.dataclass
class Open:
    offset: int
    key: int
    clock: int
    count: int
    user: int
    labels: int = 0


class Join:
    """What becomes of each offset, with which labels, and when."""

    def __init__(self, config: ExposuresConfig) -> None:
        self.config, self.clock, self.count, self.early = config, -1, 0, 0
        self.open: list[Open] = []
        self.ends: dict[int, Disposition] = {}
        self.labels: dict[int, int] = {}
        self.released_at: dict[int, int] = {}  # offset -> the record behind which it may be settled
        self._waiting: list[int] = []

    def take(self, event: Shown, duplicate: bool) -> None:
        if event.forgets:
            for exposure in self.open:
                if exposure.user == event.user:
                    exposure.key = ABSENT
        elif duplicate:
            self.ends[event.offset] = Disposition.DUPLICATE
        else:
            self.clock, self.count = max(self.clock, event.time), self.count + 1
            self._close()
            self._judge(event)
        if not event.forgets:
            self._waiting.append(event.offset)
        oldest = self.open[0].offset if self.open else event.offset + 1
        for offset in [o for o in self._waiting if o < oldest]:
            self.released_at[offset] = event.offset
            self._waiting.remove(offset)

    def _close(self) -> None:
        while self.open:
            first = self.open[0]
            over = self.clock - first.clock > self.config.window_ms
            if not over and self.count - first.count < self.config.max_open:
                return
            self.early += not over
            self.labels[first.offset] = first.labels
            del self.open[0]

    def _judge(self, event: Shown) -> None:
        self.ends[event.offset] = Disposition.TRAINED
        if event.exposure and not event.actions:
            self.open.append(Open(event.offset, event.exposure, self.clock, self.count, event.user))
        elif event.exposure:
            named = [e for e in self.open if e.key == event.exposure]
            self.ends[event.offset] = Disposition.JOINED if named else Disposition.CORRECTION
            if named:
                named[-1].labels |= event.actions
            elif self.config.late_labels == "train":
                self.labels[event.offset] = event.actions
        else:
            self.labels[event.offset] = event.actions


def reference(config: ExposuresConfig, log: list[Shown]) -> tuple[Fold, Join]:
    fold, join = Fold(HISTORIES), Join(config)
    for event in log:
        fold.take(event)
        join.take(event, event.offset in fold.duplicates)
    return fold, join


@st.composite
def logs(draw: st.DrawFn) -> list[Shown]:
    """Few users and few exposure ids, so that ids come again, and clocks that stand, leap and run back."""
    random = Random(draw(st.integers(0, 2**32)))
    offset, now, log = random.randrange(3), 1000, []
    for _ in range(draw(st.integers(0, 120))):
        now += random.choice([0, 0, 1, 1, 2, 9]) if random.random() < 0.97 else 200
        user = random.randrange(5)
        exposure = 100 * user + random.randrange(1, 6) if random.random() < 0.8 else ABSENT
        actions = random.randrange(1, 4) if exposure == ABSENT or random.random() < 0.5 else 0
        key = random.randint(1, 15) if random.random() < 0.1 else ABSENT
        time = now - (random.randrange(40) if random.random() < 0.2 else 0)
        forgets = random.random() < 0.04
        log.append(Shown(offset, user, time, key, True, forgets, exposure, actions))
        offset += 1 if random.random() < 0.9 else random.randint(2, 4)
    return log


exposures = st.builds(
    ExposuresConfig,
    window_ms=st.sampled_from([1, 3, 20, 1000]),
    late_labels=st.sampled_from(["count", "train"]),
    max_open=st.sampled_from([1, 4, 17, 1000]),
)
cuts = st.lists(st.integers(0, 120), max_size=12).map(sorted)


def decoded(log: list[Shown]) -> tuple[EventBatch, Tombstones]:
    events = [e for e in log if not e.forgets]
    batch = dataclasses.replace(
        batch_of(events),
        actions=np.array([e.actions for e in events], np.int32),
        exposures=np.array([e.exposure for e in events], np.int64),
    )
    return batch, Tombstones.of([(e.offset, e.user) for e in log if e.forgets])


def make(config: ExposuresConfig) -> RollingHistories:
    return RollingHistories(HISTORIES, features=FEATURES, partition=PARTITION, exposures=config)


class Reader:
    """Reads a log as `PartitionReader` does: what the ledger holds is not emitted again."""

    def __init__(self, histories: RollingHistories, consumed: Ledger, position: int) -> None:
        self.histories, self._consumed, self.position = histories, consumed.consumed(PARTITION), position

    def take(self, log: list[Shown]) -> None:
        batch, tombstones = decoded(log)
        self.histories.append(batch, np.array([self._new(int(o)) for o in batch.offsets], bool), tombstones)
        for event in log:
            if event.forgets and self._new(event.offset):
                self.histories.settle(
                    OffsetRange(PARTITION, event.offset, event.offset + 1, Disposition.TOMBSTONE)
                )
        self.position = log[-1].offset + 1 if log else self.position

    def _new(self, offset: int) -> bool:
        return not any(a <= offset < b for a, b in self._consumed)


def sequences(batch: MicroBatch):
    """(offset, role, labels, what it stands behind, of (item, actions) each) of every new event."""
    starts = np.repeat(np.cumsum(batch.lengths) - batch.lengths, batch.lengths)
    new = np.flatnonzero(batch.roles != Role.CONTEXT)
    for n, at in enumerate(new.tolist()):
        rows = slice(int(starts[at]), at)
        before = list(zip(batch.items[rows].tolist(), batch.actions[rows].tolist(), strict=True))
        yield int(batch.offsets[n]), Role(batch.roles[at]), int(batch.labels[n]), before


def assert_emitted(batches: list[MicroBatch], fold: Fold, join: Join, up_to: int, begun: Ledger) -> None:
    """Everything that may be settled once `up_to` was read is, once, and as the definition has it."""
    ledger = Ledger(itertools.chain(begun, *(b.ranges for b in batches)))  # raises where two overlap
    settled = {o: r.disposition for r in ledger for o in range(r.start, r.stop)}
    for offset, end in join.ends.items():
        assert settled.get(offset) == (end if join.released_at.get(offset, up_to + 1) <= up_to else None)
    emitted = [new for batch in batches for new in sequences(batch)]
    held = {o for r in begun for o in range(r.start, r.stop)}
    learned = [o for o, at in join.released_at.items() if at <= up_to and o in join.labels and o not in held]
    assert sorted(o for o, *_ in emitted) == sorted(learned)
    for offset, role, labels, before in emitted:
        stood, expected_role = fold.came_upon[offset]
        assert (role, labels) == (expected_role, join.labels[offset])
        assert before == [(e.item, e.actions) for e in stood]
    for batch in batches:
        assert batch.new_events or batch.ranges


def pieces(log: list[Shown], at: list[int]) -> list[list[Shown]]:
    bounds = [0, *(min(a, len(log)) for a in at), len(log)]
    return [log[a:b] for a, b in itertools.pairwise(bounds)]


def drained(histories: RollingHistories, limit: int | None) -> list[MicroBatch]:
    batches = []
    while histories.settles:
        batches.append(histories.pack(limit=limit))
        assert limit is None or batches[-1].new_events <= limit
    return batches


@settings(max_examples=250)
@given(
    config=exposures,
    log=logs(),
    at=cuts,
    packs=st.lists(st.integers(0, 12), max_size=6),
    limit=st.sampled_from([None, 1, 3]),
)
def test_exposures_are_learned_once_with_all_their_labels_behind_what_stood_when_they_were_shown(
    config: ExposuresConfig, log: list[Shown], at: list[int], packs: list[int], limit: int | None
) -> None:
    reader, batches = Reader(make(config), Ledger(), 0), []
    for i, piece in enumerate(pieces(log, at)):
        reader.take(piece)
        if i in packs and reader.histories.settles:
            batches.append(reader.histories.pack(limit=limit))
    batches += drained(reader.histories, limit)
    fold, join = reference(config, log)
    assert_emitted(batches, fold, join, log[-1].offset if log else 0, Ledger())
    counters = reader.histories.counters()
    assert (counters.open_exposures, counters.closed_early) == (len(join.open), join.early)


@settings(max_examples=60)
@given(config=exposures, log=logs(), at=cuts)
def test_histories_are_what_they_are_without_the_join_and_show_actions_at_once(
    config: ExposuresConfig, log: list[Shown], at: list[int]
) -> None:
    trainer = make(config)
    server = RollingHistories(
        HISTORIES, features=FEATURES, partition=PARTITION, track_new=False, exposures=config
    )
    fold = Fold(HISTORIES)
    for piece in pieces(log, at):
        batch, tombstones = decoded(piece)
        server.append(batch, tombstones=tombstones)
        trainer.append(batch, tombstones=tombstones)
        for event in piece:
            fold.take(event)
        for user in range(5):
            events = fold.users[user].events if user in fold.users else []
            for histories in (trainer, server):
                held = histories.history(user)
                assert held.items.tolist() == [e.item for e in events]
                assert held.actions.tolist() == [e.actions for e in events]


@settings(max_examples=200)
@given(
    config=exposures,
    log=logs(),
    at=cuts,
    crashes=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    packs=st.sets(st.integers(0, 12)),
    ahead=st.integers(0, 2**32),
)
def test_a_crash_neither_loses_nor_doubles_an_open_exposure(
    config: ExposuresConfig, log: list[Shown], at: list[int], crashes: list[int], packs: set[int], ahead: int
) -> None:
    """Readers die and go on from the newest snapshot at or before the watermark, as `LogReader` does.

    Of what was emitted since the ledger was saved some was learned, by ranks that ran ahead.
    """
    draw, fold_join = Random(ahead), reference(config, log)
    begin = log[0].offset if log else 0
    learned: list[MicroBatch] = []
    ledger, written = Ledger(), {}
    with tempfile.TemporaryDirectory() as directory:
        reader = Reader(make(config), ledger, begin)
        for i, piece in enumerate(pieces(log, at)):
            reader.take([e for e in piece if e.offset >= reader.position])
            written[reader.position] = Path(directory) / str(reader.position)
            reader.histories.snapshot(written[reader.position], reader.position, SCHEMA)
            if i in packs and reader.histories.settles:
                batch = reader.histories.pack(limit=draw.choice([None, 1, 5]))
                if draw.random() < 0.8:  # else lost with the crash, or still under way
                    learned.append(batch)
                    for r in batch.ranges:
                        ledger.add(r)
            if i in crashes:
                consumed = ledger.consumed(PARTITION)
                # Offsets without a record are settled as control in a real log; here they are stepped over.
                watermark = next((e.offset for e in log if not covered(consumed, e.offset)), begin)
                usable = [o for o in written if o <= watermark]
                start, histories = begin, make(config)
                if usable:
                    histories, start = RollingHistories.restore(
                        written[max(usable)],
                        HISTORIES,
                        schema=SCHEMA,
                        partition=PARTITION,
                        exposures=config,
                    )
                read_to = reader.position
                reader = Reader(histories, ledger, start)
                reader.take([e for e in log if start <= e.offset < read_to])
        reader.take([e for e in log if e.offset >= reader.position])
        last = drained(reader.histories, None)
        consumed_now = Ledger([*ledger, *(r for b in last for r in b.ranges)])
        # What was packed but not learned by a reader that did not crash since is still missing: read anew.
        rest = Reader(make(config), consumed_now, begin)
        rest.take(log)
        last += drained(rest.histories, None)
        assert_emitted([*learned, *last], *fold_join, log[-1].offset if log else 0, Ledger())
        paths = [Path(directory) / name for name in ("one", "other")]
        for path, histories in zip(paths, (reader.histories, rest.histories), strict=True):
            histories.snapshot(path, 10_000, SCHEMA)
        assert paths[0].read_bytes() == paths[1].read_bytes()


@settings(max_examples=100)
@given(config=exposures, log=logs(), user=st.integers(0, 4))
def test_a_snapshot_behind_a_tombstone_names_its_user_nowhere(
    config: ExposuresConfig, log: list[Shown], user: int
) -> None:
    offset = log[-1].offset + 1 if log else 0
    shown = Shown(offset, STRANGER + user, 10**6, ABSENT, True, False, 99, 0)
    forgotten = Shown(offset + 1, STRANGER + user, 0, ABSENT, True, True)
    held: list[int] = []
    for read in ([*log, shown], [*log, shown, forgotten]):
        reader = Reader(make(config), Ledger(), 0)
        reader.take(read)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "snapshot"
            reader.histories.snapshot(path, reader.position, SCHEMA)
            with snapshots.opened(path) as (_, parts):
                integers = [c for part in parts for name, c in part.items() if name != "names"]
            held.append(sum(int((column == STRANGER + user).sum()) for column in integers))
    assert held[0] >= 1
    assert held[1] == 0


def covered(consumed: list[tuple[int, int]], offset: int) -> bool:
    return any(a <= offset < b for a, b in consumed)
