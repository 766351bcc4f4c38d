"""Sends events into the log at a chosen speed, and knows of each whether it arrived."""

import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from grstream.config import KafkaConfig
from grstream.events import ActionEvent
from grstream.kafka import DeliveryFailed, close_producer, partition_count, producer, reaching
from grstream.keys import partition_key

# kafka-python 3 bounds neither the number nor the bytes of records that wait for the broker.
IN_FLIGHT = 20_000
_REPORT_S = 0.1
_SPEED = re.compile(r"(?P<rate>[0-9]*\.?[0-9]+)(?:/s)?|x(?P<times>[0-9]*\.?[0-9]+)|max")


@dataclasses.dataclass(frozen=True)
class Speed:
    """Events a second, or so many times as fast as they happened; neither: as fast as the broker can."""

    events_per_s: float | None = None
    times: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Speed":
        """`500` or `500/s`, `x60`, `max`. Raises ValueError."""
        match = _SPEED.fullmatch(text)
        values = {name: float(value) for name, value in match.groupdict().items() if value} if match else {}
        if match is None or 0.0 in values.values():
            raise ValueError(f"a speed is events a second (500), times real time (x60) or max, not {text!r}")
        return cls(values.get("rate"), values.get("times"))

    def due_s(self, sent: int, passed_ms: int) -> float:
        """When an event is due, in seconds after the first, from which it is so many events and ms away."""
        if self.events_per_s is not None:
            return sent / self.events_per_s
        if self.times is not None:
            return passed_ms / 1000 / self.times
        return 0.0


class _Deliveries:
    """Counts what the broker acknowledged and what it did not, or not in time."""

    def __init__(self, patience_s: float) -> None:
        self.sent = 0
        self._patience_s = patience_s
        self._done = 0
        self._failed = 0
        self._error: BaseException | None = None
        self._moved = time.monotonic()  # when a record was last settled, or began to wait alone
        self._changed = threading.Condition()

    def watch(self, future: Any) -> None:
        with self._changed:
            if self.sent == self._done:
                self._moved = time.monotonic()
            self.sent += 1
        future.add_both(self._settle)  # called with metadata or with the exception

    def _settle(self, outcome: Any) -> None:
        with self._changed:
            self._done += 1
            self._moved = time.monotonic()
            if isinstance(outcome, BaseException):
                self._failed += 1
                self._error = self._error or outcome
            if self._done % 100 == 0 or self._done == self.sent:
                self._changed.notify()

    def wait(self, in_flight: int) -> None:
        """Until no more than so many records wait for the broker. Raises DeliveryFailed."""
        with self._changed:
            self._check()
            while self.sent - self._done > in_flight:
                self._changed.wait(_REPORT_S)
                self._check()

    def _check(self) -> None:
        waiting, waited_s = self.sent - self._done, time.monotonic() - self._moved
        if self._failed:
            lost, why = self._failed, str(self._error)
        elif waiting and waited_s > self._patience_s:
            lost, why = waiting, f"no word from the broker for {waited_s:.1f} s"
        else:
            return
        raise DeliveryFailed(
            f"{lost} of {self.sent} events were not acknowledged: {why}. When the broker is back, replay "
            "again: events that have an id and did arrive are dropped as duplicates"
        )


def replay(
    events: Iterable[ActionEvent],
    config: KafkaConfig,
    speed: Speed,
    progress: Callable[[int], None] = lambda sent: None,
    stop: threading.Event | None = None,
    live: bool = False,
) -> int:
    """Send the events in their order until they end or `stop` is set; how many the broker acknowledged.

    `progress` hears now and then how many have been sent. `live` events happen as they are sent: they get the
    clock's time. Raises TopicMissing, BrokerUnavailable, and DeliveryFailed if the broker did not acknowledge
    an event.
    """
    stop = stop or threading.Event()
    partition_count(config)  # a missing topic is told at once, not after a time-out
    patience_s = 2 * config.request_timeout_ms / 1000
    deliveries = _Deliveries(patience_s)
    began = reported = time.monotonic()
    first_ms: int | None = None
    sender = producer(config)
    try:
        for event in events:
            if first_ms is None:
                first_ms = event.timestamp_ms
            due = began + speed.due_s(deliveries.sent, event.timestamp_ms - first_ms)
            while not stop.is_set() and (ahead := due - time.monotonic()) > 0:
                progress(deliveries.sent)
                deliveries.wait(IN_FLIGHT)
                stop.wait(min(ahead, _REPORT_S))
            if stop.is_set():
                break
            if live:
                event = event.model_copy(update={"timestamp_ms": time.time_ns() // 1_000_000})
            with reaching(config):
                future = sender.send(config.topic, event.to_json(), key=partition_key(event.user_id))
            deliveries.watch(future)
            deliveries.wait(IN_FLIGHT)
            if time.monotonic() - reported > _REPORT_S:
                progress(deliveries.sent)
                reported = time.monotonic()
        deliveries.wait(0)
    finally:
        close_producer(sender, 1)  # nothing is under way, or it has failed
    progress(deliveries.sent)
    return deliveries.sent
