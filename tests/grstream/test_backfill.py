"""History from Parquet first, then the topic: by the job, through training, to the audit."""

import contextlib
import pathlib
import random
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import pytest
import ray

from grstream import config as configs
from grstream.audit import audit
from grstream.backfill import BackfillRefused, backfill
from grstream.datasets import DatasetError
from grstream.events import ActionEvent, Tombstones
from grstream.kafka import create_topic, partition_of, producer
from grstream.keys import Id, Namespace, key_of, partition_key
from grstream.ledger import Disposition
from grstream.segments import SCHEMA, Record, Segments, directory, write_manifest, write_segment
from grstream.snapshot_files import SnapshotFiles
from grstream.tail import HistoryTail
from grstream.train import train
from grstream.until import Until, end_offsets
from jobs import backfill as job
from tests.grstream.streams import START_MS, make_config

pytestmark = [pytest.mark.kafka, pytest.mark.ray_cluster]

PARTITIONS = 3
USERS: list[Id] = [*range(30), -7, -(2**63), 2**63 - 1, "ann", 'b"o\\b', "ü", "007"]
REPLAY = {
    "columns": {"user": "who", "item": "what", "time": "when", "time_unit": "ms", "event_id": "id"},
    "actions": [{"action": "click"}, {"action": "like", "column": "stars", "at_least": 4}],
    "records": {"record_time": "taken"},
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config_in(storage: pathlib.Path, bootstrap: str, **replay: Any) -> configs.Config:
    return make_config(
        storage,
        bootstrap,
        replay={**REPLAY, **replay},
        source={"readers": 2, "flush_events": 32, "flush_ms": 100},
        histories={"window": 16, "chunk": 4, "lateness_ms": 20},
        train={"workers": 2, "checkpoint_every_s": 1000, "publish_every_s": 1000},
    )


def stream(count: int) -> list[ActionEvent]:
    """Events a millisecond apart, one in ten late and one in twenty twice."""
    draw = random.Random(0)
    events: list[ActionEvent] = []
    for i in range(count):
        if draw.random() < 0.05 and len(events) > 40:
            events.append(events[-draw.randrange(1, 40)])
            continue
        late = draw.randrange(30) if draw.random() < 0.1 else 0
        events.append(
            ActionEvent(
                event_id=f"e{i}",
                user_id=draw.choice(USERS),
                item_id=draw.choice([draw.randrange(-50, 50), f"item {draw.randrange(50)}"]),
                actions=draw.choice([["click"], ["click", "like"]]),
                timestamp_ms=START_MS + i - late,
            )
        )
    return events


def table(events: list[tuple[int, ActionEvent]], **columns: Any) -> pa.Table:
    """Rows of a lake: events and when the topic took them."""
    return pa.table(
        {
            "who": pa.array([str(e.user_id) for _, e in events]),
            "what": pa.array([str(e.item_id) for _, e in events]),
            "when": pa.array([e.timestamp_ms for _, e in events], pa.int64()),
            "id": pa.array([e.event_id for _, e in events]),
            "stars": pa.array([5 if "like" in e.actions else 1 for _, e in events]),
            "taken": pa.array([at for at, _ in events], pa.timestamp("ms")),
            **columns,
        }
    )


def send(config: configs.Config, events: list[tuple[int, ActionEvent]]) -> list[tuple[int, int]]:
    """Put events on the topic at their times; partition and offset of each."""
    with contextlib.closing(producer(config.kafka)) as out:
        sent = [
            out.send(config.kafka.topic, e.to_json(), key=partition_key(e.user_id), timestamp_ms=at)
            for at, e in events
        ]
        out.flush()
        return [(m.partition, m.offset) for m in (s.get(timeout=10) for s in sent)]


SEAM = START_MS + 700


def held(config: configs.Config) -> dict[int, list[Record]]:
    """What a storage's segments hold, by partition."""
    segments = Segments(directory(config))
    return {
        p: [r for part in segments.records(p, h.start) for r in part]
        for p, h in segments.manifest.partitions.items()
    }


class TestALake:
    """In this order: each goes on from the storage that the one before it left."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, tmp_path_factory: pytest.TempPathFactory, kafka_bootstrap: str) -> configs.Config:
        """The topic holds what happened from 500 on; the lake what did up to 800, and some poor rows."""
        storage = tmp_path_factory.mktemp("lake")
        config = config_in(storage, kafka_bootstrap)
        create_topic(config.kafka, PARTITIONS)
        send(config, cls.events()[500:])
        rows = cls.events()[:800]
        draw = random.Random(1)
        draw.shuffle(rows)  # files of a lake are in no order
        (storage / "data" / "day=1").mkdir(parents=True)
        for number, at in enumerate(range(0, 800, 170)):
            path = storage / "data" / "day=1" / f"part-{number}.parquet"
            pa.parquet.write_table(table(rows[at : at + 170]), path, row_group_size=40)
        poor = table(cls.events()[:4])
        poor = poor.set_column(0, "who", pa.array(["", None, "ann", "bob"]))
        poor = poor.set_column(1, "what", pa.array(["x", "x", "", None], pa.string()))
        pa.parquet.write_table(poor, storage / "data" / "poor.parquet")
        return config

    @staticmethod
    def events() -> list[tuple[int, ActionEvent]]:
        return [(START_MS + i, e) for i, e in enumerate(stream(1000))]

    def test_the_job_makes_segments_of_it_that_end_at_the_seam(
        self, config: configs.Config, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = config.storage / "config.yaml"
        path.write_text(config.model_dump_json())
        data = str(config.storage / "data" / "**" / "*.parquet")
        assert job.main(["--config", str(path), "--data", data]) == 1
        assert "needs --before" in capsys.readouterr().err
        before = "2023-11-14T22:13:20.700+00:00"
        assert (
            job.main(["--config", str(path), "--data", str(config.storage / "data"), "--before", before]) == 0
        )
        assert "700  records" in capsys.readouterr().out
        segments = Segments.of(config)
        assert segments is not None
        made = segments.manifest
        assert (made.rows, made.records, made.left_out, made.rejected) == (804, 700, 100, 4)
        for p in range(PARTITIONS):
            mine = [(t, e) for t, e in self.events() if partition_of(e.user_id, PARTITIONS) == p]
            on_topic = sum(START_MS + 500 <= t < SEAM for t, _ in mine)
            assert made.partitions[p].seam == on_topic > 0
            records = [r for part in segments.records(p, made.partitions[p].start) for r in part]
            assert [r.offset for r in records] == list(range(on_topic - len(records), on_topic))
            assert [r.timestamp for r in records] == [t for t, _ in mine if t < SEAM]
            assert [ActionEvent.model_validate_json(r.value or b"") for r in records] == [
                e for t, e in mine if t < SEAM
            ]
        assert any(p.start < 0 for p in made.partitions.values())
        reasons = pa.concat_tables([pa.parquet.read_table(f) for f in segments.path.glob("rejected-*")])
        assert sorted(reasons["row"].to_pylist()) == [0, 1, 2, 3]

    def test_made_again_it_is_the_same_and_only_on_demand(self, config: configs.Config) -> None:
        data = str(config.storage / "data")
        first = held(config)
        with pytest.raises(BackfillRefused, match="--replace"):
            backfill(config, data, SEAM)
        backfill(config, data, SEAM, replace=True)
        assert held(config) == first

    def test_training_stops_in_it_at_the_seam_and_behind_it_and_each_offset_ends_once(
        self, config: configs.Config
    ) -> None:
        spans = Segments(directory(config)).manifest.partitions
        middle = {p: (h.start + h.seam) // 2 for p, h in spans.items()}
        for stops in (middle, {p: h.seam for p, h in spans.items()}):
            final = train(config, Until(offsets=stops))
            assert final is not None
            assert sum(final.settled.values()) == sum(s - spans[p].start for p, s in stops.items())
            assert audit(config).passed
        with pytest.raises(BackfillRefused, match="training has begun"):
            backfill(config, str(config.storage / "data"), SEAM, replace=True)
        final = train(config, Until.parse("now", config))
        assert final is not None
        found = audit(config)
        assert found.passed
        events = [e for _, e in self.events()]
        distinct = {(e.user_id, e.event_id) for e in events}
        assert found.count(Disposition.TRAINED) == len(distinct) == final.events
        assert found.count(Disposition.DUPLICATE) == len(events) - len(distinct) > 0

    def test_the_audit_finds_a_wrong_account_of_a_segment(
        self, config: configs.Config, tmp_path: pathlib.Path
    ) -> None:
        copy = config.model_copy(update={"storage": tmp_path / "copy"})
        shutil.copytree(config.storage, copy.storage)
        segments = Segments(directory(copy))
        for partition, held in segments.manifest.partitions.items():
            segments.note(partition, Tombstones.of([(held.seam, key_of(Namespace.USER, "ann"))]))
        assert segments.forget() > 0
        assert audit(copy).passed  # what was trained on before it was forgotten
        files = segments.manifest.partitions[0].files
        rows = pa.parquet.read_table(segments.path / files[0].file)
        kept = rows.filter(pa.compute.is_valid(rows["value"]))
        false = kept.set_column(
            kept.column_names.index("value"),
            "value",
            pa.array([b"poison", *kept["value"].to_pylist()[1:]], pa.binary()),
        )
        damaged = write_segment(segments.path / "p00000-x.parquet", false.cast(SCHEMA), files[0].stop)
        changed = segments.manifest.partitions[0].model_copy(update={"files": [damaged, *files[1:]]})
        partitions = {**segments.manifest.partitions, 0: changed}
        write_manifest(segments.path, segments.manifest.model_copy(update={"partitions": partitions}))
        offset = int(kept["offset"][0].as_py())
        assert (offset, Disposition.TRAINED, Disposition.DEAD_LETTER) in audit(copy).partitions[0].wrong

    def test_servers_without_a_snapshot_read_it_too(
        self, config: configs.Config, tmp_path: pathlib.Path
    ) -> None:
        bare = config.model_copy(update={"storage": tmp_path})
        shutil.copytree(directory(config), directory(bare))
        ends = end_offsets(config)
        tail = HistoryTail(bare)
        tail.start()
        try:
            deadline = time.monotonic() + 30
            while not (tail.status().caught_up and tail.status().positions == ends):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert tail.status().gaps == 0
            for partition, end in ends.items():
                found = SnapshotFiles(config, partition).restore(at_least=end)
                assert found is not None
                for user in (u for u in USERS if partition_of(u, PARTITIONS) == partition):
                    key = key_of(Namespace.USER, user)
                    ours, theirs = tail.history(key, partition)[0], found[0].history(key)
                    assert len(theirs.items)
                    np.testing.assert_array_equal(ours.items, theirs.items)
                    np.testing.assert_array_equal(ours.times, theirs.times)
                    assert (ours.epoch, ours.appended) == (theirs.epoch, theirs.appended)
        finally:
            tail.stop()


def test_a_dump_of_the_topic_is_read_as_the_topic_would_have_been(
    tmp_path: pathlib.Path, kafka_bootstrap: str
) -> None:
    columns = {"partition": "P", "offset": "O", "record_time": "taken"}
    config = config_in(tmp_path / "dumped", kafka_bootstrap, records=columns)
    create_topic(config.kafka, PARTITIONS)
    events = [(START_MS + i, e) for i, e in enumerate(stream(600))]
    places = send(config, events)
    dumped = [
        *((place, event) for place, event in zip(places, events, strict=True) if place[1] < 90),
        *zip(places[:50], events[:50], strict=True),  # a connector that was restarted writes some again
    ]
    data = tmp_path / "dump.parquet"
    rows = table([e for _, e in dumped], P=[p for (p, _), _ in dumped], O=[o for (_, o), _ in dumped])
    pa.parquet.write_table(rows, data)
    made = backfill(config, str(data), None)
    assert (made.repeated, made.holes, made.records) == (50, 0, len(dumped) - 50)
    assert {p: (h.start, h.seam) for p, h in made.partitions.items()} == {
        p: (0, 90) for p in range(PARTITIONS)
    }
    whole = config.model_copy(update={"storage": tmp_path / "whole"})
    finals = [train(c, Until.parse("now", c)) for c in (config, whole)]
    assert finals[0] is not None
    assert finals[1] is not None
    assert finals[0].settled == finals[1].settled
    found = audit(config)
    assert found.passed
    assert sum(found.count(d) for d in Disposition) == 600
    for partition, end in end_offsets(config).items():
        ours, theirs = (SnapshotFiles(c, partition).restore(at_least=end) for c in (config, whole))
        assert ours is not None
        assert theirs is not None
        for key in (key_of(Namespace.USER, user) for user in USERS):
            np.testing.assert_array_equal(ours[0].history(key).items, theirs[0].history(key).items)
            assert ours[0].history(key).epoch == theirs[0].history(key).epoch


def test_what_would_lose_or_double_events_is_refused(tmp_path: pathlib.Path, kafka_bootstrap: str) -> None:
    config = config_in(tmp_path / "storage", kafka_bootstrap)
    create_topic(config.kafka, PARTITIONS)
    data = tmp_path / "lake.parquet"
    pa.parquet.write_table(
        table([(START_MS + i, e) for i, e in enumerate(stream(9))], P=[0] * 9, O=range(9)), data
    )
    with pytest.raises(BackfillRefused, match="future"):
        backfill(config, str(data), int(time.time() * 1000) + 60_000)
    with pytest.raises(DatasetError, match="no Parquet file at"):
        backfill(config, str(tmp_path / "*.csv"), SEAM)
    dump = config_in(tmp_path / "storage", kafka_bootstrap, records={"partition": "P", "offset": "O"})
    dump = dump.model_copy(update={"kafka": config.kafka})
    with pytest.raises(BackfillRefused, match="leave --before out"):
        backfill(dump, str(data), SEAM)
    with pytest.raises(BackfillRefused, match=r"goes up to offset 9 .* ends at 0"):
        backfill(dump, str(data), None)
    missing = config_in(tmp_path / "storage", kafka_bootstrap, records={"record_time": "written"})
    missing = missing.model_copy(update={"kafka": config.kafka})
    with pytest.raises(DatasetError, match="has no column written, which replay asks for; it has who"):
        backfill(missing, str(data), SEAM)
    assert not directory(config).exists()
    assert not list(config.storage.glob("*"))


def test_a_topic_whose_first_records_went_after_the_data_ended_is_refused(
    tmp_path: pathlib.Path, kafka_bootstrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path / "storage", kafka_bootstrap)
    create_topic(config.kafka, 1)
    data = tmp_path / "lake.parquet"
    events = [(START_MS + i, e) for i, e in enumerate(stream(9))]
    pa.parquet.write_table(table(events), data)
    send(config, [(at + 1000, e) for at, e in events])
    monkeypatch.setattr("kafka.KafkaConsumer.beginning_offsets", lambda self, tps: dict.fromkeys(tps, 4))
    monkeypatch.setattr(
        "kafka.KafkaConsumer.offsets_for_times",
        lambda self, times: {tp: Found(4, START_MS + 1004) for tp in times},
    )
    with pytest.raises(BackfillRefused, match=r"begins at 2023-11-14T22:13:21\.004000\+00:00"):
        backfill(config, str(data), SEAM)
    assert backfill(config, str(data), START_MS + 1004).partitions[0].seam == 4


class Found:
    """What a broker answers for a time."""

    def __init__(self, offset: int, timestamp: int) -> None:
        self.offset, self.timestamp = offset, timestamp


def test_data_without_a_single_event_makes_an_empty_history(
    tmp_path: pathlib.Path, kafka_bootstrap: str
) -> None:
    config = config_in(tmp_path / "storage", kafka_bootstrap)
    create_topic(config.kafka, 2)
    data = tmp_path / "lake.parquet"
    rows = table([(START_MS + i, e) for i, e in enumerate(stream(9))])
    pa.parquet.write_table(rows.set_column(0, "who", pa.nulls(9, pa.string())), data)
    made = backfill(config, str(data), SEAM)
    assert (made.records, made.rejected) == (0, 9)
    assert {p: (h.start, h.seam, h.files) for p, h in made.partitions.items()} == {
        0: (0, 0, []),
        1: (0, 0, []),
    }
