"""`LocalStack`: the whole system on this machine, as child processes, in a directory of its own.

    broker ─► topic ─► stream (jobs/replay.py)
                  └──► trainer (jobs/train_stream.py) ┐
    ray ────────────────────────────────────────────► ├ at the same time
                  └──► server (serve run)             ┘

Each is the command that its documentation names. Everything a run writes is in its directory, which is made
anew, but for Ray's own session: its sockets need a short path, so it is a temporary directory, removed at
the end after its logs were moved beside the others.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import yaml

from grstream import config as configuration
from grstream.config import Config
from grstream.kafka import create_topic
from jobs.child import Child, Stopped
from jobs.client import Client, Refused

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = ("broker", "ray", "stream", "trainer", "server")
MARK = ".grstream"  # in a directory that a stack made, and so may make anew
START_S = 120.0  # for any part, on a machine that is busy
# The trainer saves a checkpoint and a version. Ray, whose raylet would wait 15 s for idle workers, holds
# nothing by then that is worth it.
GRACE_S = {"trainer": 20.0, "ray": 3.0}
# Logical CPUs: trainer 1, reader 0.5, and the server's 0.6. Ray starts as many idle workers, so no more.
CPUS = 4
OBJECT_STORE_BYTES = 512 << 20


class DirectoryInUse(RuntimeError):
    """Another stack runs in the directory, or it is not a stack's."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """How far a part has come, for a person to see."""

    state: str  # waiting, starting, up, ended
    seconds: float = 0.0  # it took to come up


class LocalStack:
    """`with LocalStack(settings, home, stream) as stack: stack.start()`.

    `settings` is a configuration as loaded from YAML; storage, addresses and port are set here. `stream` are
    further arguments of `jobs/replay.py`; without them nothing is sent before `stream` is called. `port` is
    wished for, and taken if it is free. Without `train` there is no trainer. `environment` is for all parts.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        home: pathlib.Path,
        stream: Sequence[str] | None = None,
        partitions: int = 2,
        port: int = 0,
        train: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.home = home.absolute()
        self.stages = dict.fromkeys(PARTS, Stage("waiting"))
        self.partitions = partitions
        self._settings, self._stream, self._port = settings, stream, port
        self._train, self._more = train, dict(environment or {})
        self._children: dict[str, Child] = {}
        self._stopping = threading.Event()
        self._ray_home: pathlib.Path | None = None
        self._lock: IO[str] | None = None
        # Ray's own defaults (6379, 10001, workers on 10002 to 19999) may be another cluster's.
        self._ray_port, self._token = free_port(), secrets.token_hex(32)
        self.metrics_port = free_port()  # where Ray exports the metrics of all parts, for Prometheus
        self.config: Config

    def __enter__(self) -> "LocalStack":
        self._lock = _own(self.home)
        self._ray_home = pathlib.Path(tempfile.mkdtemp(prefix="grstream-"))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def config_path(self) -> pathlib.Path:
        return self.home / "config.yaml"

    def client(self) -> Client:
        """A client of the server."""
        return Client(self.config.serve.host, self.config.serve.port)

    # -- up ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring everything up; returns when the trainer reads and the server answers.

        Raises ChildDied, TimeoutError, and Stopped after `interrupt` or `stop`.
        """
        with concurrent.futures.ThreadPoolExecutor(3, "start") as pool:
            try:
                ray = pool.submit(self._start_ray)
                self._start_broker()
                if self._stream is not None:
                    self.stream(self._stream)
                ray.result()
                waiting = [pool.submit(self._start_server)]
                if self._train:
                    waiting.append(pool.submit(self._start_trainer))
                for part in concurrent.futures.as_completed(waiting):
                    part.result()
            except BaseException:
                self.interrupt()  # or the pool would wait for what is still starting
                raise

    def stream(self, arguments: Sequence[str]) -> None:
        """Let `jobs/replay.py` with these arguments send events."""
        with self._stage("stream"):
            command = [sys.executable, "-m", "jobs.replay", "--config", str(self.config_path)]
            self._run("stream", [*command, *arguments])

    def check(self) -> None:
        """Raises ChildDied if a part has ended, but for a stream that came to its end."""
        for name, child in list(self._children.items()):
            if name == "stream" and child.status() == 0:
                self.stages[name] = Stage("ended", self.stages[name].seconds)
            else:
                child.check()

    def _start_broker(self) -> None:
        with self._stage("broker"):
            command = [_bin("grstream"), "broker", "--dir", str(self.home / "broker"), "--port", "0"]
            child = self._run("broker", command)
            child.wait_for(lambda: _said(child, r"^ready (\S+)"), START_S, self._stopping)
            self._configure(_said(child, r"^ready (\S+)"))
            create_topic(self.config.kafka, self.partitions)

    def _start_ray(self) -> None:
        with self._stage("ray"):
            command = [_bin("ray"), "start", "--head", "--block", "--disable-usage-stats"]
            command += ["--include-dashboard=false", f"--temp-dir={self._ray_home}", f"--num-cpus={CPUS}"]
            command += [f"--port={self._ray_port}", f"--ray-client-server-port={free_port()}"]
            command += ["--min-worker-port=0", "--max-worker-port=0"]
            command += [f"--metrics-export-port={self.metrics_port}"]
            child = self._run("ray", [*command, f"--object-store-memory={OBJECT_STORE_BYTES}"])
            child.wait_for(lambda: _said(child, "Ray runtime started"), START_S, self._stopping)

    def _start_trainer(self) -> None:
        with self._stage("trainer"):
            command = [sys.executable, "-m", "jobs.train_stream", "--config", str(self.config_path)]
            child = self._run("trainer", command)
            metrics = self.config.storage / "metrics"
            child.wait_for(lambda: any(metrics.glob("*.jsonl")), START_S, self._stopping)

    def _start_server(self) -> None:
        with self._stage("server"):
            path = self.home / "serve.yaml"
            path.write_text(yaml.safe_dump(self._serve_config()))
            child = self._run("server", [_bin("serve"), "run", "--app-dir", str(ROOT), str(path)])
            client = self.client()
            child.wait_for(lambda: _answers(client), START_S, self._stopping)
            client.close()

    # -- down -------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Have `start`, if it is under way, raise Stopped. Safe in a signal handler."""
        self._stopping.set()

    def stop(self) -> None:
        """End every part, last started first, and remove Ray's session. May be called again."""
        self._stopping.set()
        for name in ("stream", "trainer", "server", "ray", "broker"):
            child = self._children.get(name)
            if child is not None:
                child.end(GRACE_S.get(name, 5.0))
        self._tidy()

    def kill(self) -> None:
        """End every part at once."""
        self._stopping.set()
        for child in list(self._children.values()):
            child.kill()
        self._tidy()

    def _tidy(self) -> None:
        if self._ray_home is not None:
            for logs in self._ray_home.glob("session_*/logs"):
                if not logs.parent.is_symlink():
                    shutil.move(logs, self.home / "logs" / "ray-session")
            shutil.rmtree(self._ray_home, ignore_errors=True)
            self._ray_home = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- parts of the above -----------------------------------------------------------------------------

    def _configure(self, bootstrap: str) -> None:
        settings = dict(self._settings)
        settings["storage"] = str(self.home / "storage")
        settings["kafka"] = {**settings.get("kafka", {}), "bootstrap_servers": [bootstrap]}
        settings["serve"] = {
            **settings.get("serve", {}),
            "port": self._port if _is_free(self._port) else free_port(),
        }
        self.config_path.write_text(yaml.safe_dump(settings, sort_keys=False))
        self.config = configuration.load(self.config_path)

    def _serve_config(self) -> dict[str, Any]:
        serve = self.config.serve
        return {
            "http_options": {"host": serve.host, "port": serve.port},
            "applications": [
                {
                    "name": "grstream",
                    "route_prefix": "/",
                    "import_path": "serve.app:build",
                    "args": {"config": str(self.config_path)},
                }
            ],
        }

    def _run(self, name: str, command: Sequence[str]) -> Child:
        if self._stopping.is_set():
            raise Stopped(f"stopped before {name} was started")
        child = Child(name, command, self.home / "logs" / f"{name}.log", ROOT, self._environment())
        self._children[name] = child
        return child

    def _environment(self) -> dict[str, str]:
        """What children inherit, and what is set for them."""
        ours = {
            "RAY_ADDRESS": f"127.0.0.1:{self._ray_port}",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",  # a process of arithmetic per core is enough: trainer and scorer
            "RAY_AUTH_MODE": "token",  # Ray listens beyond loopback
            "RAY_AUTH_TOKEN": self._token,
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
        }
        return {**os.environ, **ours, **self._more}

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        self.stages[name] = Stage("starting")
        yield
        self.stages[name] = Stage("up", time.monotonic() - began)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return port > 0


def _own(home: pathlib.Path) -> IO[str]:
    """Make the directory anew and lock it. Raises DirectoryInUse."""
    home.mkdir(parents=True, exist_ok=True)
    mark = home / MARK
    if any(home.iterdir()) and not mark.exists():
        raise DirectoryInUse(f"{home} is not empty and no stack made it; name another directory")
    lock = mark.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise DirectoryInUse(f"another stack runs in {home}") from error
    for path in home.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != mark:
            path.unlink()
    return lock


def _bin(name: str) -> str:
    """A command installed beside this Python."""
    return str(pathlib.Path(sys.executable).parent / name)


def _said(child: Child, pattern: str) -> str:
    """The first group of a pattern in a child's log, or the match; empty if there is none."""
    match = re.search(pattern, child.log.read_text(errors="replace"), re.MULTILINE)
    return "" if match is None else match[match.re.groups]


def _answers(client: Client) -> bool:
    try:
        client.get("/healthz")
    except (OSError, Refused):
        return False
    return True
