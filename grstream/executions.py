"""The Ray Data executions of one job, one after another: a small Ray actor begins and ends them.

`streaming_split` runs an execution in an actor of its own, which in Ray 2.60 never gives back some 6 to 11 KB
of memory a block, not even when its next execution begins. So each execution is a `streaming_split` of its
own, and the actor of the one before is ended first.

Executions belong to the actor here, and so to the job's driver, and to no rank: a rank that is killed would
take its execution with it before that could give back what it has reserved of the cluster, which Ray then
holds for 180 s; and what a rank starts would wait for a place in the rank's own placement group.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataIterator
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grstream.config import Config
from grstream.ledger import Ledger
from grstream.source import actions
from grstream.until import Until

logger = logging.getLogger(__name__)

END_S = 10.0  # Ray Data joins its own threads for 2 s


@dataclasses.dataclass(frozen=True)
class Split:
    """What one rank gets of an execution: micro-batches as blocks, to be iterated over once."""

    iterator: DataIterator

    def __iter__(self) -> Iterator[pa.Table]:
        # As `iter_batches` does, which in Ray 2.60 holds the newest block back until the next one comes or,
        # without prefetching, leaves a thread behind.
        bundles, _, executor = self.iterator._to_ref_bundle_iterator()
        try:
            for bundle in bundles:
                for ref in bundle.block_refs:
                    yield ray.get(ref)
        finally:
            self.iterator._on_iteration_end(executor)


class ExecutionsActor:
    """The actor's own code; use `Executions`."""

    def __init__(self, config: Config, until: Until | None) -> None:
        self._config, self._until = config, until
        self._coordinator: Any = None  # the actor that holds the execution

    def renew(self, position: pa.Table, ranks: int) -> list[DataIterator]:
        self.end()
        dataset = actions(self._config, Ledger.from_table(position), self._until)
        # Neither `equal=True` nor locality hints: the first would hold blocks back to even out rows, the
        # second holds the newest block back until another comes, in the hope of a better rank for it.
        splits = dataset.streaming_split(ranks, equal=False)
        self._coordinator = splits[0]._coord_actor  # Ray Train takes hold of it in the same way
        return splits

    def end(self) -> None:
        if self._coordinator is None:
            return
        try:
            ray.get(self._coordinator.shutdown_executor.remote(), timeout=END_S)
        except RayError as error:  # it is dead, or hangs
            logger.warning("an execution did not end by itself: %s", error)
        ray.kill(self._coordinator)
        self._coordinator = None


class Executions:
    """A handle on a job's executions, which any process of the job may hold."""

    def __init__(self, config: Config, until: Until | None) -> None:
        # Here, where Ray Train's controller is, too: an actor without CPUs might land on any node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ExecutionsActor)
        self._actor: Any = remote.options(scheduling_strategy=here).remote(config, until)

    def renew(self, position: Ledger, ranks: int) -> list[Split]:
        """End the execution there is and begin one that emits what `position` does not hold.

        It begins when all ranks iterate, and each of them gets whatever block is next.
        """
        return [Split(it) for it in ray.get(self._actor.renew.remote(position.to_table(), ranks))]

    def close(self) -> None:
        """End the execution and the actor."""
        ray.wait([self._actor.end.remote()], timeout=2 * END_S)
        ray.kill(self._actor)
