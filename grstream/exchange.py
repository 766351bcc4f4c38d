"""Versions of the weights in a Ray cluster's object store, for the scorers of that cluster.

An actor holds the newest base and the deltas since, as numpy arrays that a reader maps without a copy; an
object that a trainer's worker had put would die with the worker, so the actor puts it again. It is a copy of
what storage holds: which versions there are, and which is served, storage alone says, and a version comes
here once it is durable there. So whoever finds nothing here (the actor is away, the reader is in another
cluster) reads storage, and no answer depends on it.
"""

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from grstream.weights import Delta, Manifest, Weights

logger = logging.getLogger(__name__)

NAMESPACE = "grstream"
LOOK_AGAIN_S = 5.0  # after which an actor that was not there is looked for again
FETCH_S = 60.0  # longer than any transfer within a cluster takes
WAITING = 10_000  # replicas that may wait for a version at once

T = TypeVar("T")
Held = Weights | Delta


@dataclasses.dataclass(frozen=True)
class _Version:
    lineage: str
    weights: Any  # ray.ObjectRef, or None
    delta: Any


class ExchangeActor:
    """The actor's own code; use `Exchange`."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._versions: dict[int, _Version] = {}
        self._changed = asyncio.Condition()

    async def offer(self, manifest: Manifest, weights: Weights | None, delta: Delta | None) -> None:
        refs = [None if part is None else ray.put(part) for part in (weights, delta)]
        held = {n: v for n, v in self._versions.items() if v.lineage == manifest.lineage}
        if weights is not None:
            # A reader that is up to date needs what comes next; one that is not, the newest base.
            held = {n: dataclasses.replace(v, weights=None) for n, v in held.items()}
            for number in sorted(held)[: -self._keep]:
                del held[number]
        held[manifest.number] = _Version(manifest.lineage, *refs)
        async with self._changed:
            self._versions = held
            self._changed.notify_all()

    async def weights(self, number: int, lineage: str) -> list[Any]:
        """The reference to a base in a list, empty where it is not here."""
        return [v.weights for v in self._found(number, lineage) if v.weights is not None]

    async def delta(self, number: int, lineage: str) -> list[Any]:
        return [v.delta for v in self._found(number, lineage) if v.delta is not None]

    async def newer_than(self, number: int) -> int:
        """The newest version, once it is."""
        async with self._changed:
            await self._changed.wait_for(lambda: max(self._versions, default=0) > number)
            return max(self._versions)

    def _found(self, number: int, lineage: str) -> list[_Version]:
        found = self._versions.get(number)
        return [found] if found is not None and found.lineage == lineage else []


class Exchange:
    """A handle on the versions of a storage directory, for one that publishes or one that reads (`Nearby`).

    Where the actor is away, or Ray is not there, nothing is found and nothing raised. Not thread-safe.
    """

    def __init__(self, storage: str | os.PathLike[str]) -> None:
        self._name = f"weights of {os.fspath(storage)}"
        self._actor: Any = None
        self._look_at = 0.0  # monotonic
        self._waiting: Any = None  # ray.ObjectRef of the call that waits for a version
        self._told = 0  # the newest version that such a call told of

    def open(self, keep: int) -> None:
        """Start the actor, which ends with this process's job. `keep`: deltas to hold from before a base."""
        options = {"name": self._name, "namespace": NAMESPACE, "get_if_exists": True}
        remote = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=WAITING)(ExchangeActor)
        self._actor = remote.options(**options).remote(keep)

    def close(self) -> None:
        """End the actor, if this handle opened it; what was published stays in storage."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def offer(self, manifest: Manifest, weights: Weights | None, delta: Delta | None) -> None:
        """Hand over a version that is durable."""
        self._asked(lambda actor: ray.get(actor.offer.remote(manifest, weights, delta), timeout=FETCH_S))

    def weights(self, manifest: Manifest) -> Weights | None:
        found = self._fetch("weights", manifest)
        if not isinstance(found, Weights):
            return None
        # The object store's memory is read-only, and is to be free again once another base is there.
        return Weights(
            dense={name: array.copy() for name, array in found.dense.items()},
            keys=found.keys.copy(),
            rows=found.rows.copy(),
            items=found.items.copy(),
            item_names=found.item_names,
        )

    def delta(self, manifest: Manifest) -> Delta | None:
        found = self._fetch("delta", manifest)
        if not isinstance(found, Delta):
            return None
        return dataclasses.replace(found, dense={name: array.copy() for name, array in found.dense.items()})

    def wait(self, timeout_s: float) -> None:
        if self._asked(lambda actor: self._wait(actor, timeout_s)) is None:
            time.sleep(timeout_s)

    def _wait(self, actor: Any, timeout_s: float) -> bool:
        """Whether there was something new. One call waits at the actor, however often this is asked."""
        if self._waiting is None:
            self._waiting = actor.newer_than.remote(self._told)
        if not ray.wait([self._waiting], timeout=timeout_s)[0]:
            return False
        done, self._waiting = self._waiting, None
        self._told = ray.get(done)
        return True

    def _fetch(self, part: str, manifest: Manifest) -> Held | None:
        def fetch(actor: Any) -> Held | None:
            refs = ray.get(getattr(actor, part).remote(manifest.number, manifest.lineage), timeout=FETCH_S)
            return ray.get(refs[0], timeout=FETCH_S) if refs else None

        return self._asked(fetch)

    def _asked(self, ask: Callable[[Any], T]) -> T | None:
        """What the actor says, None where it is away."""
        actor = self._found()
        if actor is None:
            return None
        try:
            return ask(actor)
        except RayError as error:
            logger.warning("the weights in the object store cannot be reached, storage is used: %s", error)
            self._actor, self._waiting = None, None
            self._look_at = time.monotonic() + LOOK_AGAIN_S
            return None

    def _found(self) -> Any:
        if self._actor is None and ray.is_initialized() and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_AGAIN_S
            try:
                self._actor = ray.get_actor(self._name, NAMESPACE)
            except ValueError:  # none of that name
                return None
        return self._actor
