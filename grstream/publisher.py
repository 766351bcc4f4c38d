"""Publishes a learner's weights: versions one at a time, written beside the steps that follow.

What a version carries counts as published when the version is durable. A version that could not be written
(the storage is away) therefore loses nothing: its rows are still touched, and the next one carries them too.
"""

import concurrent.futures
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from grstream.config import Config
from grstream.learner import Learner, Taken
from grstream.weight_store import WeightStore
from grstream.weights import CorruptWeights, Delta, Manifest, Recipe, VersionMissing, Weights

logger = logging.getLogger(__name__)


class Exchanged(Protocol):
    """Where versions go beside storage, once they are durable."""

    def offer(self, manifest: Manifest, weights: Weights | None, delta: Delta | None) -> None: ...


class _Order(NamedTuple):
    whole: bool
    builds_on: bool  # the newest version, so that touched rows will do


class Publisher:
    """Of one training run. Its methods are called by the thread that the learner steps in.

    Every rank has one, and all call `publish` together; rank 0's decides and writes.
    """

    def __init__(self, config: Config, learner: Learner, exchange: Exchanged | None = None) -> None:
        self._config, self._learner, self._exchange = config, learner, exchange
        self._store = WeightStore(config.storage / "weights")
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "publisher")
        self._writing: tuple[Taken, concurrent.futures.Future[Manifest]] | None = None
        self._deltas = 0  # since the newest base
        self._step = -1  # of the newest version
        self.version = max(self._store.numbers(), default=0)  # the newest that is durable
        self.failures = 0  # times that storage failed

    def publish(
        self, positions: Mapping[int, Sequence[tuple[int, int]]], newest_event_ms: int, wait: bool = False
    ) -> None:
        """Begin a version of the weights as they are, unless it would be the same or one is being written.

        All ranks call it together. With `wait` return when it is durable, and raise the OSError if it is not;
        without, the next version makes up for it. Raises WeightsErrors of the version before,
        NonFiniteWeights among them.
        """
        ranks, steps = self._learner.ranks, self._learner.steps
        order = ranks.gather(self._decided(wait) if ranks.rank == 0 else None)[0]
        if order is None:
            return
        taken = self._learner.taken(order.whole)
        if taken is None:
            return
        if not order.builds_on:
            taken = taken._replace(delta=None)
        writing = self._pool.submit(
            self._write, taken, step=steps, positions=positions, newest_event_ms=newest_event_ms
        )
        self._writing, self._step = (taken, writing), steps
        if wait:
            failure = self.settle(wait)
            if failure is not None:
                raise failure

    def _decided(self, wait: bool) -> "_Order | None":
        """Whether, and how, the next version is to be made now."""
        self.settle(wait)
        held = self._learner.vocabulary
        if self._writing is not None or (held.version is not None and self._learner.steps == self._step):
            return None
        try:
            builds_on = self._is_there(held.version)
        except OSError as error:
            self.failures += 1
            logger.error("no weights version is published while storage cannot be read: %s", error)
            if wait:
                raise
            return None
        return _Order(not builds_on or self._deltas + 1 >= self._config.train.base_every, builds_on)

    def settle(self, wait: bool = False) -> OSError | None:
        """See to what became of the version being written, if it is through: why it is not durable, if so.

        Raises what `publish` raises.
        """
        if self._writing is None or not (wait or self._writing[1].done()):
            return None
        (taken, writing), self._writing = self._writing, None
        try:
            manifest = writing.result()
        except OSError as error:
            self.failures += 1
            self._step = -1
            logger.error("no weights version was published, the next one carries its rows too: %s", error)
            return error
        taken.vocabulary.carried(taken.mark, manifest.number)
        self._deltas = 0 if manifest.whole else self._deltas + 1
        self.version = manifest.number
        return None

    def close(self) -> None:
        self._pool.shutdown()

    def _is_there(self, version: int | None) -> bool:
        """Whether a delta can build on it."""
        if version is None:
            return False
        try:
            self._store.manifest(version)
        except (VersionMissing, CorruptWeights) as error:
            logger.error("%s; the next version holds all rows", error)
            return False
        return True

    def _write(
        self,
        taken: Taken,
        step: int,
        positions: Mapping[int, Sequence[tuple[int, int]]],
        newest_event_ms: int,
    ) -> Manifest:
        manifest = self._store.publish(
            taken.weights,
            Recipe.of(self._config),
            step=step,
            positions=positions,
            newest_event_ms=newest_event_ms,
            delta=taken.delta,
        )
        if self._exchange is not None:
            self._exchange.offer(manifest, taken.weights, taken.delta)
        try:
            self._store.prune(self._config.train.keep_versions)
        except OSError as error:
            logger.error("old weights versions are left for the next time: %s", error)
        return manifest
