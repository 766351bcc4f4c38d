"""Ranking over HTTP while actions arrive and weights are swapped: requests/s, latencies, hits of the cache.

    python -m benchmarks.serving [--quick] [--config configs/reference.yaml] [--json FILE]

The server runs on this machine with the broker and a stream of actions at the configuration's pace, Serve in
its throughput-optimized mode behind HAProxy. Versions are made here: rows at random, a hundredth of them
touched in each, published every 5 s as deltas. Requests rank 128 candidates for Zipf-active users; they
arrive by a Poisson process whether or not those before are answered (open loop), and a latency counts from
the moment at which its request was due.

    req_per_s          the most at which 99 % are answered within 50 ms and none fails
    p50_ms, p99_ms     at half of that, with swaps; p99_still_ms without
    model_ms           in the engine, waiting included; overhead_ms: HTTP's time less that, of each request
    hit_share          requests whose whole history was cached; swap_hit_share: in the second after a swap
    hit_share_by_interval   with swaps every 1, 5 and 30 s (without --quick also 300 s)
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import numpy as np
import torch
import yaml

from benchmarks.freshness import cpu_model, matmul_gflops
from grstream.config import Config
from grstream.keys import Namespace, keys_of_ints
from grstream.learner import Learner
from grstream.weight_store import WeightStore
from grstream.weights import Recipe
from jobs.stack import ROOT, LocalStack

CANDIDATES = 128
LIMIT_MS = 50.0
SWAP_S = 5.0
TOUCHED_SHARE = 0.01
STEP = 1.25  # between rates that are tried
LEAST_RATE = 10.0
WARM_UP = 20.0, 30.0  # requests/s, and for how many seconds: histories into the cache, processes out of bed
IN_FLIGHT = 1000  # requests at once, beyond which the machine is hopelessly behind
_REUSE = re.compile(rb'"reuse":"(\w+)"')
_ENGINE = re.compile(rb'"engine_ms":([\d.]+)')


@dataclasses.dataclass
class Answers:
    """Of one run, by request."""

    due: list[float] = dataclasses.field(default_factory=list)
    ms: list[float] = dataclasses.field(default_factory=list)
    engine_ms: list[float] = dataclasses.field(default_factory=list)
    hit: list[bool] = dataclasses.field(default_factory=list)
    failed: int = 0
    wrong: int = 0  # statuses other than 200 and 503

    def p(self, percent: float) -> float:
        return float(np.percentile(self.ms, percent)) if self.ms else float("inf")


class Trainer:
    """Publishes versions that differ in some rows, from a thread of its own."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(0)
        self._config, self._random = config, np.random.default_rng(0)
        self._learner = Learner(config)
        self._store = WeightStore(config.storage / "weights")
        world = config.replay.synthetic
        self._keys = keys_of_ints(Namespace.ITEM, np.arange(world.items))
        self._learner.vocabulary.admit(self._keys, np.ones(len(self._keys), np.bool_))
        self.published: list[float] = []

    def publish(self) -> int:
        """The next version: whole at first, and then what was touched."""
        touched = self._random.choice(self._keys, int(len(self._keys) * TOUCHED_SHARE), replace=False)
        rows = self._learner.vocabulary.lookup(np.sort(touched))
        self._learner.vocabulary.update(rows, torch.randn(len(rows), self._config.model.dim), 0.05)
        self._learner.steps += 1
        taken = self._learner.taken(not self.published)
        assert taken is not None
        manifest = self._store.publish(
            taken.weights,
            Recipe.of(self._config),
            step=self._learner.steps,
            positions={},
            newest_event_ms=0,
            delta=taken.delta,
        )
        taken.vocabulary.carried(taken.mark, manifest.number)
        self.published.append(time.monotonic())
        return manifest.number

    @contextlib.contextmanager
    def every(self, seconds: float | None) -> Iterator[None]:
        """Publish so often within; None: not at all."""
        done = threading.Event()

        def run() -> None:
            while seconds is not None and not done.wait(seconds):
                self.publish()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class Load:
    """Requests to the server."""

    def __init__(self, config: Config, url: str, key: str) -> None:
        self._config, self._url = config, url
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._random = np.random.default_rng(1)
        self._users = config.replay.synthetic.users

    def body(self) -> bytes:
        # Zipf's law, as the stream's users have it, and candidates drawn anew.
        user = int(self._users ** self._random.random())
        items = self._random.integers(self._config.replay.synthetic.items, size=CANDIDATES)
        return json.dumps(
            {"user_id": user, "candidates": np.unique(items).tolist(), "explain": True}
        ).encode()

    def run(self, rate: float, seconds: float) -> Answers:
        return asyncio.run(self._run(rate, seconds))

    async def _run(self, rate: float, seconds: float) -> Answers:
        answers = Answers()
        gaps = self._random.exponential(1 / rate, int(rate * seconds))
        bodies = [self.body() for _ in gaps]
        connector = aiohttp.TCPConnector(limit=IN_FLIGHT)
        async with aiohttp.ClientSession(connector=connector, headers=self._headers) as session:
            await self._ask(session, self.body(), time.monotonic(), Answers())
            due = time.monotonic()
            waiting: set[asyncio.Task[None]] = set()
            for gap, body in zip(gaps, bodies, strict=True):
                due += gap
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if len(waiting) >= IN_FLIGHT:
                    answers.failed += 1
                    continue
                task = asyncio.create_task(self._ask(session, body, due, answers))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
            await asyncio.gather(*waiting)
        return answers

    async def _ask(self, session: aiohttp.ClientSession, body: bytes, due: float, answers: Answers) -> None:
        try:
            async with session.post(f"{self._url}/v1/rank", data=body) as response:
                said = await response.read()
        except aiohttp.ClientError:
            answers.failed += 1
            return
        ms = 1e3 * (time.monotonic() - due)
        if response.status != 200:
            answers.failed += 1
            answers.wrong += response.status != 503
            return
        reuse, engine = _REUSE.search(said), _ENGINE.search(said)
        assert reuse is not None
        assert engine is not None
        answers.due.append(due)
        answers.ms.append(ms)
        answers.engine_ms.append(float(engine[1]))
        answers.hit.append(reuse[1] == b"hit")


def most(load: Load, seconds: float) -> tuple[float, list[dict[str, Any]]]:
    """The greatest rate at which nothing fails and 99 % are within the limit; and all that was tried."""
    rate, good, tried = LEAST_RATE, 0.0, []
    while True:
        answers = load.run(rate, seconds)
        tried.append(
            {"rate": round(rate, 1), "p50": answers.p(50), "p99": answers.p(99), "failed": answers.failed}
        )
        print("  ".join(f"{name} {value:.4g}" for name, value in tried[-1].items()), flush=True)
        if answers.failed or answers.p(99) > LIMIT_MS:
            return good, tried
        good, rate = rate, rate * STEP


def share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 3) if hits else float("nan")


def measured(load: Load, trainer: Trainer, quick: bool) -> dict[str, Any]:
    seconds = 10.0 if quick else 30.0
    load.run(*WARM_UP)
    with trainer.every(SWAP_S):
        rate, tried = most(load, seconds)
    result: dict[str, Any] = {"req_per_s": round(rate, 1), "tried": tried}
    half = max(rate / 2, 5.0)
    still = load.run(half, 2 * seconds)
    since = len(trainer.published)
    with trainer.every(SWAP_S):
        moved = load.run(half, 3 * seconds)
    swaps = trainer.published[since:]
    after = [
        hit for due, hit in zip(moved.due, moved.hit, strict=True) if any(0 < due - t < 1.5 for t in swaps)
    ]
    overhead = [http - engine for http, engine in zip(moved.ms, moved.engine_ms, strict=True)]
    result |= {
        "p50_ms": round(moved.p(50), 2),
        "p99_ms": round(moved.p(99), 2),
        "p99_still_ms": round(still.p(99), 2),
        "hit_share": share(moved.hit),
        "swap_hit_share": share(after),
        "failed": moved.failed + still.failed,
        "wrong": moved.wrong + still.wrong,
        "model_ms": round(float(np.median(moved.engine_ms)), 2),
        "overhead_ms": round(float(np.median(overhead)), 2),
    }
    by_interval = {}
    for interval in (1.0, 5.0, 30.0) if quick else (1.0, 5.0, 30.0, 300.0):
        with trainer.every(interval):
            by_interval[f"{interval:g}"] = share(load.run(half, max(2 * seconds, 2 * interval)).hit)
    result["hit_share_by_interval"] = by_interval
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="10 s a rate, and no swaps every 300 s")
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "configs" / "reference.yaml")
    parser.add_argument("--backlog", type=int, default=50_000, help="events that give users histories")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"matmul_gflops": round(matmul_gflops(1)), "load_before": os.getloadavg()[0]}
    torch.set_num_threads(1)
    print(f"{cpu_model()}, {os.cpu_count()} CPUs, torch {torch.__version__}")
    settings = yaml.safe_load(options.config.read_text())
    key = secrets.token_hex(16)
    environment = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "GRSTREAM_API_KEYS": f"benchmark={key}",
    }
    stream = ["--data", "synthetic", "--speed", "max", "--limit", str(options.backlog)]
    home = ROOT / "var" / "serving"
    with LocalStack(settings, home, stream, train=False, environment=environment) as stack:
        stack.start()
        while stack.stages["stream"].state != "ended":
            stack.check()
            time.sleep(0.5)
        config = stack.config
        trainer = Trainer(config)
        trainer.publish()
        url = f"http://{config.serve.host}:{config.serve.port}"
        stack.stream(["--data", "synthetic", "--speed", f"{config.replay.synthetic.events_per_s:g}"])
        load = Load(config, url, key)
        deadline = time.monotonic() + 120
        while load.run(5, 1).failed:
            if time.monotonic() > deadline:
                raise SystemExit(f"the server does not answer; see {stack.home / 'logs'}")
            time.sleep(1)
        result |= measured(load, trainer, options.quick)
    result["load_after"] = os.getloadavg()[0]
    for name, value in result.items():
        if name != "tried":
            print(f"{name:24} {value}")
    line = json.dumps(result)
    if options.json:
        options.json.write_text(line)
    print(line)


if __name__ == "__main__":
    main()
