"""Rows per second into a backfill's segments, and events per second out of them, beside the topic.

    python -m benchmarks.backfill [--quick]

Rows of 100k Zipf users in four Parquet files become segments of four partitions by the code of
jobs/backfill.py, on Ray with two CPUs. The same records are put on a topic of the development broker. Then a
reader makes micro-batches of one and the other in turns, without Ray: decoded, folded into histories, packed.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import ray

from benchmarks.ingest import FLUSH_EVENTS, ITEMS, START_MS, USERS, ZIPF, broker
from grstream import config as configs
from grstream.backfill import backfill
from grstream.kafka import create_topic, producer
from grstream.ledger import Disposition, Ledger
from grstream.reader import LogReader
from grstream.segments import Segments
from grstream.until import Until, end_offsets

PARTITIONS, FILES = 4, 4


def write_lake(directory: pathlib.Path, rows: int) -> None:
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, USERS + 1) ** ZIPF
    for number in range(FILES):
        count = rows // FILES
        table = {
            "user": random.choice(USERS, size=count, p=weights / weights.sum()),
            "item": random.integers(0, ITEMS, count),
            "time": START_MS + random.integers(0, 86_400_000, count),
            "kind": random.choice(["click", "like"], count),
        }
        path = directory / f"part-{number}.parquet"
        pa.parquet.write_table(pa.table(table), path, row_group_size=1 << 18)


def fill(config: configs.Config, segments: Segments) -> None:
    """Put the segments' records on a topic."""
    create_topic(config.kafka, PARTITIONS)
    with contextlib.closing(producer(config.kafka)) as out:
        for partition, held in segments.manifest.partitions.items():
            for records in segments.records(partition, held.start):
                for record in records:
                    out.send(
                        config.kafka.topic, record.value, partition=partition, timestamp_ms=record.timestamp
                    )
                out.flush()


def read(config: configs.Config, count: int) -> float:
    """Events per second of a reader."""
    until = Until(offsets=end_offsets(config))
    began, seen = time.perf_counter(), 0
    for batch in LogReader(config, 0, Ledger(), until).batches():
        seen += sum(r.stop - r.start for r in batch.ranges if r.disposition == Disposition.TRAINED)
    if seen != count:
        raise RuntimeError(f"{count} events are there, and {seen} were read")
    return seen / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="400k rows and 3 rounds instead of 4M and 5")
    options = parser.parse_args()
    rows, rounds = (400_000, 3) if options.quick else (4_000_000, 5)
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lake, topic = (
            configs.parse(
                {
                    "storage": str(directory / name),
                    "kafka": {"topic": f"{name}-{uuid.uuid4().hex[:8]}", "bootstrap_servers": [bootstrap]},
                    "events": {"actions": ["click", "like"]},
                    "source": {"flush_events": FLUSH_EVENTS},
                    "replay": {
                        "columns": {"user": "user", "item": "item", "time": "time", "time_unit": "ms"},
                        "actions": [
                            {"action": "click"},
                            {"action": "like", "column": "kind", "equals": "like"},
                        ],
                    },
                }
            )
            for bootstrap in [stack.enter_context(broker(directory / "broker"))]
            for name in ("lake", "topic")
        )
        create_topic(lake.kafka, PARTITIONS)
        (directory / "data").mkdir()
        write_lake(directory / "data", rows)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        stack.callback(ray.shutdown)
        began = time.perf_counter()
        made = backfill(lake, str(directory / "data"), int(time.time() * 1000))
        rate = rows / (time.perf_counter() - began)
        print(f"backfill: {rate:>9,.0f} rows/s, {made.records:,} records")
        segments = Segments.of(lake)
        if segments is None:
            raise RuntimeError("no segments were made")
        size = sum(path.stat().st_size for path in segments.path.iterdir())
        fill(topic, segments)
        found: dict[str, list[float]] = {"segments": [], "topic": []}
        for n in range(rounds + 1):
            rates = {name: read(config, rows) for name, config in (("segments", lake), ("topic", topic))}
            if n:  # the first round warms caches and imports
                print("  ".join(f"{name} {of:>9,.0f} events/s" for name, of in rates.items()))
                for name, of in rates.items():
                    found[name].append(of)
    print(
        json.dumps(
            {
                "benchmark": "backfill",
                "machine": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "rows": rows,
                "rows_per_s": round(rate),
                "segment_bytes_per_event": round(size / rows, 1),
                **{f"{name}_events_per_s": round(statistics.median(of)) for name, of in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
