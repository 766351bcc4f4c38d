"""What was listed for whom, as impressions in a topic: behind the answers, and never in their way."""

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence

import kafka
import kafka.errors
import numpy as np
import numpy.typing as npt

from grstream.config import Config
from grstream.events import ActionEvent, Served
from grstream.kafka import (
    BrokerUnavailable,
    TopicMissing,
    close_producer,
    partition_count,
    producer,
    reaching,
)
from grstream.keys import Id, partition_key

logger = logging.getLogger(__name__)

HELD = 100_000  # impressions that wait for the log at most; what comes beyond is dropped
TELL_S = 10.0  # between lines of log about dropped ones
STOP_S = 0.2  # how late the thread may notice that it is to end


@dataclasses.dataclass(frozen=True)
class Listing:
    """n items that were answered to a request."""

    exposure_id: str  # item i has the exposure id `<this>/<i>`
    by: str
    version: int
    arm: str | None
    at_ms: int
    user: Id
    context: dict[str, Id]
    items: list[Id]  # (n,)
    scores: npt.NDArray[np.float32]  # (n,)
    item_features: Sequence[dict[str, Id]] = ()  # (n,), or none

    def impressions(self) -> Iterator[ActionEvent]:
        """One a listed item, in their order. Its fields have been validated when they came."""
        order = np.argsort(-self.scores, kind="stable")
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order))
        rows = zip(self.items, self.scores.tolist(), ranks.tolist(), strict=True)
        for i, (item, score, rank) in enumerate(rows):
            yield ActionEvent.model_construct(
                user_id=self.user,
                item_id=item,
                actions=[],
                timestamp_ms=self.at_ms,
                context=self.context,
                item_features=self.item_features[i] if self.item_features else {},
                exposure_id=f"{self.exposure_id}/{i}",
                served=Served(by=self.by, version=self.version, arm=self.arm, score=score, rank=rank),
            )


class ExposureLog:
    """Writes listings to the configured topic from a thread of its own.

    Where the log does not keep up or is away, listings are dropped and counted; what waits when the process
    is killed is lost.
    """

    def __init__(self, config: Config) -> None:
        assert config.serve.exposure_topic is not None
        self._config, self._topic = config.kafka, config.serve.exposure_topic
        self._waiting: queue.SimpleQueue[Listing] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over the numbers
        self._held = self._dropped = self._told = 0
        self._tell_at = 0.0
        self._stopping = threading.Event()
        self._producer: kafka.KafkaProducer | None = None
        self._thread = threading.Thread(target=self._run, name="exposure-log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Impressions that are not in the log, as far as is known."""
        with self._lock:
            return self._dropped

    def add(self, listing: Listing) -> None:
        """Have a listing written; returns at once."""
        with self._lock:
            full = self._held + len(listing.items) > HELD
            if not full:
                self._held += len(listing.items)
        if full:
            self._drop(len(listing.items), f"{HELD} wait already")
        else:
            self._waiting.put(listing)

    def close(self, timeout_s: float) -> None:
        """Write what waits, as far as the broker takes it in that time."""
        self._stopping.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                listing = self._waiting.get(timeout=STOP_S)
            except queue.Empty:
                if self._stopping.is_set():
                    break
                continue
            self._write(listing)
            with self._lock:
                self._held -= len(listing.items)
        if self._producer is not None:
            close_producer(self._producer, self._config.request_timeout_ms / 1000)

    def _write(self, listing: Listing) -> None:
        sent = 0
        try:
            with reaching(self._config):
                log = self._connected()
                key = partition_key(listing.user)
                for impression in listing.impressions():
                    log.send(self._topic, impression.to_json(), key=key).add_errback(self._lost)
                    sent += 1
        except (BrokerUnavailable, TopicMissing, kafka.errors.KafkaError) as error:
            self._drop(len(listing.items) - sent, str(error))

    def _connected(self) -> kafka.KafkaProducer:
        if self._producer is None:
            partition_count(self._config, self._topic)  # or a send would wait for a topic that is not there
            self._producer = producer(self._config)
        return self._producer

    def _lost(self, error: BaseException) -> None:
        self._drop(1, str(error))

    def _drop(self, count: int, why: str) -> None:
        with self._lock:
            self._dropped += count
            now = time.monotonic()
            if now < self._tell_at:
                return
            self._tell_at = now + TELL_S
            untold, self._told = self._dropped - self._told, self._dropped
        logger.warning("%d impressions are not in %s: %s", untold, self._topic, why)
