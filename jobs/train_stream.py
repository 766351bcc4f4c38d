"""Train on the stream of actions: continuously, or up to a bound.

    python jobs/train_stream.py --config X.yaml [--until now|PARTITION:OFFSET,...|ISO-TIME]

On a cluster (`ray start --head`), from the project's root:

    ray job submit --working-dir . -- python jobs/train_stream.py --config X.yaml

Ray puts the working directory on PYTHONPATH of the job and of its workers, before what is installed, so the
project's packages are found there. The job client wants RAY_AUTH_MODE=token, or =disabled, like the cluster.

SIGTERM or Ctrl-C (`ray job stop` sends the first, and kills after 3 s): the step is finished, a checkpoint
and a weights version are written, exit code 0. A second one aborts. Started again, training goes on there.
"""

import argparse
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

import ray

from grstream import logs
from grstream.board import Progress
from grstream.config import Config, ConfigError, load
from grstream.kafka import BrokerUnavailable, TopicMissing, partition_count
from grstream.lag import Lag
from grstream.train import LASTING, NotEnoughCpus, train
from grstream.until import Until

logger = logging.getLogger("jobs.train_stream")  # it runs as __main__


class Lines:
    """Progress as lines: for a person, or of the log where that is JSON."""

    def __init__(self, config: Config) -> None:
        partition_count(config.kafka)  # a broker or topic that is not there is said at once
        self._lag, self._json = Lag(config.kafka), config.logs.format == "json"
        self._before: Progress | None = None

    def show(self, now: Progress) -> None:
        before, self._before = self._before, now
        rate = 0.0
        if before and now.at_ms > before.at_ms:
            # Fewer than before: a run that resumed from a checkpoint.
            rate = max(0, now.events - before.events) * 1000 / (now.at_ms - before.at_ms)
        lag = self._lag.of(now.positions)
        if self._json:
            told = {**dataclasses.asdict(now), "lag": lag, "events_per_s": round(rate, 1)}
            logger.info("progress", extra=told)
            return
        parts = [
            time.strftime("%H:%M:%S"),
            f"{now.events:,} events",
            f"{rate:,.0f}/s",
            "lag unknown" if lag is None else f"lag {lag:,}",
            *(f"NE {name[3:]} {value:.3f}" for name, value in now.figures.items() if name.startswith("ne/")),
            *(f"sparsity {now.figures[name]:.0%}" for name in ("sparsity",) if name in now.figures),
            f"step {now.step}",
            f"version {now.version}",
            f"checkpoint {now.checkpoint}",
            *([f"WARNING: {now.strays} users in several partitions"] if now.strays else []),
        ]
        print("  ".join(parts), flush=True)

    def close(self) -> None:
        self._lag.close()


def main() -> int:
    options = _options()
    as_json = False
    try:
        config = load(options.config)
        logs.configure(config.logs)
        as_json = config.logs.format == "json"
        until = Until.parse(options.until, config) if options.until else None
        lines = Lines(config)
    except (ConfigError, BrokerUnavailable, TopicMissing, ValueError) as error:
        _say_why(error, as_json)
        return 2
    # Ray Train looks at its workers this often: a stop must be through in the 3 s that `ray job stop` gives.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    ray.init(
        log_to_driver=options.verbose,
        logging_level=logging.WARNING,
        logging_config=_ray_logs(config) if as_json else None,
    )
    logs.configure(config.logs)  # Ray sets up the root logger, too
    stop = _stop_on_signals(as_json)
    try:
        final = train(config, until, stop, lines.show)
    except (*LASTING, NotEnoughCpus, BrokerUnavailable, TopicMissing) as error:
        _say_why(error, as_json)
        return 1
    finally:
        lines.close()
    settled = (
        ", ".join(f"{count:,} {what}" for what, count in final.settled.items()) if final else "nothing read"
    )
    _say(f"{'stopped' if stop.is_set() else 'done'}: {settled}", as_json)
    return 0


def _say(text: str, as_json: bool) -> None:
    if as_json:
        logger.info("%s", text)
    else:
        print(text, flush=True)


def _say_why(error: Exception, as_json: bool) -> None:
    """What ended the job, for whoever started it."""
    if as_json:
        logger.error("%s", error, extra={"error": type(error).__name__})
    else:
        print(f"train_stream: {error}", file=sys.stderr)


def _ray_logs(config: Config) -> ray.LoggingConfig:
    """What Ray and libraries say in the job's processes, beside what the project says."""
    level = "WARNING" if config.logs.level in ("DEBUG", "INFO") else config.logs.level
    return ray.LoggingConfig(encoding="JSON", log_level=level, additional_log_standard_attrs=["name"])


def _stop_on_signals(as_json: bool) -> threading.Event:
    """An event that the first SIGTERM or SIGINT sets; the second ends the process."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise SystemExit(128 + number)
        _say("stopping: the step is finished and saved", as_json)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    return stop


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on the stream of actions.")
    parser.add_argument("--config", required=True, help="the system's YAML")
    parser.add_argument(
        "--until", help="now, PARTITION:OFFSET,... or an ISO date and time; default: for ever"
    )
    parser.add_argument("--verbose", action="store_true", help="show what Ray's workers log")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
