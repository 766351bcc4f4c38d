"""`ActionSource`: the log of actions as an endless Ray Data datasource of micro-batches.

A read task owns the partitions p with p % readers == its index and yields one-row blocks, each a
`MicroBatch`; its first block is empty and only says that the task runs. It returns when it is `recycle_s`
old, because what Ray Data keeps of an execution's blocks grows for as long as that lives: whoever iterates
then makes a new Dataset, which reads on from where the trainer stands (`grstream.executions`). See
`grstream.reader` for what a task does.

Ray 2.60 is given its settings here, each of them a trap otherwise:
- it shapes blocks to 128 MB, and nothing arrives for tens of seconds: `target_max_block_size` 1;
- it runs a dead read task again from its start and drops outputs by index: `max_retries` 0;
- it ends an execution that moved no block for 30 minutes, as a quiet stream may: no such guard;
- it prefetches without a bound that knows of time: a byte cap, which keeps readers a few blocks ahead;
- it runs the next execution's read tasks in the processes of the last, whose heaps never shrink again:
  `max_calls` 1, a process for each.
"""

import functools
import time
import warnings
from collections.abc import Iterator, Mapping

import pyarrow as pa
import ray.data
from ray.data import (
    DataContext,
    Dataset,
    Datasource,
    ExecutionOptions,
    ExecutionResources,
    ReadTask,
)
from ray.data.block import BlockMetadata
from ray.util.annotations import RayDeprecationWarning

from grstream import logs, telemetry
from grstream.config import Config
from grstream.exporter import Exporter
from grstream.histories import Counters
from grstream.ledger import Ledger
from grstream.microbatch import MicroBatch
from grstream.reader import LogReader, collect_seldom
from grstream.until import Until

EXPORT_S = 5.0  # between two looks at what a reader's histories hold
_GAUGES = {
    telemetry.USERS: "users",
    telemetry.HISTORY_EVENTS: "events",
    telemetry.HISTORY_BYTES: "bytes",
    telemetry.USERS_EVICTED: "evicted",
    telemetry.LATE: "late",
    telemetry.TOO_LATE: "too_late",
    telemetry.OPEN_EXPOSURES: "open_exposures",
    telemetry.CLOSED_EARLY: "closed_early",
}


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

    `position` is where the trainer stands. `until` bounds the stream: the tasks return when it is reached.
    """

    def __init__(self, config: Config, position: Ledger, until: Until | None = None) -> None:
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
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        tasks = []
        for reader in range(self._config.source.readers):
            read = functools.partial(_read_in_task, self._config, reader, self._position, self._until)
            # Ray Data warns of a task of more than 1 MiB, and does so by its function's name.
            read.__name__ = _read.__name__  # type: ignore[attr-defined]
            tasks.append(ReadTask(read, unknown))
        return tasks


def _read_in_task(config: Config, reader: int, position: Ledger, until: Until | None) -> Iterator[pa.Table]:
    logs.configure(config.logs)
    exporter = Exporter()
    exporter.keep_fresh(EXPORT_S)  # while nothing comes, too
    yield from _read(config, reader, position, until, exporter)


def _read(
    config: Config, reader: int, position: Ledger, until: Until | None, exporter: Exporter
) -> Iterator[pa.Table]:
    collect_seldom()
    yield MicroBatch.empty(len(config.events.features)).to_block()
    log = LogReader(config, reader, position, until)
    due = time.monotonic()
    for batch in log.batches():
        yield batch.to_block()
        if time.monotonic() >= due:
            _export(exporter, log.counters())
            due = time.monotonic() + EXPORT_S


def _export(exporter: Exporter, counters: Mapping[int, Counters]) -> None:
    for metric, field in _GAUGES.items():
        exporter.set_all(metric, {(p,): getattr(held, field) for p, held in counters.items()})


def actions(config: Config, position: Ledger, until: Until | None = None) -> Dataset:
    """The source as a Dataset with the settings a stream needs, which become this process's own, too."""
    context = DataContext.get_current()
    limits = ExecutionResources(object_store_memory=config.source.ahead_bytes)
    context.execution_options = ExecutionOptions(resource_limits=limits)
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
            max_calls=1,
            ray_remote_args={"max_retries": 0, "resources": config.source.reader_resources},
        )
