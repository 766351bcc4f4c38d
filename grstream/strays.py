"""Notices users whose events come by several partitions.

Histories are kept per partition, so such a user has a history in each, none of them whole. It happens where
producers hash keys in different ways (librdkafka's default is not the Java client's), keys are missing, or
partitions were added to a topic in use.
"""

import logging

import numpy as np

from grstream.microbatch import MicroBatch, Role

logger = logging.getLogger(__name__)

ONE_IN = 16  # users looked at, by their key, so that every reader of the stream looks at the same ones
REMEMBERED = 1_000_000  # users at most: some 100 MB


class StrayUsers:
    """Looks at one user in 16 of all micro-batches that pass."""

    def __init__(self) -> None:
        self._partitions: dict[int, int] = {}  # user -> the partition it was first seen in
        self._strays: set[int] = set()

    def __len__(self) -> int:
        """Users looked at that were seen in more than one partition."""
        return len(self._strays)

    def look(self, batch: MicroBatch) -> None:
        new = batch.roles != Role.CONTEXT
        users = np.repeat(batch.users, batch.lengths)[new]  # (N,)
        seen = users % ONE_IN == 0
        before = len(self._strays)
        for user, partition in zip(users[seen].tolist(), batch.partitions[seen].tolist(), strict=True):
            if len(self._partitions) < REMEMBERED:
                self._partitions.setdefault(user, partition)
            if self._partitions.get(user, partition) != partition:
                self._strays.add(user)
        if before.bit_length() != len(self._strays).bit_length():
            logger.warning(
                "%d of %d users looked at were seen in more than one partition, and none of their histories "
                "is whole; give producers one partitioner (murmur2 of the user id) and every record a key",
                *(len(self._strays), len(self._partitions)),
            )
