"""One rank of the training loop: micro-batches in, weights versions and checkpoints out.

The ranks move in step. At every turn each says whether it has a micro-batch and which offsets that settles;
rank 0 adds whether it is time to checkpoint, publish or stop. All know all of it, so every rank holds the
whole ledger, an idle rank joins a step with an empty batch, and all leave together.
"""

import concurrent.futures
import ctypes
import dataclasses
import logging
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import pyarrow as pa
import torch

from grstream.board import Board, Progress
from grstream.checkpoints import Checkpoint, CheckpointStore, Record
from grstream.config import Config
from grstream.gate import Diverged, EntropyGate
from grstream.journal import Journal, Mark, new_run
from grstream.learner import Learner, LearnerState, NonFiniteLoss, StepReport
from grstream.ledger import Disposition, Ledger, OffsetRange
from grstream.microbatch import MicroBatch
from grstream.monitor import Monitor
from grstream.predictions import PredictionLog
from grstream.publisher import Exchanged, Publisher
from grstream.ranks import Ranks
from grstream.source import ReadersNotStarted, Until
from grstream.strays import StrayUsers
from grstream.weights import NonFiniteWeights

logger = logging.getLogger(__name__)

# An endless read task that has not reported by then has no slot and never will. What a killed driver had
# reserved Ray holds for another 180 s, and readers of the next one may have to wait for that.
READERS_START_S = 240
READERS_WARN_S = 30
ALONE_WAIT_S = 0.2  # how long a turn waits for a block: bounds how late a clock or a stop is noticed
TOGETHER_WAIT_S = 0.02  # with several ranks, those that have work wait for those that have none
# What going back to the newest checkpoint may cure.
BAD_WEIGHTS = (Diverged, NonFiniteLoss, NonFiniteWeights)
LISTED_RANGES = 4096  # of a checkpoint's ledger: beyond, what lies before the watermarks is counted alone
PROGRESS_S = 2.0  # seconds between reports to the driver; the figures cost some 10 ms


class Vote(NamedTuple):
    """What one rank brings to a turn."""

    events: int = 0
    ranges: tuple[OffsetRange, ...] = ()
    newest_event_ms: int = 0
    read_ms: int = 0  # wall clock when the oldest of the events was read
    greetings: int = 0  # readers that reported
    ended: bool = False
    stop: bool = False  # rank 0 decides these three
    checkpoint: bool = False
    publish: bool = False


class Executions(Protocol):
    """`grstream.executions.Executions`, or what stands in for it."""

    def renew(self, position: Ledger, ranks: int) -> Sequence[Iterable[pa.Table]]: ...


class Feed:
    """The blocks of one Ray Data execution, drawn by a thread, so that a turn need not wait for one."""

    AHEAD = 2  # blocks drawn before they are asked for

    def __init__(self, split: Iterable[pa.Table]) -> None:
        self._blocks: queue.Queue[MicroBatch] = queue.Queue(self.AHEAD)
        self._closed = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "feed")
        self._drawing = self._pool.submit(self._draw, split)

    def next(self, timeout_s: float) -> MicroBatch | None:
        """The next micro-batch, or None if none came in time. Raises what stopped the execution, if so."""
        try:
            return self._blocks.get(timeout=timeout_s)
        except queue.Empty:
            if self._drawing.done():
                self._drawing.result()
            return None

    def ended(self) -> bool:
        return self._drawing.done() and self._blocks.empty()

    def close(self) -> None:
        """Draw no more. A draw that is waiting for a block ends with the execution or the process."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _draw(self, split: Iterable[pa.Table]) -> None:
        for block in split:
            batch = MicroBatch.from_block(block)
            while not self._closed.is_set():
                try:
                    self._blocks.put(batch, timeout=1)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set():
                return


def _trim_heap() -> None:
    """Give back what is free in the heap, where the C library is glibc, which does so of its top alone.

    Steps are of different sizes, and leave it full of holes, more of them with every minute.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Trainer:
    """A rank. Begins where the newest checkpoint ends."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        board: Board,
        until: Until | None,
        device: torch.device | str = "cpu",
        exchange: Exchanged | None = None,
    ) -> None:
        self._config, self._ranks, self._board, self._until = config, ranks, board, until
        self._learner = Learner(config, ranks, device)
        self._ledger = Ledger()
        self._events = 0
        self._newest_event_ms = 0
        self._sparsity: list[float] = []  # of each step since the last report
        self._waited_s = 0.0  # for input, since the last step
        self._strays = StrayUsers()
        self._store = CheckpointStore(config.storage / "checkpoints")
        self._publisher = Publisher(config, self._learner, exchange)
        self._saving: concurrent.futures.Future[Checkpoint | None] | None = None
        self._saver = concurrent.futures.ThreadPoolExecutor(1, "saver")
        self._gate = EntropyGate(len(config.events.actions), config.train)
        self.checkpoint_number = 0
        self._migrated: list[str] = []  # of the checkpoint, to fit a schema that has grown
        resumed = self._resume()
        self._run = ranks.gather(new_run())[0]
        self._journal = self._open_journal(resumed)
        self._predictions = self._open_predictions()
        self._monitor: Monitor | None = None
        if self._journal:
            self._monitor = Monitor(config, self._run, self._settled(), self._publisher.version)
        self._stopping = False
        self._saved_settled = self._settled()
        self._next_checkpoint = time.monotonic() + config.train.checkpoint_every_s
        self._next_publish = time.monotonic()
        self._next_progress = time.monotonic()

    def run(self, executions: Executions) -> None:
        """Train until asked to stop or the bound is reached; then checkpoint, publish and return."""
        try:
            self._train(executions)
        finally:
            if self._monitor:
                self._monitor.close()

    def _train(self, executions: Executions) -> None:
        idle = False  # whether the last execution settled nothing
        while not (self._stopping or self._bound_reached(idle)):
            settled = self._settled()
            splits = executions.renew(self._ledger.position(), self._ranks.world) if self._leads else []
            feed = Feed(self._ranks.gather(splits)[0][self._ranks.rank])
            if self._monitor:
                self._monitor.execution()
            try:
                self._consume(feed)
            finally:
                feed.close()
            _trim_heap()
            idle = settled == self._settled()
        if self._gate.open:
            self._checkpoint(wait=True)
            self._publish(wait=True)
        else:
            logger.warning(
                "the weights are judged bad and not saved: training will go on from checkpoint %d",
                self.checkpoint_number,
            )
        self._report(last=True)
        self._publisher.close()
        self._saver.shutdown()
        if self._journal:
            self._journal.close()

    # -- a turn -----------------------------------------------------------------------------------------

    def _consume(self, feed: Feed) -> None:
        """The turns of one execution, until it ends or the trainer is stopped."""
        wait_s = ALONE_WAIT_S if self._ranks.world == 1 else TOGETHER_WAIT_S
        greeted, began, warned = 0, time.monotonic(), False
        for batch, waited_s in self._turns(feed, wait_s):
            self._waited_s += waited_s
            if self._monitor:
                self._monitor.waited(waited_s)
            votes = self._ranks.gather(self._vote(batch, feed))
            greeted += sum(vote.greetings for vote in votes)
            if greeted < self._config.source.readers:
                waited_s = time.monotonic() - began
                if waited_s > READERS_START_S:
                    raise ReadersNotStarted(self._config.source.readers, greeted, READERS_START_S)
                if waited_s > READERS_WARN_S and self._leads and not warned:
                    logger.warning("%d of %d readers run yet", greeted, self._config.source.readers)
                    warned = True
            self._settle(batch, votes)
            orders = votes[0]
            if orders.checkpoint:
                self._checkpoint(wait=False)
            if orders.publish:
                self._publish(wait=False)
            if self._leads and time.monotonic() >= self._next_progress:
                self._report()
            elif not self._leads:
                self._saving_goes_on()
            self._stopping = orders.stop
            if self._stopping or all(vote.ended for vote in votes):
                return

    @staticmethod
    def _turns(feed: Feed, wait_s: float) -> Iterator[tuple[MicroBatch | None, float]]:
        """A micro-batch, or None, and how long it took to come."""
        while True:
            began = time.monotonic()
            batch = feed.next(wait_s)
            yield batch, time.monotonic() - began

    def _vote(self, batch: MicroBatch | None, feed: Feed) -> Vote:
        vote = Vote(ended=batch is None and feed.ended())
        if batch is not None:
            vote = vote._replace(
                events=batch.new_events,
                ranges=batch.ranges,
                newest_event_ms=batch.newest_event_ms,
                read_ms=batch.read_ms,
                greetings=int(not batch.ranges),  # a reader's first block is empty, and no other is
            )
        if not self._leads:
            return vote
        now = time.monotonic()
        return vote._replace(
            stop=self._board.stop_asked(),
            checkpoint=now >= self._next_checkpoint and self._gate.open and not self._saving_goes_on(),
            publish=now >= self._next_publish and self._gate.open,
        )

    def _settle(self, batch: MicroBatch | None, votes: list[Vote]) -> None:
        """Learn from the ranks' batches and record every offset that they settle."""
        ranges = [r for vote in votes for r in vote.ranges]
        if not ranges:
            return
        if batch is not None:
            self._strays.look(batch)
        events = sum(vote.events for vote in votes)
        report: StepReport | None = None
        began = time.monotonic()
        if events:
            features = len(self._config.events.features)
            report = self._learner.step(MicroBatch.empty(features) if batch is None else batch)
        for r in ranges:
            self._ledger.add(r)
        self._events += events
        self._newest_event_ms = max(self._newest_event_ms, *(vote.newest_event_ms for vote in votes))
        if report:
            self._sparsity.append(report.sparsity)
        if self._predictions and report:
            self._predictions.append(report.predictions)
        if self._monitor:
            read = [(vote.ranges[0].partition, vote.read_ms) for vote in votes if vote.events]
            self._monitor.settled(report, time.monotonic() - began, read)
        if self._journal:
            figures = {}
            if report:
                figures = {
                    "step": report.step,
                    "ranking_loss": report.ranking_loss,
                    "retrieval_loss": report.retrieval_loss,
                    "tokens": report.tokens,
                    "sparsity": report.sparsity,
                    "waited_ms": round(1000 * self._waited_s, 1),
                }
                self._waited_s = 0.0
            self._journal.settled(ranges, events=events, **figures)
        if report:
            self._judge(report)

    def _judge(self, report: StepReport) -> None:
        """Open or close the gate. Raises Diverged where it stays closed."""
        was_open = self._gate.open
        try:
            self._gate.update(report.predictions)
        finally:
            if self._gate.open != was_open:
                logger.warning(
                    "step %d: %s",
                    report.step,
                    "predictions are as good as before: weights are published and saved again"
                    if self._gate.open
                    else "predictions are much worse than before: weights are neither published nor saved",
                )
                if self._journal:
                    self._journal.note(
                        {"gate": "open" if self._gate.open else "closed", "at_step": report.step}
                    )

    # -- what a trainer leaves behind ---------------------------------------------------------------------

    @property
    def _leads(self) -> bool:
        return self._ranks.rank == 0

    def _bound_reached(self, idle: bool) -> bool:
        reached = False
        if self._leads and self._until is not None:
            reached = self._until.reached(self._config, self._ledger)
            # What is left then waits for windows of exposures that end after the bound.
            reached |= idle and self._config.events.exposures is not None and self._until.in_log(self._config)
        return self._ranks.gather(reached)[0]

    def _resume(self) -> Mark | None:
        """Load the newest checkpoint, the same on every rank, and take the number after it."""
        taken = max(self._store.numbers(), default=0)
        found = self._store.newest() if self._leads else None
        number, taken = self._ranks.gather((found.record.number if found else 0, taken))[0]
        self._next_number = taken + 1
        if not number:
            return None
        found = found or self._store.load(number)
        self._migrated = self._learner.load(found.directory)
        self._ledger = found.ledger
        self._events, self._newest_event_ms = found.record.events, found.record.newest_event_ms
        self.checkpoint_number = number
        recent = self._learner.metrics.recent()
        if recent is not None:
            self._gate.seed(recent)
        logger.info(
            "resumed from checkpoint %d: step %d, %d events", number, found.record.step, found.record.events
        )
        for line in self._migrated if self._leads else []:
            logger.warning("checkpoint %d is migrated: %s", number, line)
        return Mark(found.record.run, found.record.entries)

    def _open_journal(self, resumed: Mark | None) -> Journal | None:
        if not self._leads:
            return None
        journal = Journal(self._config.storage / "metrics", self._run, resumed)
        if self._migrated:
            journal.note({"migrated": self._migrated})
        return journal

    def _open_predictions(self) -> PredictionLog | None:
        if not (self._journal and self._config.train.log_predictions):
            return None
        return PredictionLog(
            self._config.storage / "predictions",
            self._run,
            self._config.train.predictions_kept_s,
        )

    def _settled(self) -> dict[str, int]:
        return {d.name.lower(): self._ledger.count(d) for d in Disposition}

    def _saving_goes_on(self) -> bool:
        """Whether the last checkpoint is being written still. Raises what went wrong with it."""
        if self._saving and self._saving.done():
            checkpoint, self._saving = self._saving.result(), None
            if checkpoint is not None:
                saved = checkpoint.record
                self.checkpoint_number = saved.number
                logger.info("checkpoint %d: step %d, %d events", saved.number, saved.step, saved.events)
        return self._saving is not None

    def _checkpoint(self, wait: bool) -> None:
        """Save, if anything was settled since the last time; without `wait`, beside the next steps.

        All ranks call it together, and each writes its own part. The steps stand still for no more than a
        copy.
        """
        self._next_checkpoint = time.monotonic() + self._config.train.checkpoint_every_s
        if wait and self._saving:
            concurrent.futures.wait([self._saving])
            self._saving_goes_on()
        settled = self._settled()
        if settled == self._saved_settled:
            return
        if self._predictions:
            self._predictions.flush()
        began = time.monotonic()
        state = self._learner.state()
        if self._monitor:
            self._monitor.stalled(time.monotonic() - began)
        if self._journal:
            record = Record(
                number=self._next_number,
                run=self._run,
                entries=self._journal.mark.entries,
                step=self._learner.steps,
                events=self._events,
                newest_event_ms=self._newest_event_ms,
                created_ms=0,
            )
            self._ledger.settle(LISTED_RANGES)
            self._saving = self._saver.submit(self._save, self._journal, record, self._ledger.copy(), state)
        else:
            self._saving = self._saver.submit(
                self._store.write_part, self._next_number, self._run, self._ranks.rank, state.save
            )
        self._next_number += 1
        self._saved_settled = settled
        if wait and self._saving:
            concurrent.futures.wait([self._saving])
            self._saving_goes_on()

    def _save(self, journal: Journal, record: Record, ledger: Ledger, state: LearnerState) -> Checkpoint:
        """Write a checkpoint, in a thread of its own."""
        began = time.monotonic()
        journal.sync()
        saved = self._store.write(record, ledger, state.save, self._ranks.world)
        if self._monitor:
            self._monitor.saved(time.monotonic() - began)
        self._store.prune(self._config.train.keep_checkpoints)
        return saved

    def _publish(self, wait: bool) -> None:
        """Publish a version if the weights have changed; without `wait`, beside the next steps.

        All ranks call it together: the version holds the embedding rows of all.
        """
        self._next_publish = time.monotonic() + self._config.train.publish_every_s
        positions = {p: self._ledger.consumed(p) for p in self._ledger.partitions()}
        self._publisher.publish(positions, self._newest_event_ms, wait)

    def _report(self, last: bool = False) -> None:
        """Tell the driver, the journal and the monitor how it goes."""
        self._next_progress = time.monotonic() + PROGRESS_S
        self._saving_goes_on()
        if not self._journal:
            return
        self._publisher.settle()
        positions = {p: self._ledger.watermark(p) or 0 for p in self._ledger.partitions()}
        figures = self._learner.metrics.figures()
        if self._config.train.stochastic_length is not None and self._sparsity:
            figures["sparsity"] = sum(self._sparsity) / len(self._sparsity)
        self._sparsity.clear()
        progress = Progress(
            at_ms=time.time_ns() // 1_000_000,
            step=self._learner.steps,
            events=self._events,
            settled=self._settled(),
            positions=positions,
            newest_event_ms=self._newest_event_ms,
            strays=len(self._strays),
            figures={k: float(v) for k, v in figures.items() if math.isfinite(v)},
            version=self._publisher.version,
            checkpoint=self.checkpoint_number,
        )
        self._board.report(progress)
        self._journal.note({"progress": dataclasses.asdict(progress)})
        if self._monitor:
            self._monitor.report(
                progress,
                self._learner,
                self._journal.mark,
                self._gate.open,
                last,
                self._publisher.failures,
            )
