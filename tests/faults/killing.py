"""What tests of faults share: a job as a process of its own, its parts and a broker found and killed."""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from grstream import config as configs

ROOT = pathlib.Path(__file__).parents[2]
# What a driver that was killed had reserved is held for 180 s, and the next job may have to wait for it.
PATIENCE_S = 180.0 + 300.0
DRIVER, RANK, READER, BROKER = "driver", "ray::RayTrainWorker", "ray::ReadActionSource", "broker"


def start_job(config: configs.Config, address: str, *arguments: str) -> subprocess.Popen[str]:
    """`jobs/train_stream.py` as a driver of its own, as `ray job submit` would start it."""
    path = config.storage.parent / "config.yaml"
    path.write_text(config.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "jobs/train_stream.py", "--config", str(path), *arguments],
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


def kill_one(name: str, draw: random.Random) -> None:
    """Kill one of these processes, once there is one: between two executions there is no reader."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := sorted(descendants(name))):
        assert time.monotonic() < deadline, f"no process is named {name}"
        time.sleep(0.01)
    os.kill(draw.choice(found), signal.SIGKILL)


class Runs:
    """What the trainer has written so far."""

    def __init__(self, config: configs.Config) -> None:
        self._storage = config.storage

    def count(self) -> int:
        """Lives of a worker group that have begun."""
        return len(list((self._storage / "metrics").glob("*.jsonl")))

    def steps(self) -> int:
        """How many steps the newest run's journal tells of."""
        journals = sorted((self._storage / "metrics").glob("*.jsonl"))
        return journals[-1].read_text().count('"step": ') if journals else 0

    def committing(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return any((self._storage / "checkpoints").glob(".scratch-c*"))


def wait(until: Callable[[], bool], what: str, job: subprocess.Popen[str], every_s: float = 0.05) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        assert job.poll() is None, f"the job ended while waiting for {what}: {job.communicate()[0]}"
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {what}"
        time.sleep(every_s)


class KillableBroker:
    """A broker on a directory and a port of its own, killed and started again there."""

    def __init__(self, start: Callable[[pathlib.Path, int], Any], directory: pathlib.Path, port: int) -> None:
        self._start, self._directory, self._port = start, directory, port
        self._running = contextlib.ExitStack()
        self._process, self.bootstrap = self._running.enter_context(start(directory, port))
        self._port = int(self.bootstrap.rpartition(":")[2])

    def kill(self, away_s: float) -> None:
        """Kill it as a crash would, and bring it back after a while."""
        pid = self._directory / "broker.pid"  # Apache Kafka's; what started it waits for it and ends, too
        os.kill(int(pid.read_text()) if pid.exists() else self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        time.sleep(away_s)
        self._process, _ = self._running.enter_context(self._start(self._directory, self._port))

    def close(self) -> None:
        self._running.close()


@contextlib.contextmanager
def killable(
    start: Callable[[pathlib.Path, int], Any], directory: pathlib.Path, port: int = 0
) -> Iterator[KillableBroker]:
    broker = KillableBroker(start, directory, port)
    try:
        yield broker
    finally:
        broker.close()
