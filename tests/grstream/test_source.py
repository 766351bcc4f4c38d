"""The log becomes micro-batches: every offset settled once, behind the history it came upon."""

import contextlib
import json
import logging
import os
import pathlib
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import kafka
import kafka.admin
import kafka.errors
import numpy as np
import pytest
from ray import cloudpickle

from grstream import checkpoints, segments, source, telemetry
from grstream import config as configs
from grstream.histories import RollingHistories
from grstream.kafka import TopicMissing, create_topic, partition_count, producer
from grstream.keys import Namespace, key_of, partition_key
from grstream.ledger import Disposition, Ledger, OffsetRange
from grstream.microbatch import MicroBatch, Role
from grstream.partition_reader import PartitionReader
from grstream.reader import LogReader, LogTruncated, OffsetGap
from grstream.snapshot_files import SnapshotFiles
from grstream.until import Until, end_offsets
from tests.exported import Exported
from tests.grstream.test_segments import write as write_segments

pytestmark = pytest.mark.kafka


def make_config(storage: pathlib.Path, bootstrap: str = "127.0.0.1:9", **source: Any) -> configs.Config:
    return configs.parse(
        {
            "storage": str(storage),
            "kafka": {"bootstrap_servers": [bootstrap], "topic": f"actions-{uuid.uuid4().hex[:8]}"},
            "events": {"actions": ["click", "like"]},
            "histories": {"window": 8, "chunk": 3},
            "source": {"flush_ms": 100, **source},
        }
    )


def event(user: int, item: int, time_ms: int = 1_700_000_000_000, **fields: Any) -> bytes:
    known = {"user_id": user, "item_id": item, "actions": ["click"], "timestamp_ms": time_ms}
    return json.dumps({**known, **fields}).encode()


def send(
    config: configs.Config, values: list[tuple[int, bytes | None]], partition: int | None = None
) -> None:
    with contextlib.closing(producer(config.kafka)) as out:
        for user, value in values:
            out.send(config.kafka.topic, value, key=partition_key(user), partition=partition)
        out.flush()


def events(count: int, users: int = 5) -> list[tuple[int, bytes | None]]:
    return [(i % users, event(i % users, i, 1_700_000_000_000 + i)) for i in range(count)]


def behind(batches: list[MicroBatch]) -> dict[tuple[int, int], list[int]]:
    """Of each new event (partition, offset): the items of the history it was predicted from, and its own."""
    found = {}
    for batch in batches:
        ends = np.cumsum(batch.lengths)
        starts = np.repeat(ends - batch.lengths, batch.lengths)
        for at, partition, offset in zip(
            np.flatnonzero(batch.roles != Role.CONTEXT), batch.partitions, batch.offsets, strict=True
        ):
            found[int(partition), int(offset)] = batch.items[starts[at] : at + 1].tolist()
    return found


def ledger_of(batches: list[MicroBatch]) -> Ledger:
    """Raises OffsetConflict where an offset is settled twice."""
    return Ledger(r for batch in batches for r in batch.ranges)


# -- one partition, without a broker ----------------------------------------------------------------------


class Record(NamedTuple):
    offset: int
    value: bytes | None
    key: bytes
    timestamp: int = 1_700_000_000_000


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    """Records of one partition: events, duplicates, poison, tombstones, and offsets that hold nothing."""
    records, offset = [], 0
    for i in range(draw(st.integers(1, 40))):
        offset += draw(st.sampled_from([1, 1, 1, 2, 4]))
        user, late = draw(st.integers(0, 2)), draw(st.sampled_from([0, 0, 500]))
        plain = event(user, i, 1_700_000_000_000 + i - late)
        named = event(user, i, event_id=str(draw(st.integers(0, 5))))
        value = draw(st.sampled_from([plain, plain, named, b"poison", None]))
        records.append(Record(offset, value, partition_key(user)))
    return records


def fold(
    records: list[Record], consumed: list[tuple[int, int]], cuts: set[int], packs: set[int]
) -> list[MicroBatch]:
    """Read a partition from offset 0 in pieces that end at `cuts`, packing after those in `packs`."""
    config = make_config(pathlib.Path("unused"))
    histories = RollingHistories(config.histories, features=0, partition=0)
    reader = PartitionReader(config, 0, consumed, histories, 0)
    batches, piece = [], []
    for i, record in enumerate(records):
        piece.append(record)
        if i in cuts or i == len(records) - 1:
            reader.take(piece)
            piece = []
            if i in packs and histories.settles:
                batches.append(histories.pack())
    reader.advance(records[-1].offset + 3)
    batches.append(histories.pack())
    return batches


@hypothesis.given(
    logs(),
    st.sets(st.integers(0, 39)),
    st.sets(st.integers(0, 39)),
    st.sets(st.integers(0, 170), max_size=30),
)
def test_each_offset_is_settled_once_however_the_log_is_cut_and_whatever_was_consumed_before(
    records: list[Record], cuts: set[int], packs: set[int], before: set[int]
) -> None:
    whole = fold(records, [], set(), set())
    end = records[-1].offset + 3
    ends = {o: r.disposition for r in ledger_of(whole) for o in range(r.start, r.stop)}
    assert sorted(ends) == list(range(end))
    consumed = Ledger(OffsetRange(0, o, o + 1, ends[o]) for o in before if o < end)
    rest = fold(records, consumed.consumed(0), cuts, packs)
    both = Ledger([*consumed, *(r for batch in rest for r in batch.ranges)])  # conflicts would raise
    assert {o: r.disposition for r in both for o in range(r.start, r.stop)} == ends


@hypothesis.settings(max_examples=50)
@hypothesis.given(logs(), st.sets(st.integers(0, 39)), st.sets(st.integers(0, 39)), st.integers(0, 170))
def test_an_event_stands_behind_the_same_history_however_the_log_is_cut_and_wherever_reading_resumed(
    records: list[Record], cuts: set[int], packs: set[int], watermark: int
) -> None:
    one_by_one = behind(fold(records, [], set(range(40)), set(range(40))))
    assert behind(fold(records, [], cuts, packs)) == one_by_one
    resumed = behind(fold(records, [(0, watermark)] if watermark else [], cuts, packs))
    assert resumed == {key: items for key, items in one_by_one.items() if key[1] >= watermark}


# -- the log ----------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: pathlib.Path, kafka_bootstrap: str) -> configs.Config:
    return make_config(tmp_path, kafka_bootstrap)


def read(
    config: configs.Config, ledger: Ledger | None = None, until: Until | None = None
) -> list[MicroBatch]:
    """All that one reader makes of the log up to its present end."""
    return list(LogReader(config, 0, ledger or Ledger(), until or Until.parse("now", config)).batches())


def test_a_bounded_reading_settles_every_offset_and_returns(config: configs.Config) -> None:
    create_topic(config.kafka, 3)
    values = events(200)
    values[17] = (17 % 5, b"poison")
    values[18] = (18 % 5, None)
    send(config, values)
    batches = read(config)
    ledger = ledger_of(batches)
    assert {p: ledger.watermark(p) for p in ledger.partitions()} == {
        p: o for p, o in end_offsets(config).items() if o
    }
    assert ledger.count(Disposition.TRAINED) == 198 == sum(batch.new_events for batch in batches)
    assert (ledger.count(Disposition.DEAD_LETTER), ledger.count(Disposition.TOMBSTONE)) == (1, 1)


def test_a_dead_letter_is_delivered_with_its_reason_and_place(config: configs.Config) -> None:
    create_topic(config.kafka, 1)
    send(config, [(1, event(1, 1)), (1, b'{"user_id": 1}'), (1, event(1, 2))])
    [batch] = read(config)
    assert OffsetRange(0, 1, 2, Disposition.DEAD_LETTER) in batch.ranges
    with contextlib.closing(
        kafka.KafkaConsumer(
            config.kafka.dead_letters,
            bootstrap_servers=config.kafka.bootstrap_servers,
            group_id=None,
            auto_offset_reset="earliest",
            consumer_timeout_ms=10_000,
        )
    ) as dead:
        letter = next(dead)
    headers = {name: value.decode() for name, value in letter.headers}
    assert letter.value == b'{"user_id": 1}'
    assert (headers["partition"], headers["offset"], headers["field"]) == ("0", "1", "item_id")
    assert headers["key"] == "1"


def test_a_micro_batch_is_flushed_at_its_size(config: configs.Config) -> None:
    config = config.model_copy(
        update={"source": config.source.model_copy(update={"flush_events": 32, "flush_ms": 60_000})}
    )
    create_topic(config.kafka, 1)
    send(config, events(100))
    assert [batch.new_events for batch in read(config)] == [32, 32, 32, 4]


def test_a_micro_batch_keeps_its_size_where_a_replay_ends(config: configs.Config) -> None:
    config = config.model_copy(
        update={"source": config.source.model_copy(update={"flush_events": 8, "flush_ms": 60_000})}
    )
    create_topic(config.kafka, 1)
    send(config, events(100))
    batches = read(config, Ledger([OffsetRange(0, 0, 60, Disposition.TRAINED)]))
    assert [batch.new_events for batch in batches] == [8] * 5


def test_a_lone_event_waits_no_longer_than_it_must(config: configs.Config) -> None:
    create_topic(config.kafka, 1)
    batches = LogReader(config, 0, Ledger(), None).batches()
    threading.Timer(1.0, send, (config, [(1, event(1, 1))])).start()
    batch = next(batches)
    assert batch.new_events == 1
    assert time.time() * 1000 - batch.read_ms < 5_000
    batches.close()  # type: ignore[attr-defined]


def test_a_quiet_partition_emits_nothing(config: configs.Config) -> None:
    create_topic(config.kafka, 2)
    assert read(config) == []
    config = config.model_copy(update={"source": config.source.model_copy(update={"recycle_s": 0.5})})
    assert list(LogReader(config, 0, Ledger(), None).batches()) == []


def test_readers_share_the_partitions_out(config: configs.Config) -> None:
    config = config.model_copy(update={"source": config.source.model_copy(update={"readers": 2})})
    create_topic(config.kafka, 3)
    send(config, events(60, users=20))
    until = Until.parse("now", config)
    parts = [list(LogReader(config, r, Ledger(), until).batches()) for r in range(2)]
    assert [ledger_of(part).partitions() for part in parts] == [[0, 2], [1]]
    assert ledger_of([*parts[0], *parts[1]]).count(Disposition.TRAINED) == 60


def test_a_reader_without_a_partition_returns(config: configs.Config) -> None:
    config = config.model_copy(update={"source": config.source.model_copy(update={"readers": 2})})
    create_topic(config.kafka, 1)
    assert list(LogReader(config, 1, Ledger(), None).batches()) == []


def test_a_forgotten_user_is_gone_from_the_next_snapshot_and_for_a_resumed_reader(
    config: configs.Config,
) -> None:
    create_topic(config.kafka, 1)
    values = events(40, users=2)
    values[20] = (1, None)
    values[21:] = [(0, value) for _, value in events(40, users=1)[21:]]
    send(config, values)
    ann, bob = (key_of(Namespace.USER, user) for user in (1, 0))
    files = SnapshotFiles(config, 0)
    first = read(config, until=Until(offsets={0: 20}))
    held = files.restore(0)
    assert held
    assert len(held[0].history(ann).items)
    second = read(config, ledger_of(first), Until(offsets={0: 30}))
    assert OffsetRange(0, 20, 21, Disposition.TOMBSTONE) in second[0].ranges
    held = files.restore(0)
    assert held
    assert held[1] == 30
    assert len(held[0].history(ann).items) == 0
    assert len(held[0].history(bob).items)
    assert ann.to_bytes(8, "little", signed=True) not in files._path(30).read_bytes()
    send(config, [(1, event(1, 77))])
    third = read(config, ledger_of([*first, *second]))
    assert behind(third)[0, 40] == [key_of(Namespace.ITEM, 77)]


def exposed(config: configs.Config, **exposures: Any) -> configs.Config:
    joined = configs.ExposuresConfig(window_ms=1000, **exposures)
    return config.model_copy(update={"events": config.events.model_copy(update={"exposures": joined})})


def shown(user: int, item: int, exposure: str, at: int) -> tuple[int, bytes]:
    return user, event(user, item, at, actions=[], exposure_id=exposure)


def labels(batches: list[MicroBatch]) -> dict[int, int]:
    return {int(o): int(n) for b in batches for o, n in zip(b.offsets, b.labels, strict=True)}


def test_an_exposure_is_learned_when_its_window_ends_and_a_resumed_reader_joins_it_all_the_same(
    config: configs.Config,
) -> None:
    config = exposed(config)
    create_topic(config.kafka, 1)
    clicked, liked, both = 1, 2, 3
    send(config, [shown(1, 10, "x", 100), (1, event(1, 10, 300, exposure_id="x")), shown(2, 20, "y", 400)])
    send(config, [(1, event(1, 10, 900, actions=["like"], exposure_id="x")), (3, event(3, 30, 1450))])
    send(config, [(1, event(1, 10, 1450, exposure_id="x")), shown(1, 11, "z", 1460)])
    send(config, [(1, event(1, 11, 1470, actions=["like"], exposure_id="z")), (2, event(2, 21, 1480))])
    first = read(config)
    settled = ledger_of(first)
    assert {o: d for _, a, b, d in settled for o in range(a, b)} == {
        0: Disposition.TRAINED,
        1: Disposition.JOINED,
        2: Disposition.TRAINED,
        3: Disposition.JOINED,
        4: Disposition.TRAINED,
        5: Disposition.CORRECTION,  # the event before it ended the window
    }
    assert labels(first) == {0: both, 2: 0, 4: clicked}
    assert read(config, settled) == [], "what waits is not settled by waiting"
    send(config, [(9, event(9, 90, 2461))])
    second = read(config, settled)
    assert labels(second) == {6: liked, 8: clicked, 9: clicked}
    assert ledger_of([*first, *second]).watermark(0) == 10
    items = {
        o: [key_of(Namespace.ITEM, i) for i in held] for o, held in {0: [10], 6: [10] * 4 + [11]}.items()
    }
    stood = behind([*first, *second])
    assert {o: stood[0, o] for o in items} == items, "an impression and its labels are events of the history"


def test_late_labels_are_learned_from_where_the_configuration_says_so(config: configs.Config) -> None:
    config = exposed(config, late_labels="train")
    create_topic(config.kafka, 1)
    send(config, [(1, event(1, 10, 900, exposure_id="x")), (1, event(1, 11, 901))])
    batches = read(config)
    assert labels(batches) == {0: 1, 1: 1}
    assert ledger_of(batches).count(Disposition.CORRECTION) == 1


def test_windows_of_many_that_end_at_once_make_micro_batches_of_the_usual_size(
    config: configs.Config,
) -> None:
    config = exposed(config).model_copy(
        update={"source": config.source.model_copy(update={"flush_events": 8, "flush_ms": 60_000})}
    )
    create_topic(config.kafka, 1)
    send(config, [shown(i % 3, i, f"{i}", i) for i in range(100)])
    send(config, [(1, event(1, 500, 5000))])
    batches = read(config)
    assert [batch.new_events for batch in batches] == [8] * 12 + [5]
    assert ledger_of(batches).watermark(0) == 101


def test_a_tombstone_in_the_topic_reaches_the_segments_before_it(config: configs.Config) -> None:
    create_topic(config.kafka, 1)
    earlier = [
        segments.Record(o, 1_700_000_000_000, None, event(o % 3, o, 1_700_000_000_000)) for o in range(-9, 0)
    ]
    write_segments(config, {0: (earlier, 0)})
    send(config, [(1, None), (1, event(1, 1, 1_700_000_000_001))])
    in_time = config.model_copy(update={"forget_within_s": 2 * config.source.recycle_s})
    first = read(config)
    assert len(segments.Segments(segments.directory(config)).forgotten(0)) == 0, "seldom"
    rest = read(in_time, ledger_of(first))
    assert segments.Segments(segments.directory(config)).forgotten(0).tolist() == [-8, -5, -2]
    assert [len(items) for items in behind(first).values()][-1] == 1
    assert not rest
    assert [r.stop for batch in read(in_time) for r in batch.ranges][-1] == 2, "what is left is read"


def test_a_record_without_a_value_that_names_no_user_is_a_dead_letter(config: configs.Config) -> None:
    create_topic(config.kafka, 1)
    with contextlib.closing(producer(config.kafka)) as out:
        out.send(config.kafka.topic, None, key=b"\xff", partition=0)
        out.flush()
    [batch] = read(config)
    assert batch.ranges == (OffsetRange(0, 0, 1, Disposition.DEAD_LETTER),)


def test_snapshots_that_may_hold_a_forgotten_user_go_in_time(tmp_path: pathlib.Path) -> None:
    config = make_config(tmp_path).model_copy(update={"forget_within_s": 5000.0})
    files = SnapshotFiles(config, 0)
    for offset in range(10, 90, 10):
        files.write(RollingHistories(config.histories, features=0, partition=0), offset)
    scratch, now = files._path(30).with_name(".o0-killed"), time.time()
    scratch.write_bytes(b"half")
    for path in (*map(files._path, (50, 60, 80)), scratch):
        os.utime(path, 2 * (now - 5000 + config.source.recycle_s,))
    for path in map(files._path, (40, 70)):
        os.utime(path, 2 * (now - 4000 + config.source.recycle_s,))
    files.prune(40, 65)
    # 50 is old; 60 is, too, but the newest checkpoint's; 80 stands where the reader does.
    assert files.offsets() == [40, 60, 70, 80]
    assert not scratch.exists()


def test_snapshots_go_by_what_the_checkpoints_hold(config: configs.Config) -> None:
    create_topic(config.kafka, 1)
    files, store = SnapshotFiles(config, 0), checkpoints.CheckpointStore(config.storage / "checkpoints")
    batches: list[MicroBatch] = []
    for number in range(1, 6):
        send(config, events(10))
        batches += read(config, ledger_of(batches))
        record = checkpoints.Record(
            number=number, run="run", entries=0, step=0, events=0, newest_event_ms=0, created_ms=0
        )
        store.write(record, ledger_of(batches), lambda directory: None)
    assert files.offsets() == [10, 20, 30, 40, 50]
    for offset in (10, 20, 30, 40):
        os.utime(files._path(offset), (0, 0))
    read(config, ledger_of(batches))  # a quiet execution
    assert files.offsets() == [50]


@pytest.mark.parametrize("snapshot", [True, False])
def test_reading_resumes_behind_the_same_histories(
    config: configs.Config, snapshot: bool, caplog: pytest.LogCaptureFixture
) -> None:
    create_topic(config.kafka, 1)
    send(config, events(90))
    first = read(config, until=Until(offsets={0: 50}))
    assert SnapshotFiles(config, 0).offsets() == [50]
    if not snapshot:
        (config.storage / "snapshots" / "p00000" / "o00000000000000000050.arrow").write_bytes(b"damaged")
    with caplog.at_level(logging.INFO):
        second = read(config, ledger_of(first))
    assert f"histories from {50 if snapshot else 0}, emitting from 50" in caplog.text
    whole = read(config.model_copy(update={"storage": config.storage / "other"}))
    assert behind(first) | behind(second) == behind(whole)
    assert list(ledger_of([*first, *second])) == list(ledger_of(whole))


def test_a_read_task_exports_what_its_histories_hold(
    config: configs.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_topic(config.kafka, 2)
    send(config, events(90))
    shown: dict[str, dict[tuple[int], float]] = {}

    class Shown(Exported):
        def set_all(self, metric: telemetry.Metric, values: Mapping[Any, float]) -> None:
            shown[metric.name] = dict(values)

    monkeypatch.setattr(source, "collect_seldom", lambda: None)  # this process does more than to read
    monkeypatch.setattr(source, "EXPORT_S", 0)
    blocks = list(source._read(config, 0, Ledger(), Until.parse("now", config), Shown()))
    assert len(blocks) > 1
    assert set(shown) == {m.name for m in telemetry.METRICS if m.name.startswith("grstream_reader_")}
    assert set(shown["grstream_reader_events"]) == {(0,), (1,)}
    assert sum(shown["grstream_reader_users"].values()) == 5
    assert sum(shown["grstream_reader_open_exposures"].values()) == 0


def test_what_ranks_ran_ahead_with_is_not_emitted_again(config: configs.Config) -> None:
    create_topic(config.kafka, 1)
    send(config, events(90))
    whole = read(config)
    ahead = Ledger([OffsetRange(0, a, b, Disposition.TRAINED) for a, b in ((0, 10), (20, 30), (60, 61))])
    rest = read(config, ahead)
    offsets = sorted(int(o) for batch in rest for o in batch.offsets)
    assert offsets == [*range(10, 20), *range(30, 60), *range(61, 90)]
    expected = behind(whole)
    assert behind(rest) == {key: items for key, items in expected.items() if key[1] in offsets}


def test_a_bound_in_time_stops_before_its_first_record(config: configs.Config) -> None:
    create_topic(config.kafka, 1)
    send(config, events(10))
    time.sleep(0.05)
    until = Until(time_ms=int(time.time() * 1000) + 1500)
    threading.Timer(3.0, send, (config, events(10))).start()
    batches = read(config, until=until)
    assert sum(batch.new_events for batch in batches) == 10
    assert until.reached(config, ledger_of(batches))
    time.sleep(2)


def test_a_log_that_begins_beyond_the_position_is_an_error_with_the_size_of_the_gap(
    config: configs.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_topic(config.kafka, 1)
    send(config, events(30))
    monkeypatch.setattr(kafka.KafkaConsumer, "beginning_offsets", lambda self, tps: dict.fromkeys(tps, 20))
    with pytest.raises(OffsetGap, match=r"12 offsets .* are lost") as caught:
        read(
            config,
            Ledger([OffsetRange(0, 0, 5, Disposition.TRAINED), OffsetRange(0, 7, 10, Disposition.TRAINED)]),
            Until(offsets={0: 30}),
        )
    assert (caught.value.position, caught.value.log_start, caught.value.lost) == (5, 20, 12)


def delete_before(config: configs.Config, offset: int) -> None:
    with kafka.admin.KafkaAdminClient(bootstrap_servers=config.kafka.bootstrap_servers) as admin:
        admin.delete_records({kafka.TopicPartition(config.kafka.topic, 0): offset})


def skipping(config: configs.Config) -> configs.Config:
    return config.model_copy(update={"source": config.source.model_copy(update={"on_gap": "skip"})})


def test_a_gap_may_be_passed_over_and_is_settled_as_lost(
    config: configs.Config, caplog: pytest.LogCaptureFixture
) -> None:
    create_topic(config.kafka, 1)
    send(config, events(30))
    delete_before(config, 20)
    before = Ledger([OffsetRange(0, a, b, Disposition.TRAINED) for a, b in ((0, 5), (7, 10))])
    ledger = Ledger([*before, *ledger_of(read(skipping(config), before))])
    assert "12 offsets" in caplog.text
    assert "are lost" in caplog.text
    assert [r for r in ledger if r.disposition == Disposition.LOST] == [
        OffsetRange(0, 5, 7, Disposition.LOST),
        OffsetRange(0, 10, 20, Disposition.LOST),
    ]
    assert ledger.consumed(0) == [(0, 30)]


@pytest.mark.parametrize("on_gap", ["fail", "skip"])
def test_a_gap_that_opens_before_a_running_reader(config: configs.Config, on_gap: str) -> None:
    create_topic(config.kafka, 1)
    send(config, events(5))
    running = skipping(config) if on_gap == "skip" else config
    batches: Iterator[MicroBatch] = LogReader(running, 0, Ledger(), None).batches()
    first = next(batches)
    time.sleep(0.5)  # the fetch that is under way comes back empty
    send(config, events(20))
    delete_before(config, 15)
    if on_gap == "fail":
        with pytest.raises(OffsetGap, match="10 offsets"):
            next(batches)
        return
    rest: list[MicroBatch] = []
    while sum(batch.new_events for batch in rest) < 10:
        rest.append(next(batches))
    batches.close()  # type: ignore[attr-defined]
    ledger = ledger_of([first, *rest])
    assert ledger.consumed(0) == [(0, 25)]
    assert ledger.count(Disposition.LOST) == 10


@hypothesis.given(st.sets(st.integers(0, 40)), st.integers(0, 50))
def test_what_was_lost_is_just_what_was_not_consumed_before_the_log_s_start(
    before: set[int], log_start: int
) -> None:
    consumed = Ledger(OffsetRange(0, o, o + 1, Disposition.TRAINED) for o in before)
    config = make_config(pathlib.Path("unused"))
    histories = RollingHistories(config.histories, features=0, partition=0)
    reader = PartitionReader(config, 0, consumed.consumed(0), histories, min(before, default=0))
    lost = reader.lose(min(before, default=0), log_start)
    settled = {o for r in histories.pack().ranges for o in range(r.start, r.stop)}
    assert settled == set(range(min(before, default=0), log_start)) - before
    assert len(settled) == lost


class LogBeginningAt20:
    """A client of a log that lost its records before 20."""

    def beginning_offsets(self, partitions: list[kafka.TopicPartition]) -> dict[kafka.TopicPartition, int]:
        return dict.fromkeys(partitions, 20)

    def end_offsets(self, partitions: list[kafka.TopicPartition]) -> dict[kafka.TopicPartition, int]:
        return dict.fromkeys(partitions, 30)

    def seek(self, partition: kafka.TopicPartition, offset: int) -> None:
        assert offset == 20


def test_what_a_reader_has_read_itself_is_not_lost_when_the_log_then_begins_later() -> None:
    config = make_config(pathlib.Path("unused"), on_gap="skip")
    histories = RollingHistories(config.histories, features=0, partition=0)
    reader = PartitionReader(config, 0, [(0, 3), (12, 14)], histories, 0)
    reader.take([Record(o, event(1, o), b"1") for o in range(6)])  # type: ignore[list-item]
    log = LogReader(config, 0, Ledger(), None)
    log._partitions[0] = reader
    log._pass_over_gaps(LogBeginningAt20(), kafka.errors.OffsetOutOfRangeError())
    assert reader.position == 20
    settled = ledger_of([reader.histories.pack()])  # nothing twice
    assert settled.consumed(0) == [(3, 12), (14, 20)]
    assert settled.count(Disposition.LOST) == 12


def test_a_partition_that_is_added_is_read_from_its_start(
    config: configs.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grstream.kafka.METADATA_MS", 300)
    create_topic(config.kafka, 1)
    send(config, events(10))
    batches: Iterator[MicroBatch] = LogReader(config, 0, Ledger(), None).batches()
    seen = [next(batches)]
    with kafka.admin.KafkaAdminClient(bootstrap_servers=config.kafka.bootstrap_servers) as admin:
        admin.create_partitions({config.kafka.topic: 3})
    while partition_count(config.kafka) < 3:
        time.sleep(0.1)
    send(config, events(30, users=20))
    while sum(batch.new_events for batch in seen) < 40:
        seen.append(next(batches))
    batches.close()  # type: ignore[attr-defined]
    ledger = ledger_of(seen)
    assert {p: ledger.watermark(p) for p in ledger.partitions()} == end_offsets(config)
    assert len(ledger.partitions()) == 3


def test_a_log_that_ends_before_the_position_is_not_the_log_that_was_read(config: configs.Config) -> None:
    create_topic(config.kafka, 1)
    send(config, events(3))
    with pytest.raises(LogTruncated, match="ends at 3, but was read up to 10"):
        read(config, Ledger([OffsetRange(0, 0, 10, Disposition.TRAINED)]))


def test_a_missing_topic_is_named(config: configs.Config) -> None:
    with pytest.raises(TopicMissing, match=config.kafka.topic):
        read(config)
    with pytest.raises(TopicMissing, match=config.kafka.topic):
        list(LogReader(config, 0, Ledger(), None).batches())


def test_a_broker_that_goes_away_is_waited_for(
    tmp_path: pathlib.Path,
    broker_process: Callable[..., contextlib.AbstractContextManager[tuple[subprocess.Popen[str], str]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with contextlib.ExitStack() as first:
        process, bootstrap = first.enter_context(broker_process(tmp_path / "broker"))
        config = make_config(tmp_path / "storage", bootstrap)
        create_topic(config.kafka, 1)
        send(config, events(5))
        batches: Iterator[MicroBatch] = LogReader(config, 0, Ledger(), None).batches()
        assert next(batches).new_events == 5
        process.kill()
        process.wait()
    port = int(bootstrap.rpartition(":")[2])
    started = threading.Event()

    def come_back() -> None:
        with broker_process(tmp_path / "broker", port):
            send(config, events(7))
            started.set()
            done.wait(60)

    done = threading.Event()
    thread = threading.Timer(1.0, come_back)
    thread.start()
    try:
        assert next(batches).new_events == 7
        assert started.wait(30)
    finally:
        done.set()
        thread.join()
        batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["tomorrow", "0:1,", "1", ""])
def test_a_bound_that_is_none_says_what_one_looks_like(text: str, config: configs.Config) -> None:
    with pytest.raises(ValueError, match="expected `now`"):
        Until.parse(text, config)


def test_a_bound_is_offsets_or_a_time(config: configs.Config) -> None:
    assert Until.parse("0:12,3:0", config) == Until(offsets={0: 12, 3: 0})
    assert Until.parse("0:-12", config) == Until(offsets={0: -12})  # within a backfill
    assert Until.parse("2026-01-01T00:00:00+00:00", config) == Until(time_ms=1_767_225_600_000)


@pytest.mark.parametrize(("base", "left"), [(0, 8), (39, 6), (40, 5), (75, 4), (200, 4)])
def test_snapshots_are_kept_that_the_oldest_checkpoint_may_need(
    tmp_path: pathlib.Path, base: int, left: int
) -> None:
    config = make_config(tmp_path)
    files = SnapshotFiles(config, 0)
    for offset in range(10, 90, 10):
        files.write(RollingHistories(config.histories, features=0, partition=0), offset)
    files.prune(base, base)
    assert files.offsets() == list(range(90 - 10 * left, 90, 10))


def test_ray_data_can_name_a_read_task_of_whatever_size(tmp_path: pathlib.Path) -> None:
    """It warns of those of more than 1 MiB by the name of their function, and a partial has none."""
    config = make_config(tmp_path, readers=2)
    for task in source.ActionSource(config, Ledger()).get_read_tasks(1):
        named = cloudpickle.loads(cloudpickle.dumps(task))
        assert named.read_fn.__name__ == "_read"
