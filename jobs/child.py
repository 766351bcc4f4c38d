"""`Child`: a process that a launcher started, its log, and its end.

A child leads a session of its own, so that Ctrl-C at a terminal reaches the launcher alone, which then stops
its children in order; and what a child started can be found, and is ended with it.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

LOOK_S = 0.1  # between looks at whether something has come to be
KILLED_S = 5.0  # a killed process may take so long to be gone


class ChildDied(RuntimeError):
    """A process ended that should not have; the message holds the end of its log."""

    def __init__(self, name: str, status: int, log: pathlib.Path, tail: str) -> None:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        super().__init__(f"{name} {how}; the end of {log}:\n{tail or '(empty)'}")
        self.name = name


class Stopped(RuntimeError):
    """The launcher was told to stop while it waited."""


class Child:
    """A process with its output in a log."""

    def __init__(
        self, name: str, command: Sequence[str], log: pathlib.Path, cwd: pathlib.Path, env: Mapping[str, str]
    ) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def check(self) -> None:
        """Raises ChildDied."""
        status = self.status()
        if status is not None:
            raise ChildDied(self.name, status, self.log, self.tail())

    def tail(self, lines: int = 15) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def wait_for(
        self, what: Callable[[], object], timeout_s: float, stop: threading.Event | None = None
    ) -> None:
        """Until `what` holds. Raises ChildDied, Stopped, and TimeoutError with the end of the log."""
        deadline = time.monotonic() + timeout_s
        while not what():
            self.check()
            if stop is not None and stop.wait(LOOK_S):
                raise Stopped(f"stopped while {self.name} was starting")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self.name} was not ready within {timeout_s:.0f} s; the end of {self.log}:\n"
                    + self.tail()
                )

    def end(self, grace_s: float, first: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, wait, then kill what is left of its session."""
        if self.status() is None:
            self._process.send_signal(first)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        self.kill()

    def kill(self) -> None:
        """Kill it and all of its session."""
        if self.status() is None:
            self._process.kill()
            self._process.wait()
        deadline = time.monotonic() + KILLED_S
        while (left := session_of(self._process.pid)) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(LOOK_S / 10)


def session_of(leader: int) -> list[int]:
    """The processes of a session, where /proc tells; zombies are none."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found
