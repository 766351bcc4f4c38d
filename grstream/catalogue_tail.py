"""`CatalogueTail`: follows the topic of items into a `Catalogue`, for serving.

It reads all partitions from the log's start, reads on through a broker that goes away and comes back, and
takes on partitions that the topic gets. Records that are no items are counted and logged; what a server
reads, another server reads too, so it sends no dead letters.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable

import kafka

from grstream.catalogue import Catalogue, CatalogueFold, ItemDecoder
from grstream.config import Config
from grstream.kafka import consumer, partition_count, reaching
from grstream.tail import POLL_MS, PROBE_S, until_stopped

logger = logging.getLogger(__name__)

VIEW_EVERY_S = 0.2  # at the soonest: a change of a known item copies the arrays once for each catalogue given
LOGGED = 20  # records that are no items, with reasons; beyond, they are counted alone


@dataclasses.dataclass(frozen=True)
class CatalogueStatus:
    """Where a catalogue's tail stands."""

    connected: bool
    caught_up: bool  # was at the end of the topic at least once
    positions: dict[int, int]  # partition -> next offset to be read
    lag: int | None  # offsets between these and the end, as of the last probe; None until it was reached
    rejected: int  # records that are no items
    revision: int  # of the newest catalogue that was given out
    reason: str | None  # why it is not connected


class CatalogueTail:
    """A thread that gives each new catalogue to a listener, the first once it has caught up. Thread-safe.

    The listener is called in that thread, which waits for it, and must not raise.
    """

    @classmethod
    def of(cls, config: Config, listener: Callable[[Catalogue], None]) -> "CatalogueTail | None":
        """None where no topic of items is configured."""
        topic = config.kafka.items_topic
        return None if topic is None else cls(config, topic, listener)

    def __init__(
        self,
        config: Config,
        topic: str,
        listener: Callable[[Catalogue], None],
        view_every_s: float = VIEW_EVERY_S,
    ) -> None:
        self._config, self._topic, self._listener = config.kafka, topic, listener
        self._view_every_s = view_every_s
        self._decoder = ItemDecoder(config.events)
        self._features = len(config.events.item_features)
        self._fold = CatalogueFold(self._features)
        self._lock = threading.Lock()  # over the state below, which others ask for
        self._positions: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._connected = self._caught_up = False
        self._rejected, self._reason = 0, "the log has not been reached yet"
        self._given: int | None = None  # revision of the newest catalogue that was given out
        self._given_at = float("-inf")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="catalogue-tail", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def status(self) -> CatalogueStatus:
        with self._lock:
            lag = sum(max(0, end - self._positions[p]) for p, end in self._ends.items())
            return CatalogueStatus(
                connected=self._connected,
                caught_up=self._caught_up,
                positions=dict(self._positions),
                lag=lag if self._ends else None,
                rejected=self._rejected,
                revision=self._given or 0,
                reason=None if self._connected else self._reason,
            )

    # -- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        def away(reason: str) -> None:
            with self._lock:
                self._connected, self._reason = False, reason

        until_stopped(self._stopping, "items do", self._follow, away)

    def _follow(self, reached: Callable[[], None]) -> None:
        """Fold records in until told to stop, or there are more partitions. Raises what the client raises."""
        count = partition_count(self._config, self._topic)
        with contextlib.closing(consumer(self._config)) as log, reaching(self._config):
            assigned = [kafka.TopicPartition(self._topic, p) for p in range(count)]
            log.assign(assigned)
            begins, ends = log.beginning_offsets(assigned), log.end_offsets(assigned)
            self._resume(
                {tp.partition: begin for tp, begin in begins.items()},
                {tp.partition: end for tp, end in ends.items()},
            )
            for tp in assigned:
                log.seek(tp, self._positions[tp.partition])
            reached()
            probed = time.monotonic()
            while not self._stopping.is_set():
                if len(log.partitions_for_topic(self._topic) or ()) > count:
                    return
                fetched = log.poll(timeout_ms=POLL_MS)
                for tp in assigned:
                    self._take(tp.partition, fetched.get(tp, []), log.position(tp))
                if time.monotonic() - probed > PROBE_S:
                    probed = time.monotonic()
                    ends = log.end_offsets(assigned)
                    with self._lock:
                        self._ends = {tp.partition: end for tp, end in ends.items()}
                self._give()

    def _resume(self, begins: dict[int, int], ends: dict[int, int]) -> None:
        """Where to read on within the log as it is now."""
        with self._lock:
            if any(position > ends.get(p, -1) for p, position in self._positions.items()):
                logger.error("%s ends before what was read of it: it is another log, read anew", self._topic)
                self._fold = CatalogueFold(self._features, self._fold.revision + 1)
                self._positions, self._caught_up = {}, False
            for p, begin in begins.items():
                position = self._positions.get(p, begin)
                if position < begin:
                    logger.error(
                        "%d offsets of %s, partition %d, are lost: it begins at %d; a topic of items is "
                        "compacted, not cut by age",
                        *(begin - position, self._topic, p, begin),
                    )
                self._positions[p] = max(position, begin)
            self._ends, self._connected = ends, True

    def _take(self, partition: int, records: list, position: int) -> None:
        if records:
            batch, rejected = self._decoder.decode(
                partition,
                [r.offset for r in records],
                [r.key for r in records],
                [r.value for r in records],
                [r.timestamp for r in records],
            )
            self._fold.take(batch)
            for r in rejected[: max(0, LOGGED - self._rejected)]:
                logger.warning(
                    "offset %d of %s, partition %d, is no item: %s: %s",
                    *(r.offset, self._topic, partition, r.field, r.reason),
                )
        with self._lock:
            self._rejected += len(rejected) if records else 0
            self._positions[partition] = max(self._positions[partition], position)

    def _give(self) -> None:
        """Give a new catalogue to the listener, if there is one and it is time."""
        with self._lock:
            if not self._caught_up:
                self._caught_up = all(self._positions[p] >= end for p, end in self._ends.items())
                if not self._caught_up:
                    return
        revision = self._fold.revision
        if revision == self._given or time.monotonic() - self._given_at < self._view_every_s:
            return
        self._listener(self._fold.catalogue())
        self._given_at = time.monotonic()
        with self._lock:
            self._given = revision
