"""Events per second from the log to a worker's micro-batches, beside a bare kafka-python consumer's.

    python -m benchmarks.ingest [--quick] [--bootstrap HOST:PORT]

The same topic is read in turns by both, several times: 150-byte JSON events of 100k Zipf users, window 256.
`raw` polls records and looks at none of them. `source` is ActionSource under Ray Data: decoded, folded into
histories, packed, moved through the object store and opened as MicroBatch in another process. Both clocks
run from the first events to the last. `decode_ratio` is a consumer that decodes and folds into histories
without a window and packs nothing, 5,000 records a poll as a reader that replays; the bare one does best
with 2,000. `input_wait_share` is what a training job on this log (the default model, 256 events a micro-
batch) waits for input, of all its time. Without `--bootstrap` a development broker is started for the run;
it shares the machine with what is measured, in all cases. `reader_shares` is where a reader's own thread
spends its time, under cProfile and without Ray.
"""

import argparse
import contextlib
import cProfile
import gc
import json
import os
import pathlib
import platform
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator

import kafka
import numpy as np
import ray

from grstream import config as configs
from grstream.events import EventDecoder
from grstream.executions import Split
from grstream.histories import RollingHistories
from grstream.kafka import consumer, create_topic, producer
from grstream.ledger import Disposition, Ledger
from grstream.microbatch import MicroBatch
from grstream.reader import REPLAY_RECORDS, LogReader, collect_seldom
from grstream.source import actions
from grstream.train import train
from grstream.until import Until, end_offsets

USERS, ITEMS, ZIPF = 100_000, 100_000, 1.1
EVENT_BYTES = 150
FLUSH_EVENTS = 4096  # of a reader that catches up: a block costs Ray some 10 ms, whatever its size
START_MS = 1_700_000_000_000
WAIT_EVENTS, WAIT_WARM_STEPS = 60_000, 40  # of the training job
SHARES = {
    "poll (kafka-python)": ("group.py", "poll"),
    "decode": ("events.py", "decode"),
    "histories": ("histories.py", "append"),
    "pack": ("histories.py", "pack"),
    "to block": ("microbatch.py", "to_block"),
}


def values(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Record keys and values."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, USERS + 1) ** ZIPF
    users = random.choice(USERS, size=count, p=weights / weights.sum())
    items = random.integers(0, ITEMS, count)
    for i, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        event = {
            "user_id": user,
            "item_id": item,
            "actions": ["click"] if i % 3 else ["click", "like"],
            "timestamp_ms": START_MS + i,
            "context": {"page": "home", "device": i % 5},
        }
        text = json.dumps(event, separators=(",", ":"))
        yield str(user).encode(), text.replace("{", "{" + " " * max(0, EVENT_BYTES - len(text)), 1).encode()


def fill(config: configs.Config, count: int) -> None:
    create_topic(config.kafka, 1)
    with contextlib.closing(producer(config.kafka)) as out:
        for key, value in values(count):
            out.send(config.kafka.topic, value, key=key)
        out.flush()


def read_raw(config: configs.Config, count: int) -> float:
    """Events per second of a bare consumer."""
    with contextlib.closing(consumer(config.kafka)) as log:
        tp = kafka.TopicPartition(config.kafka.topic, 0)
        log.assign([tp])
        log.seek(tp, 0)
        first = sum(map(len, log.poll(timeout_ms=10_000).values()))
        began, seen = time.perf_counter(), first
        while seen < count:
            seen += sum(map(len, log.poll(timeout_ms=1000).values()))
        return (seen - first) / (time.perf_counter() - began)


def read_decoding(config: configs.Config, count: int) -> float:
    """Events per second of a consumer that decodes and folds into histories that keep no events."""
    config = config.model_copy(update={"histories": configs.HistoriesConfig(window=0)})
    thresholds = gc.get_threshold()
    collect_seldom()
    try:
        return _read_decoding(config, count)
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _read_decoding(config: configs.Config, count: int) -> float:
    decoder = EventDecoder(config.events)
    histories = RollingHistories(
        config.histories, features=len(config.events.features), partition=0, track_new=False
    )
    with contextlib.closing(consumer(config.kafka)) as log:
        tp = kafka.TopicPartition(config.kafka.topic, 0)
        log.assign([tp])
        log.seek(tp, 0)

        def read() -> int:
            records = log.poll(timeout_ms=10_000, max_records=REPLAY_RECORDS).get(tp, [])
            offsets = np.fromiter((r.offset for r in records), np.int64, len(records))
            times = np.fromiter((r.timestamp for r in records), np.int64, len(records))
            decoded = decoder.decode(0, offsets, [r.value for r in records], times)
            histories.append(decoded.batch)
            return len(decoded.batch)

        first = seen = read()
        began = time.perf_counter()
        while seen < count:
            seen += read()
        return (seen - first) / (time.perf_counter() - began)


def input_wait_share(config: configs.Config) -> float:
    """What a training job waits for input, of all its time once it runs."""
    config = config.model_copy(update={"source": configs.SourceConfig()})
    train(config, Until(offsets={0: WAIT_EVENTS}))
    [journal] = (config.storage / "metrics").glob("*.jsonl")
    entries = map(json.loads, journal.read_text().splitlines())
    steps = [entry for entry in entries if "step" in entry][WAIT_WARM_STEPS:]
    waited = sum(step["waited_ms"] for step in steps[1:])
    return float(waited / (steps[-1]["at_ms"] - steps[0]["at_ms"]))


def read_source(config: configs.Config, count: int) -> tuple[float, int]:
    """Events per second of ActionSource, and the bytes of its micro-batches."""
    [split] = actions(config, Ledger(), Until(offsets=end_offsets(config))).streaming_split(1, equal=False)
    began, first, seen, size = 0.0, 0, 0, 0
    ledger = Ledger()
    for block in Split(split):
        batch = MicroBatch.from_block(block)
        if batch.new_events and not first:
            began, first = time.perf_counter(), batch.new_events
        seen += batch.new_events
        size += block.nbytes
        for r in batch.ranges:
            ledger.add(r)
    took = time.perf_counter() - began
    if not seen == ledger.count(Disposition.TRAINED) == count:
        raise RuntimeError(f"{count} events were sent, and {seen} arrived")
    return (seen - first) / took, size


def profile(config: configs.Config) -> dict[str, float]:
    """Shares of a reader's time."""
    reader = LogReader(config, 0, Ledger(), Until(offsets=end_offsets(config)))
    profiler = cProfile.Profile()
    profiler.enable()
    for batch in reader.batches():
        batch.to_block()
    profiler.disable()
    stats = pstats.Stats(profiler)
    rows = stats.stats  # type: ignore[attr-defined]
    total = stats.total_tt  # type: ignore[attr-defined]
    return {
        name: sum(
            row[3] for (path, _, function), row in rows.items() if path.endswith(file) and function == what
        )
        / total
        for name, (file, what) in SHARES.items()
    }


@contextlib.contextmanager
def broker(directory: pathlib.Path) -> Iterator[str]:
    command = [sys.executable, "-m", "grstream.cli", "broker", "--dir", str(directory), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().removeprefix("ready ").strip()
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="200k events and 3 rounds instead of 1M and 5")
    parser.add_argument("--bootstrap", help="an existing broker; default: a development broker for the run")
    options = parser.parse_args()
    count, rounds = (200_000, 3) if options.quick else (1_000_000, 5)
    with contextlib.ExitStack() as stack:
        storage = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bootstrap = options.bootstrap or stack.enter_context(broker(storage / "broker"))
        config = configs.parse(
            {
                "storage": str(storage),
                "kafka": {"bootstrap_servers": [bootstrap], "topic": f"ingest-{uuid.uuid4().hex[:8]}"},
                "events": {"actions": ["click", "like"], "context": ["page", "device"]},
                "histories": {"window": 256},
                "source": {"flush_events": FLUSH_EVENTS},
            }
        )
        fill(config, count)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        stack.callback(ray.shutdown)
        raw, decoding, source, size = [], [], [], 0
        for n in range(rounds + 1):
            raw_rate, decoding_rate = read_raw(config, count), read_decoding(config, count)
            source_rate, size = read_source(config, count)
            if n:  # the first round warms caches and imports
                raw.append(raw_rate)
                decoding.append(decoding_rate)
                source.append(source_rate)
                print(
                    f"round {n}: raw {raw_rate:,.0f}/s  decoding {decoding_rate:,.0f}/s "
                    f"{decoding_rate / raw_rate:.2f}  source {source_rate:,.0f}/s "
                    f"{source_rate / raw_rate:.2f}"
                )
        shares = profile(config)
        waited = input_wait_share(config)
    report(count, raw, decoding, source, size, shares, waited)


def report(
    count: int,
    raw: list[float],
    decoding: list[float],
    source: list[float],
    size: int,
    shares: dict[str, float],
    waited: float,
) -> None:
    ratios = [s / r for s, r in zip(source, raw, strict=True)]
    decode_ratios = [d / r for d, r in zip(decoding, raw, strict=True)]
    result = {
        "events": count,
        "flush_events": FLUSH_EVENTS,
        "events_per_s": round(statistics.median(source)),
        "raw_events_per_s": round(statistics.median(raw)),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "decode_ratio": round(statistics.median(decode_ratios), 3),
        "decode_ratio_min": round(min(decode_ratios), 3),
        "input_wait_share": round(waited, 4),
        "batch_bytes_per_event": round(size / count),
        "reader_shares": {name: round(share, 3) for name, share in shares.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
    }
    for name, value in result.items():
        print(f"{name:>22}  {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
