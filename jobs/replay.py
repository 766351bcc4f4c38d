"""Send a data set, or the synthetic stream, into the log of actions in time order.

    python jobs/replay.py --config configs/ml-100k.yaml --data u.data --create-topic --speed max
    python jobs/replay.py --config configs/demo.yaml --data synthetic --speed 100

A data set keeps its event times; its rows have ids, so a replay that is begun again is dropped as duplicates.
The synthetic stream happens as it is sent, and never ends unless --limit says when.
"""

import argparse
import itertools
import pathlib
import signal
import sys
import threading
from collections.abc import Iterable, Sequence

import rich.console
import rich.progress
import rich.text
from kafka.errors import KafkaError

from grstream.config import Config, ConfigError, load
from grstream.datasets import DatasetError
from grstream.datasets import load as load_dataset
from grstream.events import ActionEvent
from grstream.kafka import BrokerUnavailable, DeliveryFailed, TopicMissing, create_topic
from grstream.replay import Speed, replay
from grstream.synthetic import CLICK, LIKE, SyntheticStream

SYNTHETIC = "synthetic"


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay; the exit status."""
    options = _parser().parse_args(arguments)
    console = rich.console.Console(stderr=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        config = load(options.config)
        events, total = _events(config, options.data, console)
        if options.limit is not None:
            events, total = (
                itertools.islice(events, options.limit),
                min(total or options.limit, options.limit),
            )
        if options.create_topic:
            partitions = create_topic(config.kafka, options.partitions)
            console.print(f"topic {config.kafka.topic} has {partitions} partitions")
        with _bar(console) as bar:
            task = bar.add_task(f"{pathlib.Path(options.data).name} → {config.kafka.topic}", total=total)
            sent = replay(
                events,
                config.kafka,
                options.speed,
                lambda count: bar.update(task, completed=count),
                stop,
                live=options.data == SYNTHETIC,
            )
    except (ConfigError, DatasetError, BrokerUnavailable, TopicMissing, DeliveryFailed, KafkaError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    print(f"{sent} events sent and acknowledged{', then stopped' if stop.is_set() else ''}")
    return 0


def _events(
    config: Config, data: str, console: rich.console.Console
) -> tuple[Iterable[ActionEvent], int | None]:
    """The events, and how many they are: None for the endless stream."""
    if data == SYNTHETIC:
        missing = {CLICK, LIKE} - set(config.events.actions)
        if missing:
            raise ConfigError(f"the synthetic stream needs {', '.join(sorted(missing))} in events.actions")
        return SyntheticStream(config.replay.synthetic), None
    dataset = load_dataset(data, config)
    for reason, rows in dataset.skipped.items():
        console.print(f"{dataset.name}: {rows} rows left out: {reason}")
    return dataset.events(), len(dataset)


class _Rate(rich.progress.ProgressColumn):
    """Events a second."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        speed = task.finished_speed or task.speed
        return rich.text.Text("" if speed is None else f"{speed:,.0f}/s")


def _bar(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        _Rate(),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )


def _speed(text: str) -> Speed:
    try:
        return Speed.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("--data", required=True, metavar="PATH", help=f"a data set, or {SYNTHETIC!r}")
    parser.add_argument(
        "--speed",
        type=_speed,
        default=Speed(),
        help="events a second (500), times real time (x60), or max, the default",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N events")
    parser.add_argument("--create-topic", action="store_true", help="unless it is there")
    parser.add_argument("--partitions", type=int, default=1, help="of a created topic (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
