"""A streaming training job: what its driver does. The ranks' own loop is `grstream.trainer`.

Ray Train starts the worker group, and starts it again when a worker or a reader dies, or the weights go bad:
the ranks then go on from the newest checkpoint, with a new execution of `ActionSource`. What starting again
will not cure (lost offsets, a missing topic, readers without a slot, weights that went bad from there before)
ends the job with its own error instead.
"""

import concurrent.futures
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.callback import UserCallback

from grstream import logs
from grstream.board import Board, Progress
from grstream.config import Config
from grstream.exchange import Exchange
from grstream.executions import Executions
from grstream.journal import new_run
from grstream.kafka import TopicMissing, partition_count
from grstream.ranks import Ranks
from grstream.reader import LogTruncated, OffsetGap
from grstream.schema import SchemaChanged
from grstream.segments import SegmentError
from grstream.source import ReadersNotStarted
from grstream.trainer import BAD_WEIGHTS, Trainer
from grstream.until import Until

logger = logging.getLogger(__name__)

# Errors that would only come again, the last ones after `train.max_reverts`.
LASTING = (
    *(OffsetGap, LogTruncated, TopicMissing, SegmentError, ReadersNotStarted, SchemaChanged),
    *BAD_WEIGHTS,
)
WATCH_S = 0.25  # how often the driver looks at the board, and for a wish to stop


class NotEnoughCpus(RuntimeError):
    """The cluster cannot hold the job."""

    def __init__(self, needed: float, there: float) -> None:
        super().__init__(needed, there)
        self.needed, self.there = needed, there

    def __str__(self) -> str:
        return (
            f"the job needs {self.needed:g} CPUs (train.workers x train.worker_cpus + source.readers x "
            f"source.reader_cpus) and the cluster has {self.there:g}"
        )


def train(
    config: Config,
    until: Until | None = None,
    stop: threading.Event | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Progress | None:
    """Train on the stream until it ends or `stop` is set; where the trainer then stood.

    `show` is called from this thread whenever the trainer has reported. Raises BrokerUnavailable,
    TopicMissing and NotEnoughCpus before anything is started, and one of LASTING where the job cannot go
    on.
    """
    partitions = partition_count(config.kafka)
    _check_cpus(config)
    if config.source.readers > partitions:
        logger.warning(
            "source.readers is %d and the topic has %d partitions", config.source.readers, partitions
        )
    board, executions = Board(), Executions(config, until)
    exchange = Exchange(config.storage) if config.train.exchange else None
    if exchange:
        exchange.open(config.train.keep_versions)
    stop = stop or threading.Event()
    try:
        with concurrent.futures.ThreadPoolExecutor(1, "fit") as pool:
            fitting = pool.submit(_trainer(config, board, executions, until, exchange).fit)
            shown = _watch(fitting, board, stop, show)
        error = fitting.exception()
        if error:
            raise board.failure() or error
        return shown
    finally:
        executions.close()
        board.close()
        if exchange:
            exchange.close()


def _watch(
    fitting: concurrent.futures.Future[ray.train.Result],
    board: Board,
    stop: threading.Event,
    show: Callable[[Progress], None],
) -> Progress | None:
    """Pass a stop on and progress back until the trainer has returned."""
    shown: Progress | None = None
    asked = False
    while True:
        done = fitting.done()  # before the last look at the board, so that nothing is missed
        progress = board.progress()
        if progress is not None and (shown is None or progress.at_ms != shown.at_ms):
            show(progress)
            shown = progress
        if done:
            return shown
        if stop.is_set() and not asked:
            board.stop()
            asked = True
        concurrent.futures.wait([fitting], timeout=WATCH_S)


def _check_cpus(config: Config) -> None:
    needed = (
        config.train.workers * config.train.worker_cpus + config.source.readers * config.source.reader_cpus
    )
    there = ray.cluster_resources().get("CPU", 0)
    if needed > there:
        raise NotEnoughCpus(needed, there)


def _trainer(
    config: Config, board: Board, executions: Executions, until: Until | None, exchange: Exchange | None
) -> TorchTrainer:
    return TorchTrainer(
        functools.partial(_run_rank, config, board, executions, until, exchange),
        # What hosts tell each other must not wait for a GPU.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if config.train.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=config.train.gpu,
            resources_per_worker={
                "CPU": config.train.worker_cpus,
                **({"GPU": 1} if config.train.gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=new_run(),
            storage_path=str(config.storage / "ray"),
            failure_config=FailureConfig(max_failures=config.train.max_restarts),
            callbacks=[_Judge(board)],
        ),
    )


def _run_rank(
    config: Config, board: Board, executions: Executions, until: Until | None, exchange: Exchange | None
) -> None:
    """What Ray Train runs in each worker."""
    logs.configure(config.logs)
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    if ranks.rank == 0:
        board.started()
    try:
        trainer = Trainer(config, ranks, board, until, get_device(), exchange)
    except SchemaChanged as error:
        board.fail(error)
        raise
    try:
        trainer.run(executions)
    except BAD_WEIGHTS as error:
        if ranks.rank == 0 and board.reverted(trainer.checkpoint_number) > config.train.max_reverts:
            board.fail(error)
        raise
    except LASTING as error:
        # A reader's error comes wrapped in Ray's, which is of both types.
        board.fail(error.cause if isinstance(error, RayTaskError) else error)
        raise


class _Judge(UserCallback):
    """Ends the job, in Ray Train's controller, where an error would only come again."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        failure = self._board.failure()
        if failure is not None:
            raise failure
