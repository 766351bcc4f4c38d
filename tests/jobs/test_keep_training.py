"""A job is kept running on clusters of Ray: whatever ends it, there is one of it again, and never two."""

import contextlib
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobs.keep_training import LOOK_S
from jobs.stack import free_port
from tests.ray_head import ROOT, RayHead

PATIENCE_S = 120.0

pytestmark = pytest.mark.ray_cluster


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with RayHead(tmp_path_factory.mktemp("ray"), cpus=2) as started:
        yield started


class Keeper:
    """`jobs.keep_training` as a process."""

    def __init__(self, head: RayHead, name: str, command: list[str], log: pathlib.Path, *more: str) -> None:
        self.log = log
        arguments = ["--name", name, *more, "--", *command]
        if "--address" not in more:
            arguments = ["--address", head.url, *arguments]
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.keep_training", *arguments],
                cwd=ROOT,
                env=head.environment,
                stdout=out,
                stderr=out,
            )

    def said(self) -> str:
        return self.log.read_text()


@contextlib.contextmanager
def keeping(head: RayHead, name: str, command: list[str], log: pathlib.Path, *more: str) -> Iterator[Keeper]:
    keeper = Keeper(head, name, command, log, *more)
    try:
        yield keeper
    finally:
        keeper.process.kill()
        keeper.process.wait()


def of(head: RayHead, name: str) -> list[dict[str, Any]]:
    return [job for job in head.jobs() if job["submission_id"].startswith(f"{name}-")]


def statuses(head: RayHead, name: str) -> list[str]:
    return [job["status"] for job in of(head, name)]


def eventually(check: Callable[[], Any], keeper: Keeper) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := check()):
        assert keeper.process.poll() is None, keeper.said()
        assert time.monotonic() < deadline, keeper.said()
        time.sleep(0.1)
    return found


def test_a_job_that_fails_is_submitted_again_and_what_it_said_is_told(
    head: RayHead, tmp_path: pathlib.Path
) -> None:
    command = ["sh", "-c", "echo no such topic; exit 3"]
    with keeping(head, "fails", command, tmp_path / "log") as keeper:
        eventually(lambda: statuses(head, "fails").count("FAILED") >= 2, keeper)
        assert "no such topic" in keeper.said()
        began = [job["start_time"] for job in of(head, "fails")]
        ended = [job["end_time"] for job in of(head, "fails")]
        assert began[1] - ended[0] >= 2000  # not at once: it lived for a moment
        eventually(lambda: "the next one in 4 s" in keeper.said(), keeper)  # and ever later


def test_a_job_that_was_stopped_is_submitted_again(head: RayHead, tmp_path: pathlib.Path) -> None:
    with keeping(head, "stopped", ["sleep", "999"], tmp_path / "log", "--steady-s", "0") as keeper:
        eventually(lambda: statuses(head, "stopped") == ["RUNNING"], keeper)
        assert head.request("POST", f"/api/jobs/{of(head, 'stopped')[0]['submission_id']}/stop").json()[
            "stopped"
        ]
        eventually(lambda: statuses(head, "stopped") == ["STOPPED", "RUNNING"], keeper)


def test_a_job_that_runs_already_is_followed_and_is_stopped_with_its_keeper(
    head: RayHead, tmp_path: pathlib.Path
) -> None:
    with keeping(head, "followed", ["sleep", "999"], tmp_path / "log") as first:
        eventually(lambda: statuses(head, "followed") == ["RUNNING"], first)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    with keeping(head, "followed", ["sleep", "999"], tmp_path / "log") as second:
        eventually(lambda: "which runs already" in second.said(), second)
        time.sleep(2 * LOOK_S)
        assert statuses(head, "followed") == ["RUNNING"]
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(60) == 0, second.said()
    assert statuses(head, "followed") == ["STOPPED"]


def test_a_job_with_another_command_is_replaced(head: RayHead, tmp_path: pathlib.Path) -> None:
    with keeping(head, "other", ["sleep", "998"], tmp_path / "log") as first:
        eventually(lambda: statuses(head, "other") == ["RUNNING"], first)
    with keeping(head, "other", ["sleep", "999"], tmp_path / "log") as second:
        eventually(lambda: statuses(head, "other") == ["STOPPED", "RUNNING"], second)
        assert [job["entrypoint"] for job in of(head, "other")] == ["sleep 998", "sleep 999"]


class Switch:
    """A port that leads to one of others, as a head service does to the head of the cluster in use."""

    def __init__(self, port: int) -> None:
        self.leads_to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.leads_to))
                except OSError:
                    near.close()
                    continue
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.slow
def test_where_the_cluster_is_replaced_the_job_moves_and_never_runs_on_both(
    head: RayHead, tmp_path: pathlib.Path
) -> None:
    switch = Switch(free_port())  # nobody listens yet
    with contextlib.closing(switch), RayHead(tmp_path, cpus=2, token=head.token) as new:
        address = f"http://127.0.0.1:{switch.port}"
        more = ("--address", address, "--head-port", str(head.dashboard_port))
        with keeping(head, "moved", ["sleep", "999"], tmp_path / "log", *more) as keeper:
            eventually(lambda: "waiting for the cluster" in keeper.said(), keeper)
            switch.leads_to = head.dashboard_port
            [job] = eventually(lambda: [j for j in of(head, "moved") if j["status"] == "RUNNING"], keeper)
            eventually(lambda: of(head, "moved")[0]["driver_agent_http_address"], keeper)
            time.sleep(2 * LOOK_S)  # so that the keeper, too, knows where it runs
            switch.leads_to = new.dashboard_port
            eventually(lambda: statuses(new, "moved") == ["RUNNING"], keeper)
            [old] = of(head, "moved")
            assert old["status"] == "STOPPED"
            assert old["submission_id"] == job["submission_id"]
            assert old["end_time"] <= of(new, "moved")[0]["start_time"]
