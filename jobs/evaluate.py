"""Evaluate a model.

    python jobs/evaluate.py stream --config configs/ml-100k.yaml --action liked [--seeds 3]
    python jobs/evaluate.py ml-1m --data sequences.parquet [--config configs/ml-1m.yaml ...] [--seeds 3]
    python jobs/evaluate.py ml-100k --data u.data [--config configs/ml-100k-next.yaml ...] [--seeds 3]
    python jobs/evaluate.py pass --data u.data --config configs/ml-100k.yaml --action liked \
        [--models hstu transformer dlrm] [--seeds 3]
    python jobs/evaluate.py staleness --data u.data --config configs/ml-100k.yaml --action liked [--seeds 3]

`stream` trains on the topic's events up to now, in one pass from the beginning for each seed, and compares
the prequential normalized entropy of an action over the second half with three running rates computed over
the same events in the same order: global, smoothed per item, and smoothed user plus item in log-odds. The
topic must hold the data (jobs/replay.py). Each seed's state is kept in <storage>/seed-<n>; a run that was
cut goes on.

`ml-1m` and `ml-100k` train on MovieLens with each user's last two items held out, and rank these among all
items (grstream.leave_one_out): a row of the table for each --config, beside the published ones. They need
neither Ray nor a broker. A run's state is kept in <output>/<config>/seed-<n>; one that was cut goes on.

`pass` trains models side by side in one pass over a data set's events, in this process, and `staleness` one
model, as it would have served with weights of several ages. Both compare event by event, with intervals.
"""

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Sequence

import ray
from rich.console import Console
from rich.table import Table

from grstream.board import Progress
from grstream.config import Config, ConfigError, load
from grstream.evaluation import Comparison, compare
from grstream.kafka import BrokerUnavailable, TopicMissing
from grstream.predictions import read
from grstream.train import LASTING, NotEnoughCpus, train
from grstream.until import Until
from jobs import leave_one_out, one_pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate; the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    status: int = options.run(options)
    return status


def _stream(options: argparse.Namespace) -> int:
    try:
        config = load(options.config)
        action = _action(config, options.action)
        until = Until.parse("now", config)
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
        results = [_one_pass(config, seed, action, until) for seed in range(options.seeds)]
    except (ConfigError, BrokerUnavailable, TopicMissing, NotEnoughCpus, *LASTING) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    _show(options.action, results)
    return 0


def _action(config: Config, name: str) -> int:
    if name not in config.events.actions:
        raise ConfigError(f"--action {name}: the configured actions are {', '.join(config.events.actions)}")
    return config.events.actions.index(name)


def _one_pass(config: Config, seed: int, action: int, until: Until) -> Comparison:
    """Train from the stream's beginning with this seed and compare what was predicted."""
    of_seed = config.model_copy(
        update={
            "storage": config.storage / f"seed-{seed}",
            "train": config.train.model_copy(update={"seed": seed, "log_predictions": True}),
        }
    )

    def show(progress: Progress) -> None:
        print(f"seed {seed}: {progress.events:,} events", file=sys.stderr, flush=True)

    train(of_seed, until, show=show)
    return compare(read(of_seed.storage / "predictions"), action)


def _show(action: str, results: list[Comparison]) -> None:
    table = Table(
        title=f"normalized entropy of {action!r} over the second half: {results[0].events:,} events"
    )
    for column in ("seed", "model", *results[0].rates, "GAUC", "margin, nats", "95 % interval"):
        table.add_column(column, justify="right")
    for seed, r in enumerate(results):
        low, high = r.interval
        entropies = [f"{loss / r.base:.4f}" for loss in (r.model, *r.rates.values())]
        table.add_row(str(seed), *entropies, f"{r.gauc:.4f}", f"{r.margin:+.4f}", f"{low:+.4f} … {high:+.4f}")
    Console(width=120).print(table)
    margins = [r.margin for r in results]
    figures = {
        "action": action,
        "log_loss": [round(r.model, 5) for r in results],
        "normalized_entropy": [round(r.model / r.base, 5) for r in results],
        "running_log_loss": {name: round(loss, 5) for name, loss in results[0].rates.items()},
        "running_normalized_entropy": {n: round(v / results[0].base, 5) for n, v in results[0].rates.items()},
        "margin": round(statistics.mean(margins), 5),
        "margin_sd_of_seeds": round(statistics.stdev(margins), 5) if len(margins) > 1 else None,
        "margin_interval": [[round(x, 5) for x in r.interval] for r in results],
    }
    print(json.dumps(figures))


def _parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    stream = commands.add_parser("stream", help="prequential entropy beside running rates")
    stream.add_argument("--config", required=True, help="the system's YAML")
    stream.add_argument("--action", required=True, help="which of the configured actions")
    stream.add_argument("--seeds", type=int, default=3, help="passes over the stream, each with its own seed")
    stream.set_defaults(run=_stream)
    leave_one_out.add_commands(commands)
    one_pass.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
