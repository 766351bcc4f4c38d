"""Segments and the topic behind them are read as one log, whatever is drawn and wherever the seam lies."""

import collections
import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest

from grstream import config as configs
from grstream.events import EventDecoder, Tombstones
from grstream.histories import RollingHistories
from grstream.keys import Namespace, key_of
from grstream.ledger import Disposition, Ledger, OffsetRange
from grstream.partition_reader import PartitionReader
from grstream.segments import (
    SCHEMA,
    Manifest,
    Partition,
    Record,
    SegmentError,
    SegmentLog,
    Segments,
    directory,
    write_manifest,
    write_segment,
)
from grstream.snapshot_files import SnapshotFiles
from tests.grstream.streams import START_MS, make_config

LEDGER = Ledger([OffsetRange(0, 0, 5, Disposition.TRAINED)])


def config_in(storage: pathlib.Path) -> configs.Config:
    histories = {"window": 4, "chunk": 2, "duplicate_window": 12, "lateness_ms": 5}
    return make_config(storage, "127.0.0.1:9", "actions", histories=histories)


def event(user: int, item: int, at: int, **fields: Any) -> bytes:
    known = {"user_id": user, "item_id": item, "actions": ["click"], "timestamp_ms": START_MS + at}
    return json.dumps({**known, **fields}).encode()


def write(
    config: configs.Config,
    partitions: dict[int, tuple[Sequence[Record], int]],
    file_records: int = 3,
) -> Segments:
    """Segments of these records, by partition, and its seam."""
    path = directory(config)
    path.mkdir(parents=True)
    decoder = EventDecoder(config.events)
    held = {}
    for partition, (records, seam) in partitions.items():
        files = []
        for at in range(0, len(records), file_records):
            part = records[at : at + file_records]
            offsets, values = [r.offset for r in part], [r.value for r in part]
            users = dict.fromkeys(offsets)
            batch = decoder.decode(partition, offsets, values, [r.timestamp for r in part]).batch
            users |= dict(zip(batch.offsets.tolist(), batch.users.tolist(), strict=True))
            keys = [r.key for r in part]
            times = [r.timestamp for r in part]
            columns = [offsets, times, list(users.values()), keys, values, [False] * len(part)]
            table = pa.table(
                [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
            )
            name = f"p{partition:05d}-{at:06d}.parquet"
            files.append(write_segment(path / name, table, offsets[-1] + 1))
        held[partition] = Partition(start=records[0].offset if records else seam, seam=seam, files=files)
    counts = dict.fromkeys(("rows", "records", "rejected", "left_out", "repeated", "holes"), 0)
    write_manifest(
        path,
        Manifest(
            topic=config.kafka.topic, source="test", created_ms=0, before_ms=None, partitions=held, **counts
        ),
    )
    return Segments(path)


# -- one partition, cut anywhere --------------------------------------------------------------------------


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    """Records from any offset on: events, late ones, duplicates, poison, tombstones, and holes."""
    records, offset = [], draw(st.integers(-60, 5))
    for i in range(draw(st.integers(1, 40))):
        user, late = draw(st.integers(0, 2)), draw(st.sampled_from([0, 0, 3, 9]))
        plain = event(user, i, i - late)
        named = event(user, i, i - late, event_id=str(draw(st.integers(0, 3))))
        value = draw(st.sampled_from([plain, plain, named, named, b"poison", None]))
        records.append(Record(offset, START_MS + i, str(user).encode(), value))
        offset += draw(st.sampled_from([1, 1, 1, 3]))
    return records


@dataclasses.dataclass
class Fold:
    """What came of a log: each new event with what it was predicted from, dispositions, and histories."""

    behind: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    ends: dict[int, Disposition] = dataclasses.field(default_factory=dict)
    histories: list[tuple[list[int], int, int]] = dataclasses.field(default_factory=list)

    def pack(self, reader: PartitionReader) -> None:
        batch = reader.histories.pack()
        stops = np.cumsum(batch.lengths)
        starts = np.repeat(stops - batch.lengths, batch.lengths)
        for at, offset in zip(np.flatnonzero(batch.roles), batch.offsets.tolist(), strict=True):
            self.behind[offset] = batch.items[starts[at] : at + 1].tolist()
        for r in batch.ranges:
            for offset in range(r.start, r.stop):
                assert offset not in self.ends
                self.ends[offset] = r.disposition


def fold(
    config: configs.Config,
    records: Sequence[Record],
    seam: int,
    segments: Segments | None = None,
    consumed: Ledger | None = None,
    most: int = 3,
    at: int | None = None,
) -> Fold:
    """Read a log whose part before the seam is in segments, as `LogReader` does; from `at`, or its start."""
    found, stop = Fold(), records[-1].offset + 1
    start = min(records[0].offset, seam) if at is None else at
    restored = None if at is None else SnapshotFiles(config, 0).restore(at, at)
    histories = restored[0] if restored else RollingHistories(config.histories, features=0)
    held = consumed.consumed(0) if consumed else []
    reader = PartitionReader(config, 0, held, histories, start, segments)
    if segments:
        earlier = SegmentLog(segments, {0: start})
        while earlier:
            for part, position in earlier.fetch(most).values():
                if part:
                    reader.take(part)
                reader.advance(position)
            if reader.position % 2:
                found.pack(reader)
    rest = [r for r in records if r.offset >= reader.position]
    for begin in range(0, len(rest), most):
        reader.take(rest[begin : begin + most])
        if reader.position % 2:
            found.pack(reader)
    reader.advance(stop)
    found.pack(reader)
    for user in range(3):
        history = histories.history(key_of(Namespace.USER, user))
        found.histories.append((history.items.tolist(), history.epoch, history.appended))
    return found


@hypothesis.settings(max_examples=150)
@hypothesis.given(logs(), st.data())
def test_a_stream_split_at_a_seam_is_the_stream_in_one_log(
    records: list[Record], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(records)))
    seam = records[cut].offset if cut < len(records) else records[-1].offset + 1
    with tempfile.TemporaryDirectory() as storage:
        config = config_in(pathlib.Path(storage))
        segments = write(config, {0: (records[:cut], seam)}, data.draw(st.integers(1, 9)))
        whole = fold(config, records, seam)
        split = fold(config, records, seam, segments, most=data.draw(st.integers(1, 9)))
        assert split == whole
        # What was consumed already, in any order, is not emitted again; and the histories are the same.
        before = data.draw(st.sets(st.sampled_from(sorted(whole.ends))))
        consumed = Ledger(OffsetRange(0, o, o + 1, whole.ends[o]) for o in before)
        rest = fold(config, records, seam, segments, consumed, data.draw(st.integers(1, 9)))
        assert rest.ends == {o: d for o, d in whole.ends.items() if o not in before}
        assert rest.behind == {o: items for o, items in whole.behind.items() if o not in before}
        assert rest.histories == whole.histories


@hypothesis.settings(max_examples=50)
@hypothesis.given(logs(), st.data())
def test_reading_resumes_from_a_snapshot_in_a_segment_at_the_seam_or_behind_it(
    records: list[Record], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(records)))
    seam = records[cut].offset if cut < len(records) else records[-1].offset + 1
    stop = data.draw(st.sampled_from([seam, *(r.offset + 1 for r in records)]))
    with tempfile.TemporaryDirectory() as storage:
        config = config_in(pathlib.Path(storage))
        segments = write(config, {0: (records[:cut], seam)})
        whole = fold(config, records, seam)
        reader = PartitionReader(
            config, 0, [], RollingHistories(config.histories, features=0), records[0].offset
        )
        reader.take([r for r in records if r.offset < stop])
        reader.advance(stop)
        SnapshotFiles(config, 0).write(reader.histories, stop)
        assert SnapshotFiles(config, 0).offsets() == [stop]
        consumed = Ledger(OffsetRange(0, o, o + 1, d) for o, d in whole.ends.items() if o < stop)
        rest = fold(config, records, seam, segments, consumed, at=stop)
        assert rest.ends == {o: d for o, d in whole.ends.items() if o >= stop}
        assert rest.behind == {o: items for o, items in whole.behind.items() if o >= stop}
        assert rest.histories == whole.histories


def test_an_id_that_comes_again_across_the_seam_is_a_duplicate_within_the_window(
    tmp_path: pathlib.Path,
) -> None:
    config = config_in(tmp_path)  # ids are unique within 12 offsets
    old = [Record(o, START_MS, None, event(1, o, o, event_id=f"{o}")) for o in range(-20, 0)]
    new = [Record(o, START_MS, None, event(1, o, o, event_id=f"{o - 13 if o else -1}")) for o in range(3)]
    found = fold(config, [*old, *new], 0, write(config, {0: (old, 0)}))
    # -1 came 1 offset before, -12 and -11 came 13.
    assert [found.ends[o] for o in range(3)] == [Disposition.DUPLICATE, *[Disposition.TRAINED] * 2]


# -- what a storage holds ---------------------------------------------------------------------------------


def plain(partition: int, start: int, count: int, step_ms: int = 1) -> list[Record]:
    return [
        Record(start + i, START_MS + i * step_ms, None, event(i % 3, partition * 100 + i, i * step_ms))
        for i in range(count)
    ]


def test_partitions_go_side_by_side_in_time(tmp_path: pathlib.Path) -> None:
    config = config_in(tmp_path)
    segments = write(config, {0: (plain(0, -10, 10, 10), 0), 1: (plain(1, 5, 20, 5), 25), 2: ([], 7)})
    log = SegmentLog(segments, {0: -10, 1: 5, 2: 7, 3: 0})
    seen: dict[int, list[Record]] = collections.defaultdict(list)
    order = []
    while log:
        [(partition, (records, position))] = log.fetch(1).items()
        seen[partition] += records
        order += [r.timestamp for r in records]
        assert position == records[-1].offset + 1
    assert order == sorted(order)
    assert {p: len(records) for p, records in seen.items()} == {0: 10, 1: 20}


def test_a_partition_that_came_to_its_stop_is_left_and_the_others_are_read_on(tmp_path: pathlib.Path) -> None:
    segments = write(config_in(tmp_path), {0: (plain(0, -9, 9), 0), 1: (plain(1, -9, 9), 0)})
    log = SegmentLog(segments, {0: -9, 1: -9})
    count: collections.Counter[int] = collections.Counter()
    while log:
        for partition, (records, _) in log.fetch(2, {0: -5, 1: 50}).items():
            count[partition] += len(records)
    assert 4 <= count[0] < 9
    assert count[1] == 9


def test_reading_begins_in_the_middle_of_a_file(tmp_path: pathlib.Path) -> None:
    records = plain(0, -10, 10)
    segments = write(config_in(tmp_path), {0: (records, 0)})
    for offset in range(-12, 2):
        read = [r for part in segments.records(0, offset) for r in part]
        assert read == [r for r in records if r.offset >= offset]


def test_the_first_offset_of_a_time(tmp_path: pathlib.Path) -> None:
    segments = write(config_in(tmp_path), {0: (plain(0, -10, 10, 10), 0)})
    for after, offset in [(-1, -10), (0, -10), (1, -9), (90, -1), (91, 0)]:
        assert segments.first_at(0, START_MS + after) == offset


def test_a_damaged_or_missing_file_is_named(tmp_path: pathlib.Path) -> None:
    config = config_in(tmp_path)
    segments = write(config, {0: (plain(0, 0, 9), 9)})
    names = [s.file for s in segments.manifest.partitions[0].files]
    (segments.path / names[2]).unlink()
    with pytest.raises(SegmentError, match=f"{names[2]} is missing"):
        list(segments.records(0, 0))
    data = bytearray((segments.path / names[1]).read_bytes())
    data[40] ^= 1
    (segments.path / names[1]).write_bytes(data)
    with pytest.raises(SegmentError, match=f"{names[1]} does not match"):
        list(segments.records(0, 0))
    (segments.path / "manifest.json").write_text("{")
    with pytest.raises(SegmentError, match=r"manifest\.json cannot be read"):
        Segments.of(config)


def test_segments_of_another_topic_are_not_used(tmp_path: pathlib.Path) -> None:
    config = config_in(tmp_path)
    assert Segments.of(config) is None
    write(config, {0: (plain(0, 0, 9), 9)})
    other = config.model_copy(update={"kafka": config.kafka.model_copy(update={"topic": "clicks"})})
    with pytest.raises(SegmentError, match="made for topic actions, not clicks"):
        Segments.of(other)


def test_training_that_began_without_segments_does_not_take_them_up(tmp_path: pathlib.Path) -> None:
    config = config_in(tmp_path)
    assert Segments.of_training(config, LEDGER) is None
    segments = write(config, {0: (plain(0, 0, 9), 9)})
    with pytest.raises(SegmentError, match="made after training had begun without it"):
        Segments.of_training(config, LEDGER)
    assert not segments.claimed()
    assert Segments.of_training(config, Ledger()) is not None
    assert segments.claimed()
    assert Segments.of_training(config, LEDGER) is not None


# -- forgetting -------------------------------------------------------------------------------------------


def forget(segments: Segments, users: Sequence[int], partition: int = 0, at: int = 10**6) -> int:
    """Forget these users by tombstones at and behind an offset."""
    keys = [key_of(Namespace.USER, user) for user in users]
    segments.note(partition, Tombstones.of([(at + i, key) for i, key in enumerate(keys)]))
    return segments.forget()


def test_forgotten_users_leave_their_offsets_and_nothing_else(tmp_path: pathlib.Path) -> None:
    config = config_in(tmp_path)
    records = [*plain(0, -12, 11), Record(-1, START_MS, None, b"poison")]
    segments = write(config, {0: (records, 0), 1: (plain(1, 0, 2), 2)})
    before = set(segments.path.iterdir())
    reading = segments.records(0, -12)
    first = next(reading)
    assert forget(Segments(segments.path), (0, 77)) == 4
    after = [*first, *(r for part in reading for r in part)]  # who read meanwhile reads on
    assert {-11, -10, -1} <= {r.offset for r in after} <= set(range(-12, 0))
    again = Segments(segments.path)
    kept = [r for part in again.records(0, -12) for r in part]
    gone = again.forgotten(0).tolist()
    assert gone == [-12, -9, -6, -3]
    assert kept == [r for r in records if r.offset not in gone]
    assert len(set(again.path.iterdir())) == len(before)
    assert forget(again, (0, 77)) == 0
    assert [r for part in again.records(1, 0) for r in part] == plain(1, 0, 2), "the log of another partition"
    found = fold(config, records, 0, again)
    assert {found.ends[o] for o in gone} == {Disposition.CONTROL}
    assert found.histories[0] == ([], 0, 0)


def test_what_a_user_did_after_a_tombstone_stays(tmp_path: pathlib.Path) -> None:
    """In a dump tombstones stand among the events."""
    segments = write(config_in(tmp_path), {0: (plain(0, 0, 12), 12)})
    key = key_of(Namespace.USER, 0)
    for at in (7, 2, 5):
        segments.note(0, Tombstones.of([(at, key)]))
    assert Segments(segments.path).forget() == 3
    assert segments.noted_at() == math.inf
    assert Segments(segments.path).forgotten(0).tolist() == [0, 3, 6]


def test_what_a_crash_left_of_forgotten_users_goes_with_the_next_call(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = write(config_in(tmp_path), {0: (plain(0, 0, 12), 12)})

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    def crash_at_segments(path: pathlib.Path, missing_ok: bool = False) -> None:
        if path.suffix == ".parquet":
            raise KeyboardInterrupt
        if path.exists() or not missing_ok:
            os.unlink(path)

    for step, crashes in (("write_manifest", crash), ("pathlib.Path.unlink", crash_at_segments)):
        with monkeypatch.context() as patch:
            patch.setattr(f"grstream.segments.{step}", crashes)
            with pytest.raises(KeyboardInterrupt):
                forget(Segments(segments.path), (0,))
    assert Segments(segments.path).forget() == 0, "the manifest was written"
    named = {segment.file for segment in Segments(segments.path).manifest.partitions[0].files}
    assert {path.name for path in segments.path.iterdir()} == {*named, "manifest.json"}
    assert Segments(segments.path).forgotten(0).tolist() == [0, 3, 6, 9]


def test_a_reader_notes_the_tombstones_that_were_not_read_before(tmp_path: pathlib.Path) -> None:
    config = config_in(tmp_path)
    segments = write(config, {0: (plain(0, -12, 12), 0)})
    records = [Record(o, START_MS, str(o % 2).encode(), None) for o in range(4)]
    fold(
        config, records, 0, consumed=Ledger([OffsetRange(0, 0, 4, Disposition.TOMBSTONE)]), segments=segments
    )
    assert segments.noted_at() == math.inf
    fold(config, records, 0, segments=segments)
    assert segments.noted_at() > 0
    assert segments.forget() == 8
    assert segments.forgotten(0).tolist() == [o for o in range(-12, 0) if (o + 12) % 3 != 2]


def test_rejected_rows_of_forgotten_users_go_too(tmp_path: pathlib.Path) -> None:
    segments = write(config_in(tmp_path), {0: ([], 0)})
    path = segments.path / "rejected-000000000000000.parquet"
    users = pa.array([key_of(Namespace.USER, 1), None, 2, key_of(Namespace.USER, 1)], pa.int64())
    pa.parquet.write_table(pa.table({"user": users, "row": [1, 2, 3, 4]}), path)
    assert forget(segments, (1,)) == 0
    assert pa.parquet.read_table(path)["row"].to_pylist() == [2, 3]
