import numpy as np

from grstream.histories import History
from serve.gateway import UserHistory
from serve.last_seen import LastSeen


def seen(events: int, position: int = 0) -> UserHistory:
    columns = (np.zeros(events, t) for t in (np.int64, np.int32, np.int64))
    return UserHistory(History(*columns, np.zeros((events, 1), np.int64), 0, events), 0, position)


def test_the_least_recently_seen_go_first_by_count_and_by_bytes() -> None:
    held = LastSeen(2, 1 << 20, 10)
    for user in (1, 2):
        held.put(user, seen(1))
    held.put(1, seen(2))
    held.put(3, seen(1))
    assert held.get(2) is None
    assert held.get(1) is not None
    assert len(held) == 2
    held.put(4, seen(100_000))
    assert (len(held), held.nbytes) == (0, 0)
    held.put("ann", seen(3))
    held.drop("ann")
    assert (held.get("ann"), held.nbytes) == (None, 0)


def test_what_was_seen_long_ago_is_gone() -> None:
    now = [0.0]
    held = LastSeen(9, 1 << 20, 10, lambda: now[0])
    held.put(1, seen(1))
    now[0] = 9
    held.put(2, seen(1))
    assert held.get(1) is not None
    now[0] = 11
    assert held.get(1) is None
    assert len(held) == 1
