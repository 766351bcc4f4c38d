"""`ActionSource`: the log of actions as an endless Ray Data datasource of micro-batches.

A read task owns the partitions p with p % readers == its index and yields one-row blocks, each a
`MicroBatch`; its first block is empty and only says that the task runs. It returns when it is `recycle_s`
old, because a Ray Data execution keeps about 1 KB per block on its driver for as long as it lives: whoever
iterates begins again, and the source reads on from the position that it is then told. See `grstream.reader`
for what a task does.

Ray 2.60 is given its settings here, each of them a trap otherwise:
- it shapes blocks to 128 MB, and nothing arrives for tens of seconds: `target_max_block_size` 1;
- it runs a dead read task again from its start and drops outputs by index: `max_retries` 0;
- it ends an execution that moved no block for 30 minutes, as a quiet stream may: no such guard;
- it prefetches without a bound that knows of time: a byte cap, which keeps readers a few blocks ahead.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray.data
import ray.train
from ray.data import (
    DataContext,
    DataIterator,
    Dataset,
    Datasource,
    ExecutionOptions,
    ExecutionResources,
    ReadTask,
)
from ray.data.block import BlockMetadata
from ray.util.annotations import RayDeprecationWarning

from grstream.config import Config
from grstream.ledger import Ledger
from grstream.microbatch import MicroBatch
from grstream.reader import LogReader, collect_seldom
from grstream.until import Until


class ReadersNotStarted(RuntimeError):
    """Some read tasks did not get a slot. They are endless, so they never would."""

    def __init__(self, wanted: int, started: int, within_s: float) -> None:
        super().__init__(wanted, started, within_s)
        self.wanted, self.started, self.within_s = wanted, started, within_s

    def __str__(self) -> str:
        return (
            f"{self.started} of {self.wanted} readers started within {self.within_s:g} s: the cluster has no "
            "CPUs left for the others; add CPUs, or lower source.readers, source.reader_cpus or train.workers"
        )


class ActionSource(Datasource):
    """Micro-batches of the log, each offset that `position` does not hold settled exactly once.

    `position` is called when an execution begins, in Ray Data's own process, and so must pickle; what it
    returns is where the trainer stands. `until` bounds the stream: the tasks return when it is reached.
    """

    def __init__(
        self, config: Config, position: Callable[[], Ledger] = Ledger, until: Until | None = None
    ) -> None:
        super().__init__()
        self._config, self._position, self._until = config, position, until

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """One task per reader, whatever parallelism Ray Data would like."""
        position = self._position()
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(functools.partial(_read, self._config, reader, position, self._until), unknown)
            for reader in range(self._config.source.readers)
        ]


def _read(config: Config, reader: int, position: Ledger, until: Until | None) -> Iterator[pa.Table]:
    logging.getLogger("kafka").setLevel(logging.WARNING)  # it tells of every connection
    collect_seldom()
    yield MicroBatch.empty(len(config.events.features)).to_block()
    for batch in LogReader(config, reader, position, until).batches():
        yield batch.to_block()


def actions(config: Config, position: Callable[[], Ledger] = Ledger, until: Until | None = None) -> Dataset:
    """The source as a Dataset with the settings a stream needs.

    Ray Train calls it at each start of a worker group, in its controller, with a DataContext of its own.
    """
    context = DataContext.get_current()
    context.target_max_block_size = 1
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with warnings.catch_warnings():
        # No named parameter of Ray 2.60 takes max_retries' place; the warning announces one for 2.64.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return ray.data.read_datasource(
            ActionSource(config, position, until),
            override_num_blocks=config.source.readers,
            num_cpus=config.source.reader_cpus,
            ray_remote_args={"max_retries": 0},
        )


class StreamSplit(ray.train.DataConfig):
    """Gives each rank whatever block is next.

    Neither `equal=True` nor locality hints: the first would hold blocks back to even out rows, the second
    holds the newest block back until another comes, in the hope of a better rank for it.
    """

    def __init__(self, ahead_bytes: int) -> None:
        limits = ExecutionResources(object_store_memory=ahead_bytes)
        super().__init__(execution_options=ExecutionOptions(resource_limits=limits))

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        shards: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = Dataset.copy(dataset)
            dataset.context.execution_options = self._resolve_execution_options(name)
            splits = dataset.streaming_split(world_size, equal=False)
            for shard, split in zip(shards, splits, strict=True):
                shard[name] = split
        return shards
