"""A trainer is killed at work, process by process: no event is lost and none is trained on twice (law 4)."""

import pathlib
import random
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import ray

from grstream import config as configs
from grstream.audit import audit
from grstream.kafka import create_topic
from grstream.ledger import Disposition
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
