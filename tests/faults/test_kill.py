"""A trainer is killed at work, process by process: no event is lost and none is trained on twice (law 4)."""

import contextlib
import pathlib
import random
import signal
import threading
from collections.abc import Callable, Iterator

import kafka
import pyarrow as pa
import pyarrow.parquet
import pytest
import ray

from grstream import config as configs
from grstream.audit import audit
from grstream.backfill import backfill
from grstream.checkpoints import CheckpointStore
from grstream.kafka import consumer, create_topic
from grstream.ledger import Disposition
from grstream.until import end_offsets
from grstream.weight_store import WeightStore
from grstream.weights import Weights
from tests.faults.killing import DRIVER, PATIENCE_S, RANK, READER, Runs, kill_one, start_job, wait
from tests.grstream.streams import Stream, make_config

STEPS = 20  # of a run before the next blow: some lie before a checkpoint and some behind it

pytestmark = [pytest.mark.kafka, pytest.mark.ray_cluster]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster whose processes descend from this one."""
    context = ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


def working(runs: Runs, begun: int) -> Callable[[], bool]:
    """Whether a run after so many is well on its way."""
    return lambda: runs.count() > begun and runs.steps() >= STEPS


def finish(config: configs.Config, address: str) -> None:
    job = start_job(config, address, "--until", "now")
    said, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, said


def test_killed_worker_reader_and_driver_lose_nothing_and_repeat_nothing(
    tmp_path: pathlib.Path, kafka_bootstrap: str, cluster: str
) -> None:
    config = make_config(
        tmp_path / "storage",
        kafka_bootstrap,
        source={"flush_events": 32, "flush_ms": 100},
        train={"checkpoint_every_s": 1, "publish_every_s": 0.5},
    )
    create_topic(config.kafka, 2)
    stream, runs, draw = Stream(config), Runs(config), random.Random(0)
    quiet = threading.Event()

    def produce() -> None:
        while not quiet.wait(0.1):
            stream.send(20)

    producer = threading.Thread(target=produce)
    producer.start()
    job = start_job(config, cluster)
    try:
        wait(working(runs, 0), "the first run", job)
        kill_one(RANK, draw)
        wait(working(runs, 1), "a run after the worker's death", job)
        kill_one(READER, draw)
        wait(working(runs, 2), "a run after the reader's death", job)
        job.kill()
        job.wait()

        job = start_job(config, cluster)
        wait(working(runs, 3), "a run after the driver's death", job)
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=30)
        assert job.returncode == 0, said
        assert "stopped:" in said
        assert audit(config).passed
    finally:
        quiet.set()
        producer.join()
        job.kill()

    finish(config, cluster)
    found = audit(config)
    assert (found.missing, found.twice, found.wrong) == (0, 0, 0)
    assert found.passed
    assert sum(found.count(d) for d in Disposition) == stream.sent


def test_a_run_that_was_killed_learns_bit_for_bit_what_one_undisturbed_learns(
    tmp_path: pathlib.Path, kafka_bootstrap: str, cluster: str
) -> None:
    """One worker, one partition, and micro-batches that end with a number of events, not with a clock."""
    config = make_config(
        tmp_path / "storage",
        kafka_bootstrap,
        source={"flush_events": 8, "flush_ms": 600_000},
        train={"checkpoint_every_s": 0.3},
    )
    create_topic(config.kafka, 1)
    stream, runs, draw = Stream(config), Runs(config), random.Random(0)
    stream.send(12_000)
    undisturbed = config.model_copy(update={"storage": tmp_path / "undisturbed" / "storage"})
    undisturbed.storage.parent.mkdir()
    finish(undisturbed, cluster)

    job = start_job(config, cluster, "--until", "now")
    try:
        for begun, victim in enumerate((RANK, READER, DRIVER)):
            wait(working(runs, begun), f"a run before the death of the {victim}", job)
            if victim == DRIVER:
                job.kill()
                job.wait()
                job = start_job(config, cluster, "--until", "now")
            else:
                kill_one(victim, draw)
        said, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 0, said
    finally:
        job.kill()
    assert runs.count() == 4
    assert audit(config).passed
    assert bytes_of(config) == bytes_of(undisturbed)


def bytes_of(config: configs.Config) -> dict[str, bytes]:
    """The weights that a run ended with."""
    store = WeightStore(config.storage / "weights")
    held: Weights = store.load(store.numbers()[-1]).weights
    arrays = {**held.dense, "keys": held.keys, "rows": held.rows, "items": held.items}
    return {name: array.tobytes() for name, array in arrays.items()}


def dump(config: configs.Config, path: pathlib.Path) -> None:
    """The topic as it is, record by record, in a Parquet file."""
    ends = {kafka.TopicPartition(config.kafka.topic, p): end for p, end in end_offsets(config).items()}
    records: list[tuple[int, int, int, bytes, bytes | None]] = []
    with contextlib.closing(consumer(config.kafka)) as log:
        log.assign(list(ends))
        for tp in ends:
            log.seek(tp, 0)
        while any(log.position(tp) < end for tp, end in ends.items()):
            for part in log.poll(timeout_ms=1000).values():
                records += [(r.partition, r.offset, r.timestamp, r.key, r.value) for r in part]
    names = ("partition", "offset", "taken", "key", "value")
    columns = zip(names, zip(*records, strict=True), strict=True)
    pa.parquet.write_table(pa.table({name: pa.array(values) for name, values in columns}), path)


@pytest.mark.slow
def test_killed_between_the_start_of_a_backfill_and_its_seam_nothing_is_lost_or_repeated(
    tmp_path: pathlib.Path, kafka_bootstrap: str, cluster: str
) -> None:
    names = {
        "partition": "partition",
        "offset": "offset",
        "record_time": "taken",
        "key": "key",
        "value": "value",
    }
    config = make_config(
        tmp_path / "storage",
        kafka_bootstrap,
        source={"flush_events": 32, "flush_ms": 100},
        train={"checkpoint_every_s": 1, "publish_every_s": 0.5},
        replay={"records": names},
    )
    create_topic(config.kafka, 2)
    stream, runs, draw = Stream(config), Runs(config), random.Random(0)
    stream.send(8000)
    dump(config, config.storage.parent / "dump.parquet")
    made = backfill(config, str(config.storage.parent / "dump.parquet"), None)
    assert (made.records, made.holes, made.repeated) == (8000, 0, 0)
    stream.send(200)

    job = start_job(config, cluster)
    try:
        for begun, victim in enumerate((READER, RANK)):
            wait(working(runs, begun), f"a run before the death of the {victim}", job)
            kill_one(victim, draw)
        wait(working(runs, 2), "a run after the worker's death", job)
        job.kill()
        job.wait()
    finally:
        job.kill()
    found = CheckpointStore(config.storage / "checkpoints").newest()
    assert found is None or any((found.ledger.watermark(p) or 0) < made.partitions[p].seam for p in (0, 1))

    for until in (",".join(f"{p}:{held.seam}" for p, held in made.partitions.items()), "now"):
        job = start_job(config, cluster, "--until", until)
        said, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 0, said
        assert audit(config).passed
    assert sum(audit(config).count(d) for d in Disposition) == stream.sent
