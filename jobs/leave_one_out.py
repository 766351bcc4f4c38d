"""The commands of jobs/evaluate.py that train epochs and rank each user's last item among all."""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from grstream import epochs
from grstream.config import ConfigError, RunConfig, load_run
from grstream.epochs import CRITERION, Epoch, Result
from grstream.leave_one_out import Sequences, SequencesError, mean_and_error, read_ml_1m, read_ml_100k

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SHOWN = ("HR@10", "NDCG@10", "HR@50", "NDCG@50", "HR@200", "NDCG@200", "MRR")

# Test HR@10 and NDCG@10. The order of events that share a time decides the last item of a quarter of
# ML-1M's users; rows of "order kept" have the file's order, as the Parquet file of sequences has it.
ML_1M = (
    ("SASRec (HSTU paper, table 4)", 0.2853, 0.1603),
    ("HSTU, 2 blocks, d = 50 (HSTU paper, table 4)", 0.3097, 0.1720),
    ("HSTU-large, 8 blocks (HSTU paper, table 4)", 0.3294, 0.1893),
    ("HSTU-large + MoL (RAILS)", 0.3412, 0.1979),
    ("HSTU 8 × 2, full softmax (NetEase HSTU-Tensorflow)", 0.3419, 0.1944),
    ("SASRec + sampled softmax, order kept (transformer_benchmark)", 0.2929, 0.1684),
    ("HSTU, order kept (transformer_benchmark)", 0.3037, 0.1719),
    ("eSASRec, order kept (transformer_benchmark)", 0.3133, 0.1772),
    ("FuXi-α, order kept (transformer_benchmark)", 0.3164, 0.1813),
)

Row = tuple[str, list[Result]]  # a configuration's name and its seeds


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`ml-1m` and `ml-100k`."""
    known: dict[str, tuple[Callable[[str], Sequences], str, Sequence[tuple[str, float, float]], str]] = {
        "ml-1m": (read_ml_1m, "ml-1m.yaml", ML_1M, "a Parquet file with a list item_ids for each user"),
        "ml-100k": (read_ml_100k, "ml-100k-next.yaml", (), "u.data"),
    }
    for name, (read, config, published, data) in known.items():
        command = commands.add_parser(name, help="leave one out, ranked among all items")
        command.add_argument("--data", required=True, metavar="PATH", help=data)
        command.add_argument(
            "--config",
            nargs="+",
            default=[str(CONFIGS / config)],
            metavar="YAML",
            help="a row of the table each (%(default)s)",
        )
        command.add_argument(
            "--seeds", type=seeds, default=[0, 1, 2], metavar="N", help="how many, or which: 3, or 0,4,5"
        )
        command.add_argument("--output", default=f"var/{name}", metavar="DIRECTORY", help="of all runs")
        command.add_argument("--threads", type=int, metavar="N", help="of PyTorch; its own choice by default")
        command.set_defaults(run=_run, read=read, published=published)


def _run(options: argparse.Namespace) -> int:
    console = Console(stderr=True)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        configs = {pathlib.Path(path).stem: load_run(path) for path in options.config}
        if len(configs) < len(options.config):
            raise ConfigError("two configurations have the same name, and so would their runs")
        data = options.read(options.data)
        rows: list[Row] = []
        for name, config in configs.items():
            place = pathlib.Path(options.output) / name
            rows.append((name, [_train(data, name, config, seed, place, console) for seed in options.seeds]))
    except (ConfigError, SequencesError, FloatingPointError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nevaluate: stopped; the same command goes on from the last epoch", file=sys.stderr)
        return 130
    _table(options.command, data, rows, options.published)
    return 0


def _train(
    data: Sequences, name: str, config: RunConfig, seed: int, place: pathlib.Path, console: Console
) -> Result:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    title = f"{name} seed {seed}"
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=config.epochs.epochs)

        def show(done: float, epoch: Epoch | None) -> None:
            bar.update(task, completed=done)
            if epoch is None:
                return
            text = f"{title}: epoch {epoch.number}, {epoch.seconds:.0f} s, loss {epoch.loss:.4f}"
            if epoch.validation is not None:
                text += f", validation {CRITERION} {epoch.validation[CRITERION]:.4f}"
                text += f" HR@10 {epoch.validation['HR@10']:.4f}"
            console.print(text, highlight=False, soft_wrap=True)

        return epochs.run(data, config, seed, place / f"seed-{seed}", show)


def _table(
    command: str, data: Sequences, rows: Sequence[Row], published: Sequence[tuple[str, float, float]]
) -> None:
    table = Table(
        title=f"{command}, test: {len(data.lengths):,} users' last items ranked among {len(data.ids):,}, "
        "mean ± standard error over seeds"
    )
    table.add_column("model")
    for column in ("seeds", *SHOWN, "s an epoch"):
        table.add_column(column, justify="right")
    for name, hit, gain in published:
        table.add_row(name, "", f"{hit:.4f}", f"{gain:.4f}")
    figures = {}
    for name, results in rows:
        summaries = {metric: mean_and_error([r.test[metric] for r in results]) for metric in SHOWN}
        pace, _ = mean_and_error([r.seconds_an_epoch for r in results])
        cells = [_with_error(*summary) for summary in summaries.values()]
        table.add_row(name, str(len(results)), *cells, f"{pace:.0f}", style="bold")
        figures[name] = {
            "test": {
                metric: [round(x, 5) for x in pair if x is not None] for metric, pair in summaries.items()
            },
            "test_by_seed": {r.seed: {m: round(r.test[m], 5) for m in SHOWN} for r in results},
            "validation_by_seed": {r.seed: round(r.validation[CRITERION], 5) for r in results},
            "best_epoch": [r.best_epoch for r in results],
            "epochs": [r.epochs for r in results],
            "seconds": [round(r.seconds) for r in results],
            "parameters": results[0].parameters,
        }
    Console(width=200).print(table)
    print(json.dumps(figures))


def _with_error(mean: float, error: float | None) -> str:
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"


def seeds(text: str) -> list[int]:
    """`3`: how many; `0,4,5`: which."""
    try:
        named = [int(part) for part in text.split(",") if part]
    except ValueError:
        named = []
    if len(named) == 1 and "," not in text:
        named = list(range(named[0]))
    if not named or min(named) < 0 or len(set(named)) < len(named):
        raise argparse.ArgumentTypeError(f"{text!r}: say how many seeds, as 3, or which, as 0,4,5 or 7,")
    return named
