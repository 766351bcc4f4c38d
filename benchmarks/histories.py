"""RollingHistories: memory per event and user, appends and packs per second, of one core.

    python -m benchmarks.histories [--quick]

Memory: users x 64 events each, arriving interleaved; `bytes_per_event` is what is left of the allocated bytes
after 200 a user, and `resident_*` the same of the growth of the process. Speed: Zipf users, window 256;
seconds of the process on its core, so that what else runs on the machine matters little.
"""

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator

import numpy as np

from grstream.config import ExposuresConfig, HistoriesConfig
from grstream.events import EventBatch
from grstream.histories import RollingHistories
from grstream.keys import Namespace, keys_of_ints

EVENTS_PER_USER = 64
BYTES_PER_USER = 200
WINDOW = 256
USERS = 100_000
FEATURES = 0


def batches(users: np.ndarray, size: int, *, ids: bool, late: float = 0.0) -> Iterator[EventBatch]:
    """Events of these users, a millisecond apart; a share of them 5 s late."""
    random = np.random.default_rng(1)
    keys = keys_of_ints(Namespace.USER, users)
    for start in range(0, len(users), size):
        offsets = np.arange(start, min(start + size, len(users)))
        yield EventBatch(
            partition=0,
            offsets=offsets,
            users=keys[start : start + size],
            items=keys_of_ints(Namespace.ITEM, random.integers(0, 100_000, len(offsets))),
            actions=random.integers(1, 8, len(offsets), np.int32),
            times=1_700_000_000_000 + offsets - 5000 * (random.random(len(offsets)) < late),
            features=np.zeros((len(offsets), FEATURES), np.int64),
            event_keys=keys_of_ints(Namespace.EVENT, offsets) * np.int64(ids),
            item_names={},
        )


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(users: int) -> dict[str, float]:
    events = users * EVENTS_PER_USER
    histories = RollingHistories(HistoriesConfig(max_events=2 * events), features=FEATURES, track_new=False)
    random = np.random.default_rng(0)
    rounds = (batch for _ in range(EVENTS_PER_USER) for batch in [random.permutation(users)])
    before = resident_bytes()
    began = time.process_time()
    for i, order in enumerate(rounds):
        for batch in batches(order, 10_000, ids=True):
            shifted = {"offsets": batch.offsets + i * users, "times": batch.times + i * users}
            shifted["event_keys"] = keys_of_ints(Namespace.EVENT, shifted["offsets"])
            histories.append(EventBatch(**{**batch.__dict__, **shifted}))
    seconds = time.process_time() - began
    resident = resident_bytes() - before
    counters = histories.counters()
    assert (counters.users, counters.events) == (users, events)
    return {
        "users": users,
        "bytes_per_event": round((counters.bytes - BYTES_PER_USER * users) / events, 1),
        "resident_bytes_per_event": round((resident - BYTES_PER_USER * users) / events, 1),
        "bytes_per_user": round(counters.bytes / users, 1),
        "uniform_appends_per_s": round(events / seconds),
    }


def zipf_users(events: int) -> np.ndarray:
    shares = 1 / np.arange(1, USERS + 1)
    return np.random.default_rng(0).choice(USERS, events, p=shares / shares.sum())


def append_speed(events: int, size: int, *, ids: bool = False, late: float = 0.0) -> float:
    """Events per second through `append` in batches of `size`, Zipf users."""
    histories = RollingHistories(HistoriesConfig(window=WINDOW), features=FEATURES, track_new=False)
    log = list(batches(zipf_users(2 * events), size, ids=ids, late=late))
    warm = len(log) // 2  # arrays have grown, users are known
    for batch in log[:warm]:
        histories.append(batch)
    began = time.process_time()
    for batch in log[warm:]:
        histories.append(batch)
    return sum(map(len, log[warm:])) / (time.process_time() - began)


def exposed(batch: EventBatch) -> EventBatch:
    """All of the batch are impressions but each twentieth, which acts upon the one ten before it."""
    label = np.arange(len(batch)) % 20 == 19
    shown = np.flatnonzero(label) - 10
    columns = {name: getattr(batch, name).copy() for name in ("users", "items", "actions")}
    exposures = keys_of_ints(Namespace.EXPOSURE, batch.offsets)
    columns["actions"][~label] = 0
    for column in (columns["users"], columns["items"], exposures):
        column[label] = column[shown]
    return dataclasses.replace(batch, **columns, exposures=exposures)


def pack_speed(packs: int, new: int, joined: bool = False) -> tuple[float, float]:
    """New events per second through `append` and `pack`, with full windows; events packed for each.

    `joined`: they are impressions and labels, with as many exposures open as ten packs hold.
    """
    join = ExposuresConfig(window_ms=10 * new) if joined else None
    histories = RollingHistories(HistoriesConfig(window=WINDOW), features=FEATURES, exposures=join)
    users = 20 * new
    fill = np.tile(np.arange(users), WINDOW)
    emitted = np.random.default_rng(0).integers(0, users, packs * new)
    *log, last = batches(np.concatenate([fill, emitted]), new, ids=True)
    for batch in log[: -packs + 1]:
        histories.append(batch, np.zeros(len(batch), np.bool_))
    log = [*log[-packs + 1 :], last]
    if joined:
        log = list(map(exposed, log))
    began = time.process_time()
    packed = 0
    for batch in log:
        histories.append(batch)
        packed += len(histories.pack().items)
    return packs * new / (time.process_time() - began), packed / (packs * new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the users and events")
    quick = parser.parse_args().quick
    scale = 10 if quick else 1
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, numpy {np.__version__}\n")
    held = memory(1_000_000 // scale)  # first, while the process has no freed memory to reuse
    packs_per_s, packed = pack_speed(1000 // scale, 512)
    figures: dict[str, float] = {
        "appends_per_s": append_speed(10_000_000 // scale, 10_000),
        "appends_per_s_by_500": append_speed(5_000_000 // scale, 500),
        "appends_per_s_with_ids": append_speed(10_000_000 // scale, 10_000, ids=True),
        "appends_per_s_1pct_late": append_speed(2_000_000 // scale, 10_000, late=0.01),
        "append_and_pack_per_s_by_512": packs_per_s,
        "packed_per_new_event": packed,
        "append_and_pack_per_s_with_exposures": pack_speed(1000 // scale, 512, joined=True)[0],
    }
    figures = {name: round(value) for name, value in figures.items()}
    figures.update(held)
    for name, value in figures.items():
        print(f"{name:32} {value:>14,}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
