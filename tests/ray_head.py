"""`RayHead`: a Ray cluster of one node beside others, with a token, and a dashboard that takes jobs."""

import contextlib
import os
import pathlib
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import httpx

from jobs.child import Child
from jobs.stack import OBJECT_STORE_BYTES, free_port

ROOT = pathlib.Path(__file__).parent.parent
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
