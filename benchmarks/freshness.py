"""How long an action takes to be in a score, and how long until a version that learned from it serves.

    python -m benchmarks.freshness [--quick] [--config configs/reference.yaml]

The whole system runs on this machine under the reference load: the synthetic stream at the configuration's
pace, trainer and server at once, after a backlog of events that gives users histories. Twice a second one
more event is posted and followed:

    visible   from before POST /v1/actions until /v1/rank has answered from a history that includes it
    learned   until /v1/rank answers from a version whose manifest covers the event's offset, in parts:
              to_trained (posted to learned from), to_published (to the manifest), to_live (to an answer)

Once a run the server's scores are compared with those of an engine here, with the version that the answer
names and a history folded from the log itself: they must be equal, and those of the version before must not.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import threading
import time
from collections.abc import Iterator
from typing import Any

import kafka
import numpy as np
import torch
import yaml

from grstream.config import Config
from grstream.engine import Engine
from grstream.events import EventDecoder
from grstream.histories import History, RollingHistories
from grstream.kafka import consumer
from grstream.keys import Namespace, key_of, keys_of_ints
from grstream.lag import Lag
from grstream.scores import Ranked
from grstream.synthetic import CLICK
from grstream.weight_store import WeightStore
from jobs.client import Client
from jobs.observer import Learned, Observer
from jobs.stack import ROOT, LocalStack

CANDIDATES = 100
EVERY_S = 0.5  # between probes
POLL_S = 0.005  # between looks for a probe in the scores
VERSION_S = 0.1  # between looks for a new version: how late it may be noticed
NEAR_S = 2.0  # the trainer has caught up when it is so far behind the log's end
START_LIMIT_S, LEARN_LIMIT_S = 300.0, 60.0
EQUAL = 1e-5  # law 2
MATMUL = 2048


@dataclasses.dataclass(frozen=True)
class Probe:
    """One posted event."""

    user: int
    partition: int
    offset: int
    posted_ms: int  # wall clock, for what other processes write down
    visible_ms: float


class Loop:
    """The running system, and the probes into it."""

    def __init__(self, stack: LocalStack) -> None:
        self.config, self.observer = stack.config, Observer(stack.config)
        self._stack = stack
        self._client = stack.client()
        self._lag = Lag(stack.config.kafka)
        self._random = np.random.default_rng(0)

    def catch_up(self, limit_s: float) -> None:
        """Wait until the trainer is near the log's end."""
        near = self.config.replay.synthetic.events_per_s * NEAR_S
        deadline = time.monotonic() + limit_s
        while (lag := self.lag()) is None or lag > near:
            self._stack.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the trainer is {lag} events behind after {limit_s:.0f} s")
            time.sleep(EVERY_S)

    def lag(self) -> int | None:
        self.observer.refresh()
        samples = self.observer.samples
        return self._lag.of(samples[-1].positions) if samples and samples[-1].events else None

    def probe(self) -> Probe:
        """Post an event and wait until a score includes it."""
        world = self.config.replay.synthetic
        user, item = int(self._random.integers(world.users)) + 1, int(self._random.integers(world.items))
        posted_ms, began = _now_ms(), time.perf_counter()
        event = {"user_id": user, "item_id": item, "actions": [CLICK], "timestamp_ms": posted_ms}
        placed = self._client.post("/v1/actions", {"events": [event]})["results"][0]
        while self.rank(user)["position"]["offset"] <= placed["offset"]:
            time.sleep(POLL_S)
        visible_ms = (time.perf_counter() - began) * 1000
        return Probe(user, placed["partition"], placed["offset"], posted_ms, visible_ms)

    def rank(self, user: int, at_ms: int | None = None) -> dict[str, Any]:
        body: dict[str, Any] = {"user_id": user, "candidates": candidates(self.config)}
        answer: dict[str, Any] = self._client.post("/v1/rank", body | ({"at_ms": at_ms} if at_ms else {}))
        self.observer.answered(answer["version"], _now_ms())
        return answer

    def learned(self, probes: list[Probe]) -> list[Learned]:
        """The probes' ways, as soon as all are through."""
        deadline = time.monotonic() + LEARN_LIMIT_S
        while True:
            self.observer.refresh()
            ways = [self.observer.learned(p.partition, p.offset) for p in probes]
            through = [way for way in ways if way is not None]
            if len(through) == len(probes):
                return through
            self._stack.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(probes) - len(through)} of {len(probes)} events were not learned")
            time.sleep(EVERY_S)

    @contextlib.contextmanager
    def watching_versions(self) -> Iterator[None]:
        """Ask all the while which version answers."""
        done = threading.Event()

        def watch(client: Client) -> None:
            body = {"user_id": 0, "candidates": [0]}
            while not done.wait(VERSION_S):
                self.observer.answered(client.post("/v1/rank", body)["version"], _now_ms())

        thread = threading.Thread(target=watch, args=(self._stack.client(),), name="versions")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def candidates(config: Config) -> list[int]:
    """The same for every request, spread over the items."""
    return np.linspace(0, config.replay.synthetic.items - 1, CANDIDATES).astype(int).tolist()


def check_scores(loop: Loop, probe: Probe) -> dict[str, float]:
    """Served scores against an engine of our own; SystemExit if they are not that version's."""
    config = loop.config
    at_ms = _now_ms()
    answer = loop.rank(probe.user, at_ms)
    store = WeightStore(config.storage / "weights")
    version = store.load(answer["version"])
    if not version.manifest.covers(probe.partition, probe.offset):
        raise SystemExit(f"version {version.number} does not cover {probe}")
    history = history_from_log(config, probe, answer["position"]["offset"])
    served = np.array([list(row["scores"].values()) for row in answer["results"]])

    def distance(number: int) -> float:
        engine = Engine(config.serve)
        engine.swap(store.load(number))
        keys = keys_of_ints(Namespace.ITEM, np.array(candidates(config), np.int64))
        ours: Ranked = engine.rank(history, keys, at_ms)
        return float(np.abs(ours.probabilities - served).max())

    same, before = distance(version.number), distance(version.number - 1)
    print(
        f"served scores of user {probe.user} ({len(history.items)} events) differ from an offline engine's "
        f"by {same:.1e} with version {version.number}, and by {before:.1e} with version {version.number - 1}"
    )
    if len(history.items) != answer["history_length"] or same > EQUAL or before <= same:
        raise SystemExit("the served scores are not those of the version that the answer names")
    return {"rescore_difference": same, "rescore_difference_version_before": before}


def history_from_log(config: Config, probe: Probe, stop: int) -> History:
    """The user's history as of an offset, folded from the start of the log."""
    at = kafka.TopicPartition(config.kafka.topic, probe.partition)
    histories = RollingHistories(
        config.histories, features=len(config.events.features), partition=probe.partition, track_new=False
    )
    decoder = EventDecoder(config.events)
    with contextlib.closing(consumer(config.kafka)) as log:
        log.assign([at])
        log.seek(at, 0)
        while log.position(at) < stop:
            records = [r for r in log.poll(1000).get(at, []) if r.offset < stop]
            if not records:
                continue
            offsets = np.array([r.offset for r in records], np.int64)
            times = np.array([r.timestamp for r in records], np.int64)
            values, keys = [r.value for r in records], [r.key for r in records]
            decoded = decoder.decode(probe.partition, offsets, values, times, keys)
            histories.append(decoded.batch, tombstones=decoded.tombstones)
    return histories.history(key_of(Namespace.USER, probe.user))


def matmul_gflops(threads: int) -> float:
    """What this machine reaches now in fp32."""
    torch.set_num_threads(threads)
    a, b = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * MATMUL**3 / min(seconds) / 1e9


def measure(stack: LocalStack, probes: int) -> dict[str, float]:
    """All figures, from a stack whose stream is the backlog."""
    began = time.monotonic()
    stack.start()
    while stack.stages["stream"].state != "ended":
        stack.check()
        time.sleep(EVERY_S)
    loop = Loop(stack)
    pace = loop.config.replay.synthetic.events_per_s
    stack.stream(["--data", "synthetic", "--speed", f"{pace:g}"])
    loop.catch_up(START_LIMIT_S)
    print(f"up and caught up with the backlog after {time.monotonic() - began:.0f} s")
    trained, since = loop.observer.samples[-1].events, time.monotonic()
    done, lags = [], []
    with loop.watching_versions():
        for i in range(probes):
            time.sleep(max(0.0, since + i * EVERY_S - time.monotonic()))
            done.append(loop.probe())
            if i % 20 == 0:
                stack.check()
                lags.append(loop.lag() or 0)
        ways = loop.learned(done)
    figures = summary(done, ways)
    figures["trained_per_s"] = (loop.observer.samples[-1].events - trained) / (time.monotonic() - since)
    figures["lag_max"] = max(lags)
    return figures | check_scores(loop, done[-1])


def summary(probes: list[Probe], ways: list[Learned]) -> dict[str, float]:
    visible = [p.visible_ms for p in probes]
    seconds = {
        "learned": [(way.live_ms - p.posted_ms) / 1000 for p, way in zip(probes, ways, strict=True)],
        "to_trained": [(way.trained_ms - p.posted_ms) / 1000 for p, way in zip(probes, ways, strict=True)],
        "to_published": [(way.published_ms - way.trained_ms) / 1000 for way in ways],
        "to_live": [(way.live_ms - way.published_ms) / 1000 for way in ways],
    }
    return {
        "probes": len(probes),
        "visible_p50_ms": float(np.percentile(visible, 50)),
        "visible_p99_ms": float(np.percentile(visible, 99)),
        "learned_p50_s": float(np.median(seconds["learned"])),
        "learned_p99_s": float(np.percentile(seconds["learned"], 99)),
        **{
            f"{part}_s": float(np.median(seconds[part])) for part in ("to_trained", "to_published", "to_live")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="120 probes after 10,000 events, not 600 after 50,000"
    )
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "configs" / "reference.yaml")
    options = parser.parse_args()
    probes, backlog = (120, 10_000) if options.quick else (600, 50_000)
    figures: dict[str, float] = {
        "matmul_gflops_1_thread": matmul_gflops(1),
        "matmul_gflops": matmul_gflops(os.cpu_count() or 1),
        "load_before": os.getloadavg()[0],
    }
    print(f"{cpu_model()}, {os.cpu_count()} CPUs, torch {torch.__version__}, glibc's allocator as it is")
    settings = yaml.safe_load(options.config.read_text())
    print(f"{options.config.name}; backlog of {backlog:,} events, then {probes} probes, {EVERY_S} s apart")
    stream = ["--data", "synthetic", "--speed", "max", "--limit", str(backlog)]
    with LocalStack(settings, ROOT / "var" / "freshness", stream) as stack:
        figures |= measure(stack, probes)
    figures["load_after"] = os.getloadavg()[0]
    for name, value in figures.items():
        print(f"{name:34} {value:>14,.3g}" if value < 1 else f"{name:34} {value:>14,.2f}")
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    main()
