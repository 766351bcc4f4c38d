"""`RayHead`: a Ray cluster of one node beside others, with a token, and a dashboard that takes jobs."""

import contextlib
import os
import pathlib
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import httpx

from jobs.child import Child, session_of
from jobs.stack import OBJECT_STORE_BYTES, free_port

ROOT = pathlib.Path(__file__).parent.parent
BIN = pathlib.Path(sys.executable).parent
START_S = 180.0


class RayHead(contextlib.AbstractContextManager["RayHead"]):
    """`ray start --head` as a child process; gone with all that runs on it on leaving the context.

    Where it runs, `environment` included, is what its jobs and replicas see, as a container would be.
    """

    def __init__(
        self,
        logs: pathlib.Path,
        cpus: int = 4,
        environment: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> None:
        self.port, self.dashboard_port = free_port(), free_port()
        self.token = token or secrets.token_hex(16)
        self.environment = {
            **os.environ,
            **(environment or {}),
            "PATH": f"{BIN}:{os.environ['PATH']}",  # a job's `python` is this one
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }
        self._logs, self._cpus = logs, cpus
        self._resources = contextlib.ExitStack()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def __enter__(self) -> "RayHead":
        home = tempfile.mkdtemp(prefix="grstream-")  # its sockets need a short path
        self._resources.callback(shutil.rmtree, home, ignore_errors=True)
        bin = pathlib.Path(sys.executable).parent
        command = [
            str(bin / "ray"),
            "start",
            "--head",
            "--block",
            "--disable-usage-stats",
            f"--temp-dir={home}",
        ]
        command += [f"--port={self.port}", f"--num-cpus={self._cpus}"]
        command += ["--include-dashboard=true", f"--dashboard-port={self.dashboard_port}"]
        command += ["--dashboard-host=0.0.0.0"]  # as KubeRay starts it: heads are asked by their own address
        # Ray's own defaults may be another cluster's.
        for name in ("dashboard-agent-listen-port", "metrics-export-port", "ray-client-server-port"):
            command += [f"--{name}={free_port()}"]
        command += [
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
        ]
        path = f"{bin}:{self.environment['PATH']}"  # a job's `python` is this one
        child = Child("ray", command, self._logs / "ray.log", self._logs, {**self.environment, "PATH": path})
        self._resources.callback(child.end, 3.0)
        self._resources.callback(self._keep_logs, pathlib.Path(home))
        child.wait_for(self._answers, START_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """To the dashboard."""
        return httpx.request(
            method, self.url + path, headers={"Authorization": f"Bearer {self.token}"}, timeout=30, **more
        )

    def jobs(self) -> list[dict[str, Any]]:
        """Submitted ones, oldest first."""
        listed = [job for job in self.request("GET", "/api/jobs/").json() if job["submission_id"]]
        return sorted(listed, key=lambda job: job["start_time"] or 0)

    def submit(self, name: str, entrypoint: str) -> None:
        """A job, as `ray job submit` would."""
        answer = self.request(
            "POST", "/api/jobs/", json={"submission_id": name, "entrypoint": entrypoint, "runtime_env": {}}
        )
        assert answer.status_code == 200, answer.text

    def stop(self, name: str, within_s: float = 60.0) -> str:
        """Stop a job; what it wrote."""
        self.request("POST", f"/api/jobs/{name}/stop")
        deadline = time.monotonic() + within_s
        while self.request("GET", f"/api/jobs/{name}").json()["status"] == "RUNNING":
            assert time.monotonic() < deadline, self.logs(name)
            time.sleep(0.2)
        return self.logs(name)

    def logs(self, name: str) -> str:
        """What a job wrote."""
        written: str = self.request("GET", f"/api/jobs/{name}/logs").json()["logs"]
        return written

    def deploy(self, document: Mapping[str, Any]) -> None:
        """A Serve document, as `serve deploy` would."""
        answer = self.request("PUT", "/api/serve/applications/", json=document)
        assert answer.status_code == 200, answer.text

    def applications(self) -> dict[str, Any]:
        """What Serve tells of its applications, by name."""
        found: dict[str, Any] = self.request("GET", "/api/serve/applications/").json()["applications"]
        return found

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.request("GET", "/api/jobs/").status_code == 200
        return False

    def _keep_logs(self, home: pathlib.Path) -> None:
        for logs in home.glob("session_*/logs"):
            if not logs.parent.is_symlink():
                shutil.copytree(
                    logs, self._logs / "session", dirs_exist_ok=True, ignore_dangling_symlinks=True
                )


class RayNode(contextlib.AbstractContextManager["RayNode"]):
    """Another node of a head's cluster, on the same machine."""

    def __init__(self, head: RayHead, log: pathlib.Path, cpus: int) -> None:
        command = [str(BIN / "ray"), "start", f"--address=127.0.0.1:{head.port}", "--block", *_own_ports()]
        command += [f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        command += ["--disable-usage-stats"]
        self._child = Child("node", command, log, log.parent, head.environment)
        self._child.wait_for(lambda: "Ray runtime started" in log.read_text(), START_S)

    def __exit__(self, *_: object) -> None:
        self._child.end(3.0)

    def kill_raylet(self) -> None:
        """As a node that is lost; what Ray started there ends with it."""
        killed = 0
        for pid in session_of(self._child._process.pid):
            with contextlib.suppress(OSError):
                if b"raylet/raylet" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        assert killed == 1


def _own_ports() -> list[str]:
    """Ray's own defaults may be another cluster's."""
    ports = [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "metrics-export-port")]
    return [*ports, "--min-worker-port=0", "--max-worker-port=0"]
