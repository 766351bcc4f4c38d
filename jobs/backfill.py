"""Put the history that a lake holds before the topic, so that training begins with it.

    python jobs/backfill.py --config X.yaml --data 's3://lake/actions/*.parquet' --before 2026-01-01T00:00Z

Rows become events as `replay` in the configuration says. It comes before the first training; trainer and
servers are then started as ever. `--before` says up to when the data is complete: the topic is read from the
first record of that time. A dump of the topic itself, whose columns `replay.records` names, says by its
offsets where the topic goes on.
"""

import argparse
import datetime
import logging
import sys
from collections.abc import Sequence

import ray

from grstream.backfill import BackfillRefused, backfill
from grstream.config import ConfigError, load
from grstream.datasets import DatasetError
from grstream.directories import DirectoryExists
from grstream.kafka import BrokerUnavailable, TopicMissing
from grstream.segments import Manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """Backfill; the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load(options.config)
        ray.init(log_to_driver=False, logging_level=logging.WARNING, ignore_reinit_error=True)
        show(backfill(config, options.data, options.before, options.replace))
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, DatasetError):
            raise
        print(f"backfill: {error.cause}", file=sys.stderr)
        return 1
    except (
        *(ConfigError, DatasetError, BackfillRefused, DirectoryExists),
        *(BrokerUnavailable, TopicMissing),
    ) as error:
        print(f"backfill: {error}", file=sys.stderr)
        return 1
    return 0


def show(made: Manifest) -> None:
    print(f"{made.rows:>12,}  rows\n{made.records:>12,}  records before the topic's")
    for count, what in (
        (made.rejected, "rows that are no events: rejected-*.parquet beside the segments says why"),
        (made.left_out, "rows not before the seam: the topic's own records say what happened then"),
        (made.repeated, "rows of an offset that another row has"),
        (made.holes, "offsets between a dump's first and last without a row: settled as control records"),
    ):
        if count:
            print(f"{count:>12,}  {what}")
    for number, p in made.partitions.items():
        print(f"partition {number}: offsets {p.start:,} to {p.seam:,}, then the topic")


def _time_ms(text: str) -> int:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no ISO date and time") from error
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text!r} says no time zone: add +00:00, or another")
    return int(moment.timestamp() * 1000)


def _parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument(
        "--data", required=True, help="Parquet: a file, a directory or a pattern; path or URI"
    )
    parser.add_argument(
        "--before",
        type=_time_ms,
        metavar="ISO-TIME",
        help="the data is complete up to here; needed for a lake",
    )
    parser.add_argument("--replace", action="store_true", help="a backfill that was made and not yet used")
    return parser


if __name__ == "__main__":
    sys.exit(main())
