"""Idempotent producers: which batches of a producer a partition already holds.

The state is a function of the partition's batches, so it is rebuilt from the log at start and a producer that
retries across a restart is deduplicated as if there had been none.
"""

import collections
from typing import NamedTuple

from kafka import errors

from grstream.broker.batch import BatchHeader
from grstream.broker.errors import Refused

REMEMBERED_BATCHES = 5  # a producer has at most this many requests in flight (Kafka's own limit)


class _Stored(NamedTuple):
    first: int
    last: int
    base_offset: int


class Sequences:
    """The newest batches of each producer in one partition."""

    def __init__(self) -> None:
        self._epochs: dict[int, int] = {}
        self._stored: dict[int, collections.deque[_Stored]] = {}

    def duplicate(self, header: BatchHeader) -> int | None:
        """The offset at which this very batch is already stored; None if it is the producer's next one.

        Refused if it is neither: a gap (records would be missing) or a fenced epoch. A producer that this
        partition has never seen may begin anywhere, as in Kafka.
        """
        epoch = self._epochs.get(header.producer_id)
        if epoch is None:
            return None
        if header.producer_epoch < epoch:
            raise Refused(
                errors.InvalidProducerEpochError,
                f"epoch {header.producer_epoch} of a producer at {epoch}",
            )
        if header.producer_epoch > epoch:
            expected = 0
        else:
            stored = self._stored[header.producer_id]
            for batch in stored:
                if (batch.first, batch.last) == (header.base_sequence, header.last_sequence):
                    return batch.base_offset
            expected = (stored[-1].last + 1) & 0x7FFFFFFF
        if header.base_sequence != expected:
            raise Refused(
                errors.OutOfOrderSequenceNumberError,
                f"producer {header.producer_id} sent sequence {header.base_sequence}, expected {expected}",
            )
        return None

    def record(self, header: BatchHeader, base_offset: int) -> None:
        """Remember a batch that is stored at `base_offset`."""
        producer = header.producer_id
        if self._epochs.get(producer) != header.producer_epoch:
            self._epochs[producer] = header.producer_epoch
            self._stored[producer] = collections.deque(maxlen=REMEMBERED_BATCHES)
        self._stored[producer].append(_Stored(header.base_sequence, header.last_sequence, base_offset))
