"""One pass over a data set without a log and without Ray: the stream's own parts, in this process.

A reader's decoder and histories make micro-batches of the events, in their order, and a model predicts each
and then learns from it. So what a model is worth on a stream can be compared seed by seed: nothing depends on
clocks, and a pass is the same whenever it is made.
"""

import collections
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from grstream.config import Config
from grstream.events import ActionEvent, EventDecoder, InvalidEvent
from grstream.histories import RollingHistories
from grstream.learner import Learner
from grstream.metrics import Predictions
from grstream.microbatch import MicroBatch


def micro_batches(events: Iterable[ActionEvent], config: Config) -> Iterator[MicroBatch]:
    """The events as one partition's micro-batches of `source.flush_events` each; offsets count them.

    Raises InvalidEvent where one is not what the configuration allows.
    """
    decoder = EventDecoder(config.events)
    histories = RollingHistories(config.histories, features=len(config.events.features))
    offset = 0
    for values in _chunks((event.to_json() for event in events), config.source.flush_events):
        offsets = np.arange(offset, offset + len(values))
        decoded = decoder.decode(0, offsets, values, np.full(len(values), -1))
        if decoded.rejected:
            first = decoded.rejected[0]
            raise InvalidEvent(f"event {first.offset}: {first.reason}", first.field)
        histories.append(decoded.batch)
        offset += len(values)
        yield histories.pack()


def learned(
    batches: Iterable[MicroBatch], learner: Learner, show: Callable[[int], None] = lambda events: None
) -> Predictions:
    """What was said of every event before it was learned from, in the order of the events."""
    said, events = [], 0
    for batch in batches:
        said.append(learner.step(batch).predictions)
        events += batch.new_events
        show(events)
    return ordered(said)


def stale(
    batches: Iterable[MicroBatch],
    learner: Learner,
    every: int,
    ages: Sequence[int],
    show: Callable[[int], None] = lambda events: None,
) -> dict[int, Predictions]:
    """What weights of several ages would have said of every event, as a server with those would.

    A version is made every `every` events; of age 0 are the weights that have learned from all that came
    before, of age a those of the a-th version back, counted from the newest that was there: an age of 1 is
    what serving has at best. Histories are fresh at every age. Until there are that many, the first one is
    used: weights that have learned from nothing.
    """
    said: dict[int, list[Predictions]] = {age: [] for age in ages}
    versions = collections.deque([copy.deepcopy(learner)], max(1, *ages))
    events, due = 0, every
    for batch in batches:
        for age in ages:
            if age:
                said[age].append(versions[-min(age, len(versions))].predict(batch))
        report = learner.step(batch)
        if 0 in said:
            said[0].append(report.predictions)
        events += batch.new_events
        if events >= due:
            versions.append(copy.deepcopy(learner))
            due += every
        show(events)
    return {age: ordered(parts) for age, parts in said.items()}


def ordered(parts: list[Predictions]) -> Predictions:
    """One partition's predictions by offset."""
    together = Predictions.concat(parts)
    order = np.argsort(together.offsets)
    return Predictions(**{field: column[order] for field, column in vars(together).items()})


def _chunks(values: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    for value in values:
        chunk.append(value)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
