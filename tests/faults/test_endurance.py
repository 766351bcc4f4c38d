"""The whole audit: a long stream, two ranks, and each part of the system killed in the middle of its work.

    pytest tests/faults/test_endurance.py -m slow -s [--apache-kafka]

Against Apache Kafka a part of the stream comes in transactions, many of them aborted.
"""

import contextlib
import json
import os
import pathlib
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import kafka
import kafka.errors
import pytest
import ray

from grstream import config as configs
from grstream.audit import Audit, audit
from grstream.kafka import create_topic
from grstream.keys import partition_key
from grstream.ledger import Disposition
from grstream.until import end_offsets
from tests.conftest import BrokerProcess
from tests.faults.killing import (
    BROKER,
    DRIVER,
    RANK,
    READER,
    KillableBroker,
    Runs,
    kill_one,
    killable,
    start_job,
    wait,
)
from tests.grstream.streams import Stream, make_config

pytestmark = [pytest.mark.kafka, pytest.mark.ray_cluster, pytest.mark.slow]

EVENTS, PARTITIONS = 200_000, 8
READING_ON_S = 900
VICTIMS = [RANK, READER, BROKER, DRIVER, RANK, READER, RANK, DRIVER, BROKER, READER, RANK, DRIVER]
AWAY_S = 2.0
PER_S = 600  # events: so that the stream lasts as long as the kills do


@pytest.fixture
def cluster() -> Iterator[str]:
    context = ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture
def broker(any_broker_process: BrokerProcess, tmp_path: pathlib.Path) -> Iterator[KillableBroker]:
    if os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        pytest.skip("kills the broker, so it takes one of its own: unset KAFKA_BOOTSTRAP_SERVERS")
    with killable(any_broker_process, tmp_path / "broker") as started:
        yield started


class Producing:
    """Sends a stream at a steady pace, over a broker's death; each fourth batch in a transaction, if so."""

    def __init__(self, config: configs.Config, transactions: bool) -> None:
        self._config, self._transactions = config, transactions
        self._stream, self._draw = Stream(config), random.Random(1)
        self._thread = threading.Thread(target=self._run)
        self.sent = self.aborted = 0

    def __enter__(self) -> "Producing":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.join()

    def _run(self) -> None:
        began, batch = time.monotonic(), PER_S // 4
        with contextlib.closing(self._producer(None)) as plain:
            for number in range(EVENTS // batch):
                time.sleep(max(0.0, began + number / 4 - time.monotonic()))
                values = [self._stream.next() for _ in range(batch)]
                if self._transactions and number % 4 == 0:
                    self._in_transaction(values, abort=self._draw.random() < 0.5)
                else:
                    for future in [self._send(plain, user, value) for user, value in values]:
                        future.get(120)
                    self.sent += batch

    def _in_transaction(self, values: list[tuple[int, bytes | None]], abort: bool) -> None:
        """Once, unless the broker dies meanwhile: then what was begun is aborted, and it is sent again."""
        while True:
            try:
                with contextlib.closing(self._producer("endurance")) as sender:
                    sender.init_transactions()
                    sender.begin_transaction()
                    for user, value in values:
                        self._send(sender, user, value)
                    sender.flush(60)
                    if abort:
                        sender.abort_transaction()
                        self.aborted += len(values)
                    else:
                        sender.commit_transaction()
                        self.sent += len(values)
                    return
            except kafka.errors.KafkaError:
                time.sleep(1)

    def _producer(self, transactional_id: str | None) -> kafka.KafkaProducer:
        return kafka.KafkaProducer(
            bootstrap_servers=self._config.kafka.bootstrap_servers,
            transactional_id=transactional_id,
            acks="all",
            delivery_timeout_ms=120_000,
            reconnect_backoff_max_ms=1000,
        )

    def _send(
        self, sender: kafka.KafkaProducer, user: int, value: bytes | None
    ) -> kafka.producer.future.FutureRecordMetadata:
        return sender.send(self._config.kafka.topic, value, key=partition_key(user))


def test_every_offset_is_settled_once_whatever_is_killed(
    tmp_path: pathlib.Path, cluster: str, broker: KillableBroker, request: pytest.FixtureRequest
) -> None:
    config = make_config(
        tmp_path / "storage",
        broker.bootstrap,
        source={"readers": 2, "flush_events": 64, "flush_ms": 100, "recycle_s": 20},
        train={"workers": 2, "checkpoint_every_s": 1, "publish_every_s": 1},
    )
    create_topic(config.kafka, PARTITIONS)
    runs, draw = Runs(config), random.Random(2)
    apache = bool(request.config.getoption("--apache-kafka"))
    with Producing(config, transactions=apache) as producing:
        job = start_job(config, cluster)
        begun, blows = 0, []
        try:
            for number, victim in enumerate(VICTIMS):
                steps, in_commit = draw.randrange(5, 80), number % 2 == 0
                wait(_well_on_its_way(runs, begun, steps), f"work before the death of the {victim}", job)
                if in_commit:
                    wait(runs.committing, "a commit", job, every_s=0.001)
                blows.append({"victim": victim, "sent": producing.sent, "in_commit": runs.committing()})
                print(json.dumps(blows[-1]), flush=True)
                if victim == BROKER:
                    broker.kill(AWAY_S)
                    steps_then = runs.steps()
                    wait(lambda then=steps_then: runs.steps() > then + 5, "work after the broker", job)  # type: ignore[misc]
                    continue
                begun = runs.count()
                if victim == DRIVER:
                    job = _driver_killed(job, config, cluster)
                else:
                    kill_one(victim, draw)
        finally:
            job.kill()
            job.wait()
    last = start_job(config, cluster, "--until", "now")
    # All that the kills left behind, and at first with the readers that a driver's death leaves room for.
    try:
        said, _ = last.communicate(timeout=READING_ON_S)
    except subprocess.TimeoutExpired as slow:
        last.kill()
        said, _ = last.communicate()
        raise AssertionError(f"the last job has not come to the end of the topic:\n{said[-4000:]}") from slow
    assert last.returncode == 0, said
    found = audit(config)
    _report(found, producing, runs, blows)
    assert found.passed
    assert (found.missing, found.twice, found.wrong) == (0, 0, 0)
    assert sum(found.count(d) for d in Disposition) == sum(end_offsets(config).values())
    assert len(blows) == len(VICTIMS)
    assert sum(blow["in_commit"] for blow in blows) >= 3
    if apache:
        assert found.count(Disposition.CONTROL) > producing.aborted > 0


def _well_on_its_way(runs: Runs, begun: int, steps: int) -> Callable[[], bool]:
    return lambda: runs.count() > begun and runs.steps() >= steps


def _driver_killed(job: subprocess.Popen[str], config: configs.Config, address: str) -> subprocess.Popen[str]:
    job.kill()
    job.wait()
    return start_job(config, address)


def _report(found: Audit, producing: Producing, runs: Runs, blows: list[dict]) -> None:
    counts = {d.name.lower(): found.count(d) for d in Disposition}
    print(
        json.dumps(
            {
                "kills": len(blows),
                "in_commit": sum(blow["in_commit"] for blow in blows),
                "runs": runs.count(),
                "sent": producing.sent,
                "aborted": producing.aborted,
                **counts,
                "missing": found.missing,
                "twice": found.twice,
                "wrong": found.wrong,
            }
        ),
        flush=True,
    )
