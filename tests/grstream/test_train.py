"""The training loop: turns, checkpoints, journals and versions; then the whole job on Ray."""

import contextlib
import dataclasses
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from grstream import config as configs
from grstream import trainer as trainers
from grstream.audit import audit
from grstream.board import Board, Progress
from grstream.checkpoints import CheckpointConflict, CheckpointStore
from grstream.gate import Diverged
from grstream.journal import Mark, lineage
from grstream.kafka import BrokerUnavailable, TopicMissing, create_topic, producer
from grstream.keys import partition_key
from grstream.learner import Learner
from grstream.learner_state import LearnerState
from grstream.ledger import Disposition, Ledger, OffsetRange
from grstream.microbatch import MicroBatch
from grstream.ranks import Ranks
from grstream.reader import LogTruncated
from grstream.schema import SchemaChanged
from grstream.shards import owners
from grstream.snapshot_files import SnapshotFiles
from grstream.source import ReadersNotStarted
from grstream.strays import StrayUsers
from grstream.train import NotEnoughCpus, train
from grstream.trainer import Trainer
from grstream.until import Until
from grstream.vocabulary import DAY_MS
from grstream.weight_store import WeightStore
from grstream.weights import NonFiniteWeights
from tests.grstream.micro_batches import random_batches
from tests.grstream.streams import START_MS, Stream, make_config

# -- one rank, without Ray and Kafka ------------------------------------------------------------------------


class QuietBoard(Board):
    """A board that no other process looks at."""

    def __init__(self, stop_after: int = 0) -> None:
        self.reports: list[Progress] = []
        self._turns = stop_after

    def stop_asked(self) -> bool:
        self._turns -= 1
        return self._turns == 0

    def report(self, progress: Progress) -> None:
        self.reports.append(progress)


class Shard:
    """Executions, and the iterator of each."""

    def __init__(self, executions: list[list[MicroBatch]]) -> None:
        self.executions = executions
        self.positions: list[Ledger] = []

    def renew(self, position: Ledger, ranks: int) -> list["Shard"]:
        self.positions.append(Ledger(position))
        return [self]

    def __iter__(self) -> Iterator[pa.Table]:
        for batch in self.executions.pop(0):
            yield batch.to_block()


class Bound(Until):
    """Reached when so many offsets of partition 0 are settled."""

    def reached(self, config: configs.Config, ledger: Ledger) -> bool:
        assert self.offsets is not None
        return (ledger.watermark(0) or 0) >= self.offsets[0]


def batches(count: int) -> list[MicroBatch]:
    """A stream whose every micro-batch settles its own new events."""
    return [
        dataclasses.replace(
            b, ranges=(OffsetRange(0, int(b.offsets.min()), int(b.offsets.max()) + 1, Disposition.TRAINED),)
        )
        for b in random_batches(0, count)
    ]


GREETING = MicroBatch.empty()


@pytest.fixture
def config(tmp_path: pathlib.Path) -> configs.Config:
    return make_config(tmp_path, "127.0.0.1:9", train={"checkpoint_every_s": 1000, "publish_every_s": 1000})


def run(config: configs.Config, stream: list[MicroBatch], board: QuietBoard | None = None) -> Trainer:
    trainer = Trainer(config, Ranks(), board or QuietBoard(), Bound(offsets={0: stream[-1].ranges[0].stop}))
    trainer.run(Shard([[GREETING, *stream]]))
    return trainer


def test_a_run_ends_with_a_checkpoint_of_all_it_settled(config: configs.Config) -> None:
    stream = batches(6)
    run(config, stream)
    found = CheckpointStore(config.storage / "checkpoints").newest()
    assert found is not None
    assert list(found.ledger) == list(Ledger(r for b in stream for r in b.ranges))
    assert found.record.events == sum(b.new_events for b in stream)
    assert found.record.step == 6


class Logged(Bound):
    """The log goes beyond the bound."""

    def in_log(self, config: configs.Config) -> bool:
        return True


def test_a_bounded_run_ends_where_only_open_exposures_are_left(config: configs.Config) -> None:
    joined = config.events.model_copy(update={"exposures": configs.ExposuresConfig()})
    config, stream = config.model_copy(update={"events": joined}), batches(6)
    beyond = Logged(offsets={0: stream[-1].ranges[0].stop + 1})
    executions = Shard([[GREETING, *stream[:3]], [GREETING, *stream[3:]], [GREETING], [GREETING]])
    Trainer(config, Ranks(), QuietBoard(), beyond).run(executions)
    found = CheckpointStore(config.storage / "checkpoints").newest()
    assert found is not None
    assert found.record.events == sum(b.new_events for b in stream)
    assert len(executions.executions) == 1, "one execution found nothing to settle"


def test_a_run_publishes_at_its_start_and_its_end_with_positions(config: configs.Config) -> None:
    stream = batches(6)
    run(config, stream)
    store = WeightStore(config.storage / "weights")
    assert store.numbers() == [1, 2]
    first, last = store.load(1).manifest, store.load(2).manifest
    assert (first.step, first.positions) == (0, {})
    assert (last.step, last.positions) == (6, {0: [(0, stream[-1].ranges[0].stop)]})
    assert last.newest_event_ms == max(b.newest_event_ms for b in stream)


def test_versions_are_numbered_on_after_a_restart(config: configs.Config) -> None:
    stream = batches(6)
    run(config, stream[:3])
    run(config, stream[3:])
    assert WeightStore(config.storage / "weights").numbers() == [1, 2, 3, 4]


def test_a_run_resumed_is_the_run_uninterrupted(config: configs.Config, tmp_path: pathlib.Path) -> None:
    stream = batches(8)
    whole = config.model_copy(update={"storage": tmp_path / "whole"})
    run(whole, stream)
    run(config, stream[:5])
    run(config, stream[5:])
    expected, found = (WeightStore(c.storage / "weights") for c in (whole, config))
    want, got = expected.load(expected.numbers()[-1]).weights, found.load(found.numbers()[-1]).weights
    assert {k: v.tobytes() for k, v in got.dense.items()} == {k: v.tobytes() for k, v in want.dense.items()}
    assert (got.keys.tobytes(), got.rows.tobytes()) == (want.keys.tobytes(), want.rows.tobytes())


def test_an_execution_that_ends_is_followed_by_one_from_where_it_ended(config: configs.Config) -> None:
    stream = batches(6)
    trainer = Trainer(config, Ranks(), QuietBoard(), Bound(offsets={0: stream[-1].ranges[0].stop}))
    shard = Shard([[GREETING, *stream[:4]], [GREETING, *stream[4:]]])
    trainer.run(shard)
    assert [p.watermark(0) for p in shard.positions] == [None, stream[3].ranges[0].stop]
    found = CheckpointStore(config.storage / "checkpoints").newest()
    assert found is not None
    assert found.ledger.watermark(0) == stream[-1].ranges[0].stop


def test_a_stop_is_obeyed_at_the_next_turn(config: configs.Config) -> None:
    trainer = Trainer(config, Ranks(), QuietBoard(stop_after=4), None)
    trainer.run(Shard([[GREETING, *batches(50)]]))
    found = CheckpointStore(config.storage / "checkpoints").newest()
    assert found is not None
    assert found.record.step == 3


def test_offsets_without_events_are_settled_without_a_step(config: configs.Config) -> None:
    dead = MicroBatch.empty(ranges=(OffsetRange(0, 0, 7, Disposition.DEAD_LETTER),))
    run(config, [dead])
    found = CheckpointStore(config.storage / "checkpoints").newest()
    assert found is not None
    assert (found.record.step, found.record.events, found.ledger.watermark(0)) == (0, 0, 7)


def test_what_a_journal_says_beyond_the_checkpoint_resumed_from_is_left_out(config: configs.Config) -> None:
    stream = batches(8)
    run(config, stream[:3])
    lost = Trainer(config, Ranks(), QuietBoard(), None)  # dies before it checkpoints
    with pytest.raises(RuntimeError, match="killed"):
        lost.run(_Killed([GREETING, *stream[3:6]]))
    run(config, stream[3:])
    found = CheckpointStore(config.storage / "checkpoints").newest()
    assert found is not None
    ranges = lineage(config.storage / "metrics", Mark(found.record.run, found.record.entries))
    assert list(Ledger(ranges)) == list(found.ledger)
    assert len(list((config.storage / "metrics").iterdir())) == 3


def with_events(config: configs.Config, **changes: list[str]) -> configs.Config:
    """The configuration of the same storage with other actions or features."""
    events = configs.EventsConfig(**{**config.events.model_dump(), **changes})
    return config.model_copy(update={"events": events})


def test_a_run_goes_on_under_a_grown_schema_and_says_so(
    config: configs.Config, caplog: pytest.LogCaptureFixture
) -> None:
    stream = batches(6)
    run(config, stream[:3])
    grown = with_events(config, actions=["click", "like", "buy"], item_features=["genre"])
    later = [dataclasses.replace(b, features=np.full((len(b.items), 1), 7)) for b in stream[3:]]
    run(grown, later)
    found = CheckpointStore(config.storage / "checkpoints").newest()
    assert found is not None
    assert found.record.step == 6
    assert list(found.ledger) == list(Ledger(r for b in stream for r in b.ranges))
    said = ["action buy is new: its parameters and its figures begin now"]
    said += ["feature item.genre is new: absent from every event so far"]
    assert [m for m in caplog.messages if "migrated" in m] == [f"checkpoint 1 is migrated: {s}" for s in said]
    journals = sorted((config.storage / "metrics").iterdir())
    noted = [json.loads(line).get("migrated") for path in journals for line in path.open()]
    assert [note for note in noted if note] == [said]
    weights = WeightStore(config.storage / "weights")
    recipe = weights.load(weights.numbers()[-1]).manifest.recipe
    assert (recipe.actions, recipe.features) == (["click", "like", "buy"], ["item.genre"])


@pytest.mark.parametrize("actions", [["click"], ["like", "click"], ["buy", "click", "like"]])
def test_a_run_whose_actions_were_taken_away_or_moved_does_not_begin(
    config: configs.Config, actions: list[str]
) -> None:
    run(config, batches(3))
    with pytest.raises(SchemaChanged, match=r"events\.actions"):
        Trainer(with_events(config, actions=actions), Ranks(), QuietBoard(), None)
    assert WeightStore(config.storage / "weights").numbers() == [1, 2], "nothing is published"


class Endless(Shard):
    """An execution that goes quiet."""

    def __init__(self, stream: list[MicroBatch]) -> None:
        super().__init__([stream])

    def __iter__(self) -> Iterator[pa.Table]:
        yield from super().__iter__()
        time.sleep(2)


class _Killed(Endless):
    def __iter__(self) -> Iterator[pa.Table]:
        yield from Shard.__iter__(self)
        raise RuntimeError("killed")


def test_of_two_trainers_on_one_storage_one_is_told(config: configs.Config) -> None:
    stream = batches(4)
    end = Bound(offsets={0: stream[-1].ranges[0].stop})
    one, two = (Trainer(config, Ranks(), QuietBoard(), end) for _ in range(2))
    one.run(Shard([[GREETING, *stream]]))
    with pytest.raises(CheckpointConflict):
        two.run(Shard([[GREETING, *stream]]))


def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_touch_it(
    config: configs.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = batches(8)
    at_five = config.model_copy(update={"storage": tmp_path / "five"})
    run(at_five, stream[:5])
    write, trained = CheckpointStore.write, threading.Event()

    def slow(self: CheckpointStore, *args: Any) -> Any:
        assert trained.wait(30)
        return write(self, *args)

    monkeypatch.setattr(CheckpointStore, "write", slow)

    class Stream(Shard):
        def __iter__(self) -> Iterator[pa.Table]:
            for i, block in enumerate(super().__iter__()):
                if i == 6:  # a greeting and five steps
                    wait(lambda: trainer._learner.steps == 5)
                    trainer._next_checkpoint = 0.0
                    wait(lambda: trainer._saving is not None)
                yield block
            wait(lambda: trainer._learner.steps == 8)
            trained.set()

    trainer = Trainer(config, Ranks(), QuietBoard(), Bound(offsets={0: stream[-1].ranges[0].stop}))
    trainer.run(Stream([[GREETING, *stream]]))
    store = CheckpointStore(config.storage / "checkpoints")
    assert store.numbers() == [1, 2]
    expected, found = CheckpointStore(at_five.storage / "checkpoints").load(1), store.load(1)
    assert list(found.ledger) == list(expected.ledger)
    one, other = Learner(config), Learner(config)
    one.load(found.directory)
    other.load(expected.directory)
    assert one.weights().rows.tobytes() == other.weights().rows.tobytes()
    squares, of_squares = (learner.vocabulary.state().optimizer["squares"] for learner in (one, other))
    assert squares.tobytes() == of_squares.tobytes()
    for part in ("model", "optimizer"):
        held, wanted = (_tensors(learner.state().common[part]) for learner in (one, other))
        assert len(held) > 10
        assert all(torch.equal(a, b) for a, b in zip(held, wanted, strict=True))
    assert one.metrics.figures() == pytest.approx(other.metrics.figures(), nan_ok=True)


def _tensors(held: Any) -> list[torch.Tensor]:
    if isinstance(held, dict):
        held = list(held.values())
    if isinstance(held, list):
        return [tensor for value in held for tensor in _tensors(value)]
    return [held] if isinstance(held, torch.Tensor) else []


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_weights_that_went_bad_are_neither_published_nor_saved_and_end_the_run(
    config: configs.Config, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"recent_events": 40, "bad_steps": 5, "checkpoint_every_s": 1e-3, "publish_every_s": 1e-3}
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    stream, store = batches(60), CheckpointStore(config.storage / "checkpoints")

    class Breaking(Shard):
        def __iter__(self) -> Iterator[pa.Table]:
            for i, block in enumerate(super().__iter__()):
                if i == 30:
                    wait(lambda: trainer._learner.steps == 29)
                    # A slow disk is many steps behind.
                    wait(lambda: (saved := store.newest()) is not None and saved.record.step == 29)
                    with torch.no_grad():
                        for parameter in trainer._learner.model.parameters():
                            parameter.mul_(-30)
                yield block

    trainer = Trainer(config, Ranks(), QuietBoard(), None)
    with pytest.raises(Diverged, match="for 5 steps") as caught:
        trainer.run(Breaking([[GREETING, *stream]]))
    assert caught.value.now > caught.value.before + 0.5
    assert "neither published nor saved" in caplog.text
    trainer._saver.shutdown()  # that of the step before it may be under way
    found = store.newest()
    assert found is not None
    assert 29 <= found.record.step <= 30
    versions = WeightStore(config.storage / "weights")
    assert versions.manifest(versions.numbers()[-1]).step <= 30
    resumed = Trainer(config, Ranks(), QuietBoard(), None)
    assert resumed.checkpoint_number == found.record.number
    assert resumed._gate.open


def test_weights_that_are_not_finite_are_not_saved(config: configs.Config) -> None:
    trainer = Trainer(config, Ranks(), QuietBoard(), Bound(offsets={0: 1}))
    with torch.no_grad():
        next(trainer._learner.model.parameters()).fill_(float("nan"))
    dead = MicroBatch.empty(ranges=(OffsetRange(0, 0, 7, Disposition.DEAD_LETTER),))
    with pytest.raises(NonFiniteWeights, match=r"are not (saved|published)"):
        trainer.run(Shard([[GREETING, dead]]))
    assert CheckpointStore(config.storage / "checkpoints").numbers() == []


def test_readers_that_do_not_start_fail_the_run(
    config: configs.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers, "READERS_START_S", 0.1)
    config = config.model_copy(update={"source": config.source.model_copy(update={"readers": 3})})
    trainer = Trainer(config, Ranks(), QuietBoard(), None)
    with pytest.raises(ReadersNotStarted, match="1 of 3 readers started"):
        trainer.run(Endless([GREETING]))


def test_a_user_in_two_partitions_is_noticed_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    strays = StrayUsers()
    stream = random_batches(0, 60, users=200)
    for batch in stream:
        strays.look(batch)
    assert len(strays) == 0
    for batch in stream:
        strays.look(dataclasses.replace(batch, partitions=batch.partitions + 1))
    seen = {int(u) for b in stream for u in b.users if u % 16 == 0}
    assert len(strays) == len(seen) > 0
    told = [record for record in caplog.records if "more than one partition" in record.getMessage()]
    assert 1 <= len(told) <= len(seen).bit_length()


# -- the job ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, kafka_bootstrap: str) -> Stream:
    config = make_config(
        tmp_path_factory.mktemp("job"),
        kafka_bootstrap,
        source={"readers": 2, "flush_events": 64, "flush_ms": 100, "recycle_s": 1.5},
        train={"workers": 2, "checkpoint_every_s": 1, "publish_every_s": 0.5},
        model={"layers": 1, "dim": 8, "heads": 1, "popularity_days": [1e6]},
    )
    create_topic(config.kafka, 3)
    return Stream(config)


def keys_of_ranks(config: configs.Config, ranks: int) -> set[int]:
    """The vocabulary's keys in the newest checkpoint, every one in the part of the rank that owns it.

    Rows are as old as their counts say: each event that was trained is counted at its item, once, and of the
    job's half-life is worth as much as ever.
    """
    found = CheckpointStore(config.storage / "checkpoints").newest()
    assert found is not None
    _, parts = LearnerState.read(found.directory)
    assert len(parts) == ranks
    for rank, part in enumerate(parts):
        assert (owners(part.keys, ranks) == rank).all()
    [days] = config.model.popularity_days
    worth = [np.exp2(part.levels - part.clock_ms / days / DAY_MS).sum() for part in parts]
    assert sum(worth) == pytest.approx(found.record.events, rel=1e-3)
    return {key for part in parts for key in part.keys.tolist()}


@pytest.mark.kafka
@pytest.mark.ray_cluster
class TestJob:
    """In this order: each goes on from the storage that the one before it left."""

    def test_two_ranks_settle_every_offset_once_over_renewed_executions(
        self, cluster: None, job: Stream
    ) -> None:
        job.send(1000)
        threading.Timer(15, job.send, (1000,)).start()
        final = train(job.config, Until.parse("0:400,1:400,2:400", job.config))
        assert final is not None
        found = audit(job.config)
        assert found.passed
        assert sum(final.settled.values()) == 1200
        assert len(keys_of_ranks(job.config, 2)) > 150

    @pytest.mark.parametrize("workers", [1, 3])
    def test_another_number_of_ranks_goes_on_where_others_left_off(
        self, cluster: None, job: Stream, workers: int
    ) -> None:
        before = keys_of_ranks(job.config, {1: 2, 3: 1}[workers])
        if workers == 3:
            job.send(500)
        of_train = {"train": job.config.train.model_copy(update={"workers": workers})}
        config = job.config.model_copy(update=of_train)
        final = train(config, Until.parse("now", config))
        assert final is not None
        assert before <= keys_of_ranks(config, workers)
        found = audit(config)
        assert found.passed
        assert sum(final.settled.values()) == job.sent
        elsewhere = {Disposition.CONTROL, Disposition.LOST, Disposition.JOINED, Disposition.CORRECTION}
        assert all(found.count(d) for d in set(Disposition) - elsewhere)
        assert final.version == max(WeightStore(config.storage / "weights").numbers())

    def test_a_lone_event_is_learned_from_at_once_and_a_stop_saves_it(
        self, cluster: None, job: Stream
    ) -> None:
        config = job.config.model_copy(
            update={
                "train": job.config.train.model_copy(update={"workers": 1, "checkpoint_every_s": 1000}),
                "source": job.config.source.model_copy(update={"recycle_s": 1000}),
            }
        )
        stop = threading.Event()

        def show(progress: Progress) -> None:
            if sum(progress.settled.values()) == job.sent - 1:
                job.send(1)  # its block must not wait for the next one
            elif sum(progress.settled.values()) == job.sent:
                stop.set()

        job.send(1)
        threading.Timer(90, stop.set).start()
        final = train(config, None, stop, show)
        assert final is not None
        assert sum(final.settled.values()) == job.sent
        assert audit(config).passed

    def test_a_stream_that_turns_sends_training_back_and_then_ends_it(
        self, cluster: None, job: Stream, tmp_path: pathlib.Path
    ) -> None:
        config = make_config(
            tmp_path,
            job.config.kafka.bootstrap_servers[0],
            source={"flush_events": 64, "flush_ms": 100},
            train={
                **{"recent_events": 500, "bad_steps": 3, "max_reverts": 1, "checkpoint_every_s": 0.1},
                **{"learning_rate": 0.01},
            },
        )
        create_topic(config.kafka, 1)
        stream = Stream(config)
        stream.send_liked(2000, True)
        stream.send_liked(2000, False)
        with pytest.raises(Diverged):
            train(config, Until.parse("now", config))
        runs = [path.read_text() for path in sorted((config.storage / "metrics").iterdir())]
        assert len(runs) >= 2
        assert all('"gate": "closed"' in run for run in runs)
        found = CheckpointStore(config.storage / "checkpoints").newest()
        assert found is not None
        assert 1500 <= found.record.events <= 2300

    def test_a_lasting_error_of_a_reader_ends_the_job_as_itself(self, cluster: None, job: Stream) -> None:
        config = make_config(
            job.config.storage,
            job.config.kafka.bootstrap_servers[0],
            train={"workers": 1},
            model=job.config.model.model_dump(),
        )
        create_topic(config.kafka, 3)
        with pytest.raises(LogTruncated, match="created anew"):
            train(config)

    def test_a_job_that_does_not_fit_is_refused(self, cluster: None, job: Stream) -> None:
        config = job.config.model_copy(
            update={"source": job.config.source.model_copy(update={"readers": 20})}
        )
        with pytest.raises(NotEnoughCpus, match="needs 12 CPUs"):
            train(config)

    def test_a_missing_topic_is_said_before_anything_starts(self, cluster: None, job: Stream) -> None:
        config = make_config(job.config.storage, job.config.kafka.bootstrap_servers[0])
        with pytest.raises(TopicMissing, match=config.kafka.topic):
            train(config)

    def test_a_broker_that_is_down_is_said_before_anything_starts(
        self, cluster: None, tmp_path: pathlib.Path
    ) -> None:
        config = make_config(tmp_path, "127.0.0.1:9")
        kafka = config.kafka.model_copy(update={"request_timeout_ms": 1000})
        with pytest.raises(BrokerUnavailable, match="no Kafka broker answered"):
            train(config.model_copy(update={"kafka": kafka}))

    def test_a_job_goes_on_under_a_grown_schema_where_it_left_off(self, cluster: None, job: Stream) -> None:
        grown = with_events(
            job.config, actions=["click", "like", "buy"], context=["device"], item_features=["genre"]
        )
        config = grown.model_copy(update={"train": grown.train.model_copy(update={"workers": 1})})
        before = CheckpointStore(config.storage / "checkpoints").newest()
        assert before is not None
        assert any(SnapshotFiles(config, p).restore(at_least=0) for p in range(3)), "histories go on, too"
        with contextlib.closing(producer(config.kafka)) as out:
            for n in range(60):
                event = {
                    "user_id": n % 20,
                    "item_id": n,
                    "actions": ["buy"],
                    "timestamp_ms": START_MS + job.sent + n,
                    "context": {"device": n % 3},
                    "item_features": {"genre": "noir"},
                }
                out.send(config.kafka.topic, json.dumps(event).encode(), key=partition_key(n % 20))
            out.flush()
        final = train(config, Until.parse("now", config))
        assert final is not None
        assert sum(final.settled.values()) == job.sent + 60
        assert final.events == before.record.events + 60
        assert audit(config).passed
        assert "ne/click" in final.figures
        weights = WeightStore(config.storage / "weights")
        version = weights.load(weights.numbers()[-1])
        assert version.manifest.recipe.actions == ["click", "like", "buy"]
        assert len(version.weights.dense["actions"]) == 3

    def test_a_job_whose_action_was_taken_away_ends_with_what_to_do(self, cluster: None, job: Stream) -> None:
        """The one before left a checkpoint that knows of more than `job.config` does."""
        with pytest.raises(SchemaChanged, match=r"events\.actions lacks buy.*another `storage`"):
            train(job.config)
