"""Hand-made micro-batches for tests of what comes after the histories."""

import numpy as np

from grstream.keys import Namespace, keys_of_ints
from grstream.microbatch import MicroBatch, Role

Event = tuple[int, int, int]  # item id, action bits, time in ms


def micro_batch(
    sequences: list[tuple[int, list[Event], list[Event]]], first_offset: int = 0, features: int = 0
) -> MicroBatch:
    """Of (user id, history, new events) each; offsets count up from `first_offset`."""
    events = [e for _, old, new in sequences for e in (*old, *new)]
    count = sum(len(new) for _, _, new in sequences)
    roles = [r for _, old, new in sequences for r in [Role.CONTEXT] * len(old) + [Role.NEW] * len(new)]
    columns = np.array(events, np.int64).reshape(-1, 3)
    return MicroBatch(
        users=keys_of_ints(Namespace.USER, np.array([u for u, _, _ in sequences], np.int64)),
        lengths=np.array([len(old) + len(new) for _, old, new in sequences], np.int32),
        items=keys_of_ints(Namespace.ITEM, columns[:, 0]),
        actions=columns[:, 1].astype(np.int32),
        times=columns[:, 2],
        features=np.zeros((len(events), features), np.int64),
        roles=np.array(roles, np.uint8),
        labels=columns[np.array(roles, np.uint8) != Role.CONTEXT, 1].astype(np.int32),
        partitions=np.zeros(count, np.int32),
        offsets=np.arange(first_offset, first_offset + count),
        ranges=(),
        item_names={},
        newest_event_ms=int(columns[:, 2].max(initial=0)),
        read_ms=0,
    )


def random_batches(seed: int, count: int, users: int = 5, items: int = 20) -> list[MicroBatch]:
    """A small stream: histories grow from batch to batch, and liking follows the item's parity."""
    random = np.random.default_rng(seed)
    histories: dict[int, list[Event]] = {u: [] for u in range(users)}
    out, offset, now = [], 0, 1_000_000
    for _ in range(count):
        fresh: dict[int, list[Event]] = {}
        for _ in range(int(random.integers(1, 8))):
            user, item = int(random.integers(users)), int(random.integers(items))
            now += int(random.integers(0, 5_000))
            fresh.setdefault(user, []).append((item, 1 | 2 * (item % 2), now))
        out.append(micro_batch([(u, histories[u], new) for u, new in fresh.items()], offset))
        for user, new in fresh.items():
            histories[user] = [*histories[user], *new]
            offset += len(new)
    return out
