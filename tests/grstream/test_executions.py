"""Executions one after another: each with an actor of its own, which ends with it."""

import concurrent.futures
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from grstream import config as configs
from grstream.executions import Executions, Split
from grstream.kafka import create_topic
from grstream.ledger import Ledger
from grstream.microbatch import MicroBatch
from grstream.until import end_offsets
from tests.faults.killing import descendants
from tests.grstream.streams import Stream, make_config

pytestmark = [pytest.mark.kafka, pytest.mark.ray_cluster]

OWNER, COORDINATOR, READER = "ray::ExecutionsActor", "ray::SplitCoordinator", "ray::ReadActionSource"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """With as many CPUs as the two readers of an execution need, and as much of a resource of their own."""
    ray.init("local", num_cpus=2, resources={"reader": 1}, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def begin(
    cluster: None, tmp_path: pathlib.Path, kafka_bootstrap: str
) -> Iterator[Callable[[float], tuple[configs.Config, Executions]]]:
    """Executions that are renewed after so many seconds, of a topic of their own; what they leave is none."""
    begun: list[Executions] = []

    def begin(recycle_s: float) -> tuple[configs.Config, Executions]:
        source: dict[str, Any] = {"readers": 2, "reader_cpus": 1, "flush_events": 16, "recycle_s": recycle_s}
        source["reader_resources"] = {"reader": 0.5}
        config = make_config(tmp_path, kafka_bootstrap, source=source)
        create_topic(config.kafka, 2)
        begun.append(Executions(config, None))
        return config, begun[-1]

    yield begin
    begun[0].close()
    wait(lambda: not any(map(descendants, (OWNER, COORDINATOR, READER))))


def batches(split: Split) -> Iterator[MicroBatch]:
    return map(MicroBatch.from_block, split)


def running(executions: Executions) -> Any:
    """A new execution whose two readers both run, for as long as this is held."""
    [split] = executions.renew(Ledger(), 1)
    held, greeted = batches(split), 0
    while greeted < 2:
        greeted += not next(held).ranges
    return held


def reservations() -> list[str]:
    """Of the cluster's CPUs, by what Ray Data has running; one that is not given back stands for 180 s."""
    actor: Any = ray.get_actor("AutoscalingCoordinator", "AutoscalingCoordinator")
    return ray.get(actor.__ray_call__.remote(lambda self: list(self._ongoing_reqs)))


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_renewed_execution_goes_on_from_the_position_in_an_actor_of_its_own(begin: Any) -> None:
    config, executions = begin(0.5)
    stream, ledger, actors, threads = Stream(config), Ledger(), set(), 0
    with concurrent.futures.ThreadPoolExecutor(2) as ranks:
        for count in range(30):
            if count < 3:
                stream.send(100)
            elif {p: ledger.watermark(p) for p in ledger.partitions()} == end_offsets(config):
                break
            for parts in ranks.map(lambda split: list(batches(split)), executions.renew(ledger, 2)):
                for batch in parts:
                    for r in batch.ranges:
                        ledger.add(r)
            wait(lambda: len(descendants(COORDINATOR)) == 1)
            actors.update(descendants(COORDINATOR))
            assert len(actors) == count + 1
            threads = threads or threading.active_count()
            assert threading.active_count() <= threads
    assert {p: ledger.watermark(p) for p in ledger.partitions()} == end_offsets(config)


def test_readers_run_where_there_is_what_they_ask_for(begin: Any) -> None:
    _, executions = begin(1000)
    assert ray.available_resources()["reader"] == 1
    held = running(executions)
    wait(lambda: ray.available_resources().get("reader", 0) == 0)
    del held


def test_an_execution_that_is_renewed_in_its_midst_leaves_neither_actor_nor_readers_nor_reservations(
    begin: Any,
) -> None:
    _, executions = begin(1000)
    before = running(executions)
    old, reserved = descendants(COORDINATOR) + descendants(READER), reservations()
    assert (len(old), len(reserved)) == (3, 1)
    now = running(executions)
    wait(lambda: not set(descendants(COORDINATOR) + descendants(READER)) & set(old))
    assert (len(descendants(COORDINATOR)), len(descendants(READER))) == (1, 2)
    wait(lambda: reserved[0] not in reservations())
    del before, now


def test_a_killed_owner_is_started_again_and_leaves_no_orphan(begin: Any) -> None:
    _, executions = begin(1000)
    [split] = executions.renew(Ledger(), 1)
    wait(lambda: len(descendants(COORDINATOR)) == 1)
    old = descendants(COORDINATOR)
    [owner] = descendants(OWNER)
    os.kill(owner, signal.SIGKILL)
    now = running(executions)
    wait(lambda: len(descendants(COORDINATOR)) == 1)
    assert descendants(COORDINATOR) != old
    del split, now
