"""Publishing and catching up, by whole versions and by deltas: bytes, and seconds at each station.

    python -m benchmarks.publishing [--quick] [--json FILE]

A vocabulary of a million rows of 64 numbers (--quick: 100,000), a hundredth of which is touched between two
versions. Medians of five versions, after one that is not counted.

    *_mib              written to storage, per version
    *_stall_s          the step loop waits while what is to be published is copied
    *_publish_s        until the version is durable in storage
    *_load_s           a reader reads and verifies it, the version before being held or not
    *_swap_s           an engine gets ready to serve it
    *_offer_s, *_fetch_s   the same version to the cluster's object store, and from there
    missed_50_*        a reader that missed 50 versions catches up by their deltas, or by a base
"""

import argparse
import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import ray
import torch

from grstream.config import parse
from grstream.engine import Engine
from grstream.exchange import Exchange
from grstream.learner import Learner, Taken
from grstream.weight_store import WeightStore
from grstream.weights import Manifest, Recipe

ROWS, QUICK_ROWS, DIM, TOUCHED_SHARE, VERSIONS, MISSED = 1_000_000, 100_000, 64, 0.01, 5, 50

T = TypeVar("T")


class Bench:
    """A learner, and the way of its versions to an engine, each station timed."""

    def __init__(self, storage: pathlib.Path, rows: int) -> None:
        self.config = parse(
            {"storage": str(storage), "events": {"actions": ["click"]}, "model": {"dim": DIM}}
        )
        self.learner = Learner(self.config)
        self.store = WeightStore(storage / "weights")
        self.random = np.random.default_rng(0)
        self.keys = np.unique(self.random.integers(-(2**63), 2**63 - 1, rows))
        for part in np.array_split(self.keys, 16):
            self.learner.vocabulary.admit(part, np.ones(len(part), np.bool_))
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        done = work()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return done

    def touch(self) -> None:
        """A hundredth of the rows, a tenth of them under keys that are new."""
        count = int(len(self.keys) * TOUCHED_SHARE)
        fresh = self.random.integers(-(2**63), 2**63 - 1, count // 10)
        keys = np.unique(np.concatenate([self.random.choice(self.keys, count - len(fresh)), fresh]))
        rows = self.learner.vocabulary.admit(keys, np.ones(len(keys), np.bool_))
        self.learner.vocabulary.update(rows, torch.randn(len(rows), DIM), 0.05)
        self.learner.steps += 1

    def publish(self, kind: str, whole: bool) -> tuple[Taken, Manifest]:
        taken = self.timed(f"{kind}_stall_s", lambda: self.learner.taken(whole))
        manifest = self.timed(
            f"{kind}_publish_s",
            lambda: self.store.publish(
                taken.weights,
                Recipe.of(self.config),
                step=self.learner.steps,
                positions={},
                newest_event_ms=0,
                delta=taken.delta,
            ),
        )
        taken.vocabulary.carried(taken.mark, manifest.number)
        return taken, manifest


def main() -> None:
    parser = argparse.ArgumentParser(description="publishing and catching up, whole and by deltas")
    parser.add_argument("--quick", action="store_true", help="100,000 rows")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result there")
    args = parser.parse_args()
    rows = QUICK_ROWS if args.quick else ROWS
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=3 << 30)
    with tempfile.TemporaryDirectory(prefix="grstream-") as home:
        result = measured(pathlib.Path(home), rows)
    ray.shutdown()
    for name, value in result.items():
        print(f"{name:24} {value:14,}")
    line = json.dumps(result)
    if args.json:
        args.json.write_text(line)
    print(line)


def measured(storage: pathlib.Path, rows: int) -> dict[str, float]:
    bench = Bench(storage, rows)
    exchange, near = Exchange(storage), Exchange(storage)
    exchange.open(keep=5)
    sizes: dict[str, int] = {}
    engine, reader = Engine(bench.config.serve), WeightStore(storage / "weights")
    bench.publish("first", True)
    first = reader.instead_of(0)
    assert first is not None
    engine.swap(first)
    late = WeightStore(storage / "weights")
    late.instead_of(0)
    for at in range(VERSIONS + 1):
        bench.touch()
        taken, manifest = bench.publish("delta", False)
        sizes["delta"] = sum(file.bytes for file in manifest.files.values())
        bench.timed("delta_offer_s", lambda t=taken, m=manifest: exchange.offer(m, t.weights, t.delta))
        version = bench.timed("delta_load_s", lambda m=manifest: reader.instead_of(m.number - 1))
        assert version is not None
        assert version.changed is not None
        bench.timed("delta_swap_s", lambda v=version: engine.swap(v))
        delta = bench.timed("delta_fetch_s", lambda m=manifest: near.delta(m))
        assert delta is not None
        if at == 0:
            bench.seconds.clear()
    for _ in range(MISSED - VERSIONS - 1):
        bench.touch()
        bench.publish("missed", False)
    caught_up = bench.timed("missed_50_by_deltas_s", functools.partial(late.instead_of, 1))
    assert caught_up is not None
    assert caught_up.changed is not None
    del caught_up, late
    for at in range(VERSIONS + 1):
        bench.touch()
        taken, manifest = bench.publish("whole", True)
        assert taken.weights is not None
        taken = taken._replace(delta=None)
        sizes["whole"] = sum(bench.store.manifest(manifest.number).files[n].bytes for n in manifest.files)
        bench.timed("whole_offer_s", lambda t=taken, m=manifest: exchange.offer(m, t.weights, t.delta))
        version = bench.timed("whole_load_s", lambda: WeightStore(storage / "weights").instead_of(0))
        assert version is not None
        bench.timed("whole_swap_s", lambda v=version: Engine(bench.config.serve).swap(v))
        weights = bench.timed("whole_fetch_s", lambda m=manifest: near.weights(m))
        assert weights is not None
        del taken, version, weights
        if at == 0:
            bench.seconds = {k: v for k, v in bench.seconds.items() if not k.startswith("whole")}
    exchange.close()
    figures = {
        f"{kind}_{station}_s": round(statistics.median(bench.seconds[f"{kind}_{station}_s"]), 4)
        for station in ("stall", "publish", "load", "swap", "offer", "fetch")
        for kind in ("whole", "delta")
    }
    return {
        "rows": rows,
        "touched": int(rows * TOUCHED_SHARE),
        **{f"{kind}_mib": round(sizes[kind] / 2**20, 2) for kind in ("whole", "delta")},
        **figures,
        "missed_50_by_deltas_s": round(bench.seconds["missed_50_by_deltas_s"][0], 3),
        "missed_50_by_base_s": figures["whole_load_s"],
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
