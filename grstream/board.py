"""What the driver and the trainer's ranks of one job tell each other: a small Ray actor.

Ray Train carries no message from driver to workers, so these go by here: the wish to stop, what the trainer
reports, and errors that starting again will not cure.
"""

import asyncio
import dataclasses
from typing import Any

import ray

from grstream import telemetry
from grstream.exporter import Exporter
from grstream.telemetry import Part


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a trainer is, as its driver shows it."""

    at_ms: int
    step: int
    events: int  # trained on, ever
    settled: dict[str, int]  # offsets by disposition, ever
    positions: dict[int, int]  # partition -> first offset not consumed
    newest_event_ms: int
    strays: int  # users seen in more than one partition, see `grstream.strays`
    figures: dict[str, float]  # prequential quality, see `grstream.metrics`; and `sparsity` if configured
    version: int  # newest published weights, 0 before the first
    checkpoint: int  # newest checkpoint, 0 before the first


class BoardActor:
    """The actor's own code; use `Board`."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._progress: Progress | None = None
        self._failure: Exception | None = None
        self._reverts: dict[int, int] = {}  # checkpoint -> times
        self._starts = 0
        # It outlives the ranks, so it is here that what ends them is counted.
        self._exporter = Exporter()
        self._exporter.begin(Part.JOB)

    async def stop(self) -> None:
        self._stop.set()

    async def stopped(self) -> None:
        await self._stop.wait()

    async def report(self, progress: Progress) -> None:
        self._progress = progress

    async def progress(self) -> Progress | None:
        return self._progress

    async def fail(self, error: Exception) -> None:
        self._failure = error

    async def started(self) -> None:
        self._starts += 1
        if self._starts > 1:
            self._exporter.add(telemetry.RESTARTS, 1)

    async def reverted(self, checkpoint: int) -> int:
        self._exporter.add(telemetry.REVERTS, 1)
        self._reverts[checkpoint] = self._reverts.get(checkpoint, 0) + 1
        return self._reverts[checkpoint]

    async def failure(self) -> Exception | None:
        return self._failure


class Board:
    """A handle on a job's board, which any process of the job may hold."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(num_cpus=0, max_concurrency=100)(BoardActor).remote()
        self._stopped: Any = None

    def stop(self) -> None:
        """Ask the trainer to finish its step, save and return."""
        ray.get(self._actor.stop.remote())

    def stop_asked(self) -> bool:
        """Whether `stop` was called. Costs no message: one call waits at the actor until it is."""
        if self._stopped is None:
            self._stopped = self._actor.stopped.remote()
        return bool(ray.wait([self._stopped], timeout=0)[0])

    def report(self, progress: Progress) -> None:
        """Tell the driver, without waiting for it."""
        self._actor.report.remote(progress)

    def progress(self) -> Progress | None:
        return ray.get(self._actor.progress.remote())

    def fail(self, error: Exception) -> None:
        """State an error that starting again will not cure."""
        ray.get(self._actor.fail.remote(error))

    def started(self) -> None:
        """State that the worker group begins, without waiting: by rank 0."""
        self._actor.started.remote()

    def reverted(self, checkpoint: int) -> int:
        """State that training goes back to a checkpoint because of what came of it; how often it has."""
        return ray.get(self._actor.reverted.remote(checkpoint))

    def failure(self) -> Exception | None:
        return ray.get(self._actor.failure.remote())

    def close(self) -> None:
        ray.kill(self._actor)
