"""Whether memory stays flat: a training job at full speed, every budget full, its memory over time.

    python -m benchmarks.soak [--quick] [--minutes M] [--out FILE.csv]

A development broker, a Ray cluster of its own and `jobs/train_stream.py`, with small budgets that the stream
outgrows in its first minutes: users and events of the histories, duplicate ids, rows of the vocabulary, the
windows of quality, what Ray remembers of tasks. Items and users are born for ever. Every second the resident
memory of each role's processes is read: the driver, Ray Train's controller, the actor that makes the
executions and the one that holds the present one, the reader, the worker, and Ray's raylet and control
service. What is younger than 20 s has not grown yet and is left out. Shared memory is the object store's,
which has a size of its own: it is not counted with the processes, and the most that one of them has touched
of it is said beside. After a warm-up of a third of the time, the least of each renewal of the execution is
kept, and a line is laid through those: `slope` is its rise over the rest of the run, as a share of its mean.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import numpy as np
import ray

from benchmarks.ingest import broker
from grstream import config as configs
from grstream.kafka import create_topic, producer

RECYCLE_S = 60.0
ROLES = {  # role -> what the first word of its processes' command line holds
    "controller": "ray::TrainController",
    "executions": "ray::ExecutionsActor",
    "execution": "ray::SplitCoordinator",
    "reader": "ray::ReadActionSource",
    "worker": "ray::RayTrainWorker",
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
}
STORE = "store"
OWN, SHARED = r"(?:RssAnon|RssFile):\s*(\d+)", r"RssShmem:\s*(\d+)"  # kB, see proc_pid_status(5)
YOUNG_S = 20.0
TASK_EVENTS = 10_000  # that Ray's control service remembers; its default of 100,000 takes an hour to fill
AHEAD = 20_000  # events that the topic is kept ahead of the trainer
START_MS = 1_700_000_000_000


def settings(storage: pathlib.Path, bootstrap: str) -> configs.Config:
    return configs.parse(
        {
            "storage": str(storage),
            "kafka": {"bootstrap_servers": [bootstrap], "topic": "soak"},
            "events": {"actions": ["click", "like"], "context": ["device"]},
            "histories": {
                **{"window": 64, "chunk": 16, "max_users": 2_000, "max_events": 40_000},
                **{"duplicate_window": 5_000},
            },
            "source": {"recycle_s": RECYCLE_S, "ahead_bytes": 8 << 20},
            "model": {"dim": 32, "layers": 1, "heads": 1},
            "quality": {"windows_h": [0.1, 1]},  # of event time: 360,000 events
            "train": {
                **{"vocabulary_rows": 10_000, "recent_events": 5_000, "checkpoint_every_s": 15},
                # The stream's labels are chance: there is nothing to judge.
                **{"max_entropy_jump": None},
            },
        }
    )


def values(random: np.random.Generator, start: int, count: int) -> Iterator[tuple[bytes, bytes]]:
    """Events about users and items that are born as the stream goes on."""
    users = start // 10 - random.zipf(1.3, count) % 5_000
    items = start // 5 - random.zipf(1.3, count) % 20_000
    for i, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        event = {
            "event_id": f"e{start + i}",
            "user_id": user,
            "item_id": f"item {item}" if item % 2 else item,
            "actions": ["click"] if i % 3 else ["click", "like"],
            "timestamp_ms": START_MS + 10 * (start + i),
            "context": {"device": i % 5},
        }
        yield str(user).encode(), json.dumps(event).encode()


class Stream:
    """Keeps the topic a little ahead of the trainer, so that the broker's directory stays small, too."""

    def __init__(self, config: configs.Config) -> None:
        self._config, self._stop = config, threading.Event()
        self.sent = 0
        self.trained = 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Stream":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        random = np.random.default_rng(0)
        with contextlib.closing(producer(self._config.kafka)) as out:
            while not self._stop.wait(0.05):
                if self.sent - self.trained < AHEAD:
                    for key, value in values(random, self.sent, 5_000):
                        out.send(self._config.kafka.topic, value, key=key)
                    out.flush()
                    self.sent += 5_000


def resident(driver: int) -> dict[str, int]:
    """Bytes of resident memory by role, of processes that this one started, and of the object store."""
    found = dict.fromkeys(("driver", *ROLES, STORE), 0)
    parents, sizes = {}, []
    ticks = (time.clock_gettime(time.CLOCK_BOOTTIME) - YOUNG_S) * os.sysconf("SC_CLK_TCK")
    for directory in pathlib.Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            title = (directory / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
            stat = (directory / "stat").read_text()
            status = (directory / "status").read_text()
        except OSError:  # it has just ended
            continue
        pid = int(directory.name)
        fields = stat.rpartition(")")[2].split()  # from the third on, see proc_pid_stat(5)
        parents[pid] = int(fields[1])
        role = next((role for role, part in ROLES.items() if part in title), None)
        if (pid == driver or role) and int(fields[19]) < ticks:
            own, shared = (sum(map(int, re.findall(pattern, status))) << 10 for pattern in (OWN, SHARED))
            sizes.append((pid, "driver" if pid == driver else role, own, shared))
    for pid, role, own, shared in sizes:
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        if pid == os.getpid() and role:
            found[role] += own
            found[STORE] = max(found[STORE], shared)
    return found


def progress(config: configs.Config) -> dict:
    """The newest report in the journal."""
    for path in sorted((config.storage / "metrics").glob("*.jsonl"), reverse=True):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            lines = file.read().splitlines()[1:]
        for line in reversed(lines):
            if b'"progress"' in line:
                return dict(json.loads(line)["progress"])
    return {"events": 0, "version": 0, "checkpoint": 0}


def watch(
    config: configs.Config, job: subprocess.Popen, stream: Stream, seconds: float
) -> tuple[np.ndarray, list[str]]:
    """A row a second: seconds, events trained, and bytes by role."""
    rows: list[list[float]] = []
    began = time.monotonic()
    said = began
    while time.monotonic() - began < seconds:
        time.sleep(1)
        if job.poll() is not None:
            raise RuntimeError("the job ended")
        now, found = progress(config), resident(job.pid)
        stream.trained = int(now["events"])
        rows.append([time.monotonic() - began, now["events"], *found.values()])
        if time.monotonic() - said > RECYCLE_S:
            said = time.monotonic()
            sizes = "  ".join(f"{role} {size >> 20} MiB" for role, size in found.items())
            print(f"{rows[-1][0]:5.0f} s  {now['events']:>10,} events  {sizes}", flush=True)
    return np.array(rows), ["seconds", "events", *found]


def slopes(rows: np.ndarray, names: list[str], warm_s: float) -> dict[str, dict[str, float]]:
    """By role: MiB at the end, and the rise of the least of each renewal over the rest of the run."""
    rows = rows[rows[:, 0] >= warm_s]
    window = ((rows[:, 0] - warm_s) // RECYCLE_S).astype(int)
    whole = range(int(window.max()))  # the last one may be cut short
    out = {}
    for column, name in enumerate(names):
        if column < 2:
            continue
        least = np.array([rows[(window == w) & (rows[:, column] > 0), column].min() for w in whole])
        rise = np.polyfit(np.arange(len(least)), least, 1)[0] * len(least)
        out[name] = {"mib": round(least[-1] / 2**20, 1), "slope": round(rise / least.mean(), 4)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="6 minutes: shows that it works, not that it is flat"
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=pathlib.Path, help="write each second's figures here as CSV")
    options = parser.parse_args()
    seconds = 60 * (6 if options.quick else options.minutes)
    with contextlib.ExitStack() as stack:
        home = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = settings(home / "storage", stack.enter_context(broker(home / "broker")))
        (home / "config.yaml").write_text(config.model_dump_json())
        create_topic(config.kafka, 1)
        context = ray.init(
            "local",
            num_cpus=3,
            object_store_memory=100 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _system_config={"task_events_max_num_task_in_gcs": TASK_EVENTS},
        )
        stack.callback(ray.shutdown)
        stream = stack.enter_context(Stream(config))
        root = pathlib.Path(__file__).parents[1]
        job = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "jobs/train_stream.py", "--config", str(home / "config.yaml")],
                cwd=root,
                env={
                    **os.environ,
                    "RAY_ADDRESS": context.address_info["gcs_address"],
                    "PYTHONPATH": str(root),
                },
                stdout=subprocess.DEVNULL,
            )
        )
        stack.callback(job.terminate)
        rows, names = watch(config, job, stream, seconds)
        last = progress(config)
    if options.out:
        np.savetxt(options.out, rows, "%.0f", ",", header=",".join(names), comments="")
    warm_s = seconds / 3
    found = slopes(rows, names, warm_s)
    for name, figures in found.items():
        print(
            f"{name:>12}  {figures['mib']:8.1f} MiB  {figures['slope']:+.2%} "
            f"over {(seconds - warm_s) / 60:.0f} min"
        )
    timed = rows[rows[:, 0] >= warm_s]
    result = {
        "minutes": seconds / 60,
        "events": int(last["events"]),
        "events_per_s": round((timed[-1, 1] - timed[0, 1]) / (timed[-1, 0] - timed[0, 0])),
        "versions": last["version"],
        "checkpoints": last["checkpoint"],
        "roles": found,
        "slope_max": max(figures["slope"] for role, figures in found.items() if role != STORE),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
