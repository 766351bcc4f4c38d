"""A trainer is killed at work, process by process: no event is lost and none is trained on twice (law 4)."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import ray

from grstream import config as configs
from grstream.audit import audit
from grstream.kafka import create_topic
from grstream.ledger import Disposition
from tests.grstream.streams import Stream, make_config

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE_S = 120.0
STEPS = 20  # of a run before the next blow: some lie before a checkpoint and some behind it

pytestmark = [pytest.mark.kafka, pytest.mark.ray_cluster]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster whose processes descend from this one."""
    context = ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture
def config(tmp_path: pathlib.Path, kafka_bootstrap: str) -> configs.Config:
    config = make_config(
        tmp_path / "storage",
        kafka_bootstrap,
        source={"flush_events": 32, "flush_ms": 100},
        train={"checkpoint_every_s": 1, "publish_every_s": 0.5},
    )
    create_topic(config.kafka, 2)
    (tmp_path / "config.yaml").write_text(json.dumps(json.loads(config.model_dump_json())))
    return config


def start(config: configs.Config, address: str, *arguments: str) -> subprocess.Popen[str]:
    """The job as a driver of its own, as `ray job submit` would start it."""
    return subprocess.Popen(
        [
            sys.executable,
            "jobs/train_stream.py",
            "--config",
            str(config.storage.parent / "config.yaml"),
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def descendants(name: str) -> list[int]:
    """The processes below this one whose command line begins with a name: Ray titles its workers."""
    parents, found = {}, []
    for directory in pathlib.Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            status = (directory / "stat").read_text()
            title = (directory / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        parents[int(directory.name)] = int(status.rpartition(")")[2].split()[1])
        if title.startswith(name.encode()):
            found.append(int(directory.name))

    def below(pid: int) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return [pid for pid in found if below(pid)]


def kill(name: str) -> None:
    [pid] = descendants(name)
    os.kill(pid, signal.SIGKILL)


class Journals:
    """What the trainer wrote into its journals."""

    def __init__(self, config: configs.Config) -> None:
        self._metrics = config.storage / "metrics"

    def steps(self, run: int) -> int:
        """How many steps the journal of the n-th run tells of, from 1 on."""
        journals = sorted(self._metrics.glob("*.jsonl"))
        return journals[run - 1].read_text().count('"step": ') if len(journals) >= run else 0


def wait(until: Callable[[], bool], what: str, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        assert job.poll() is None, f"the job ended while waiting for {what}: {job.communicate()[0]}"
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {what}"
        time.sleep(0.1)


def test_killed_worker_reader_and_driver_lose_nothing_and_repeat_nothing(
    config: configs.Config, cluster: str
) -> None:
    stream, journals = Stream(config), Journals(config)
    quiet = threading.Event()

    def produce() -> None:
        while not quiet.wait(0.1):
            stream.send(20)

    def working(run: int) -> Callable[[], bool]:
        return lambda: journals.steps(run) >= STEPS

    producer = threading.Thread(target=produce)
    producer.start()
    job = start(config, cluster)
    try:
        wait(working(1), "the first run", job)
        kill("ray::RayTrainWorker")
        wait(working(2), "a run after the worker's death", job)
        kill("ray::ReadActionSource")
        wait(working(3), "a run after the reader's death", job)
        job.kill()
        job.wait()

        job = start(config, cluster)
        wait(working(4), "a run after the driver's death", job)
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=30)
        assert job.returncode == 0, said
        assert "stopped:" in said
        assert audit(config).passed
    finally:
        quiet.set()
        producer.join()
        job.kill()

    job = start(config, cluster, "--until", "now")
    said, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, said
    found = audit(config)
    assert (found.missing, found.twice, found.wrong) == (0, 0, 0)
    assert found.passed
    assert sum(found.count(d) for d in Disposition) == stream.sent
