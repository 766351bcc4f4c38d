"""The demo: what it shows, what it does when a part dies, and the whole of it."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rich.console

from grstream import config as configuration
from grstream.config import Config
from grstream.weight_store import WeightStore
from grstream.weights import Recipe, Weights
from jobs.child import Child, ChildDied, session_of
from jobs.client import Client
from jobs.demo import screen
from jobs.demo.proof import LEARNS, STEPS, Call, Moved, Proof, ProofFailed, Ranking
from jobs.demo.scene import Scene
from jobs.observer import Learned, Observer
from jobs.stack import MARK, DirectoryInUse, LocalStack

ROOT = pathlib.Path(__file__).parent.parent.parent


def child(tmp_path: pathlib.Path, code: str) -> Child:
    return Child("part", [sys.executable, "-c", code], tmp_path / "part.log", tmp_path, os.environ)


def test_a_part_that_dies_is_reported_with_the_end_of_its_log(tmp_path: pathlib.Path) -> None:
    dying = child(tmp_path, "for i in range(99): print('line', i)\nraise SystemExit(3)")
    with pytest.raises(ChildDied, match=r"part ended with status 3(.|\n)*line 98"):
        dying.wait_for(lambda: False, 30)
    with pytest.raises(TimeoutError, match="not ready within 0 s"):
        (sleeping := child(tmp_path, "import time; time.sleep(99)")).wait_for(lambda: False, 0)
    sleeping.kill()
    with pytest.raises(ChildDied, match="killed by SIGKILL"):
        sleeping.check()


def test_a_part_ends_with_all_that_it_started_even_if_it_will_not(tmp_path: pathlib.Path) -> None:
    stubborn = child(
        tmp_path,
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        "print('started', flush=True); time.sleep(99)",
    )
    stubborn.wait_for(lambda: "started" in stubborn.tail(), 30)
    pid = stubborn._process.pid
    assert len(session_of(pid)) == 2
    stubborn.end(grace_s=0.1)
    assert not session_of(pid)


def test_a_stack_empties_only_a_directory_that_a_stack_made_and_none_that_is_in_use(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DirectoryInUse, match="no stack made it"), LocalStack({}, tmp_path):
        pass
    assert (tmp_path / "thesis.txt").exists()
    home = tmp_path / "home"
    with LocalStack({}, home):
        (home / "storage").mkdir()
        with pytest.raises(DirectoryInUse, match="another stack runs"), LocalStack({}, home):
            pass
        assert (home / "storage").exists()
    with LocalStack({}, home):
        assert [path.name for path in home.iterdir()] == [MARK]


@pytest.fixture
def config(tmp_path: pathlib.Path) -> Config:
    return configuration.parse(
        {"storage": str(tmp_path), "events": {"actions": ["click"]}, "model": {"dim": 4}}
    )


class Trainer:
    """What a trainer leaves behind."""

    def __init__(self, config: Config) -> None:
        self.config, self.store = config, WeightStore(config.storage / "weights")
        self.journal = config.storage / "metrics" / "run.jsonl"
        self.journal.parent.mkdir()

    def settles(self, partition: int, start: int, stop: int, at_ms: int, **more: Any) -> None:
        self.writes({"at_ms": at_ms, "ranges": [[partition, start, stop, 0]], **more})

    def reports(self, entropy: float) -> None:
        progress = {
            "at_ms": 1, "step": 1, "events": 5, "positions": {"0": 5}, "version": 1, "checkpoint": 0,
            "figures": {"ne/click": entropy},
        }  # fmt: skip
        self.writes({"at_ms": 1, "progress": progress})

    def writes(self, entry: dict[str, Any], end: str = "\n") -> None:
        with self.journal.open("a") as file:
            file.write(json.dumps(entry) + end)

    def publishes(self, positions: dict[int, list[tuple[int, int]]]) -> int:
        weights = Weights({}, np.empty(0, np.int64), np.empty((0, 4), np.float32), np.empty(0, np.bool_), {})
        return self.store.publish(
            weights, Recipe.of(self.config), step=1, positions=positions, newest_event_ms=0
        ).number


def test_an_event_is_learned_once_a_version_that_covers_it_has_answered(config: Config) -> None:
    trainer, observer = Trainer(config), Observer(config)
    trainer.settles(0, 0, 5, at_ms=1000)
    trainer.publishes({0: [(0, 5)]})
    trainer.settles(0, 5, 9, at_ms=2000)
    trainer.writes({"at_ms": 3000}, end="")  # a line that is being written
    observer.refresh()
    observer.answered(1, 4000)
    assert observer.covering(0, 4) == 1
    assert observer.covering(0, 5) is None
    assert observer.learned(0, 5) is None
    covering = trainer.publishes({0: [(0, 9)]})
    later = trainer.publishes({0: [(0, 9)]})
    observer.refresh()
    assert observer.learned(0, 5) is None
    observer.answered(later, 6000)  # the first version that covers it never answered
    learned = observer.learned(0, 5)
    assert learned == Learned(2000, observer.manifests[covering].created_ms, 6000, later)
    assert observer.learned(1, 5) is None


class Ready(Client):
    """A server that is ready and does nothing else."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1", 1)

    def get(self, path: str) -> Any:
        return {"version": 1}


def test_a_loop_that_does_not_close_fails_with_the_step_and_what_was_seen(config: Config) -> None:
    Trainer(config).reports(entropy=1.5)
    observer = Observer(config)
    observer.refresh()

    def no_scene() -> Scene:
        raise AssertionError("too early")

    proof = Proof(Ready(), observer, "click", no_scene, lambda: 0, 0.1, threading.Event())
    with pytest.raises(ProofFailed, match=rf"{LEARNS}: not within .* last seen: click 1\.500"):
        proof.run()
    assert list(proof.done) == [STEPS[0]]


def test_the_chart_shows_the_base_rate_and_falls_with_the_entropy() -> None:
    lines = screen.chart({"click": [1.3, 1.0, 0.7], "like": [0.7]}, rows=5, columns=10)
    assert len(lines) == 5
    level, _, base = lines[1].partition("│")
    assert float(level) == 1
    assert base == "┄●┄┄┄┄┄┄┄┄"
    assert lines[0].endswith("│●         ")  # above the chart: kept at its edge
    assert lines[4].endswith("│○ ●       ")


def moved() -> Moved:
    scene = Scene(7, [{"item_id": 1}, {"item_id": 2}], {1: "a", 2: "b"}, {2}, [{}], 5, "user 7 does it")
    return Moved(
        scene=scene,
        action="click",
        before=Ranking(3, 10, {1: 0.5, 2: 0.25}, False),
        after=Ranking(3, 11, {1: 0.5, 2: 0.75}, False),
        learned=Ranking(5, 11, {1: 0.125, 2: 0.875}, True),
        visible_ms=40.0,
        posted_ms=10_000,
        way=Learned(10_500, 12_000, 12_250, 5),
    )


def test_the_findings_show_ranks_that_moved_and_times_since_the_post() -> None:
    out = io.StringIO()
    console = rich.console.Console(file=out, width=100)
    console.print(screen.ranking(moved()), screen.way(moved()))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert ["2", "b", "0.250", "#2", "0.750", "#1", "▲1", "0.875", "#1"] in rows
    assert ["1", "a", "0.500", "#1", "0.500", "#2", "▼1", "0.125", "#2"] in rows
    assert [row[:3] for row in rows if row and row[0] in ("visible", "trained", "published", "live")] == [
        ["visible", "40", "ms"],
        ["trained", "0.50", "s"],
        ["published", "2.00", "s"],
        ["live", "2.25", "s"],
    ]


def test_a_curl_line_is_what_a_shell_takes_apart_again() -> None:
    body = {"user_id": "O'Neill", "candidates": ["a b", "$HOME"]}
    line = screen.curl(Call("POST", "/v1/rank", body, 1.0), "http://127.0.0.1:8000")
    shell = ["sh", "-c", line.replace("curl -s", "printf '%s\\n'", 1)]
    said = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "http://127.0.0.1:8000/v1/rank"
    assert json.loads(said[-1]) == body


# -- the whole ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """`python -m jobs.demo` as a child, and everything that it started, told by a variable they inherit."""

    process: subprocess.Popen[str]
    mark: str

    def left(self) -> list[str]:
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark in (path / "environ").read_bytes().decode(errors="replace"):
                    found.append((path / "cmdline").read_text().replace("\0", " "))
        return found


@contextlib.contextmanager
def running(home: pathlib.Path, *arguments: str) -> Iterator[Run]:
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "jobs.demo", "--home", str(home), *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "GRSTREAM_TEST_MARK": mark}
    ) as process:
        try:
            yield Run(process, mark)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@pytest.mark.slow
@pytest.mark.ray_cluster
def test_the_demo_proves_the_loop_and_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    with running(tmp_path, "--exit-after-proof") as run:
        said, _ = run.process.communicate(timeout=400)
        assert run.process.returncode == 0, said
    for step in STEPS:
        assert f"PROVEN: {step}" in said
    assert "the loop is closed" in said
    assert "curl -s http://127.0.0.1:" in said
    assert run.left() == []


@pytest.mark.ray_cluster
def test_a_part_that_dies_ends_the_demo_with_its_log_and_leaves_nothing_behind(
    tmp_path: pathlib.Path,
) -> None:
    with running(tmp_path) as run:
        deadline = time.monotonic() + 60
        while not (broker := [line for line in run.left() if " broker " in line]):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert len(broker) == 1
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(tmp_path / "broker") in (path / "cmdline").read_text():
                    os.kill(int(path.name), signal.SIGKILL)
        said, _ = run.process.communicate(timeout=120)
    assert run.process.returncode == 1
    assert "broker was killed by SIGKILL" in said
    assert run.left() == []
