"""The commands of jobs/evaluate.py that make one pass over a data set, in this process."""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from grstream import datasets, predictions
from grstream.config import Config, ConfigError, ModelConfig, load
from grstream.datasets import Dataset, DatasetError
from grstream.dlrm import DLRMLearner
from grstream.evaluation import HITS, Difference, Measure, difference, measures
from grstream.events import InvalidEvent
from grstream.learner import Learner
from grstream.metrics import Predictions, popularity_ranks, running_rates
from grstream.one_pass import learned, micro_batches, stale
from jobs.leave_one_out import seeds

DAY_MS = 86_400_000
WINDOWED = {"position_bias": "none", "time_bias": False}  # distances told by absolute positions instead
# What of the configured model is another one's.
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "hstu": {},
    "hstu-no-time": {"time_bias": False},
    "hstu-no-bias": WINDOWED,
    "hstu-softmax": {"attention": "softmax"},
    "transformer": {"encoder": "transformer", **WINDOWED},
    "transformer-biases": {"encoder": "transformer"},
}
DLRM = "dlrm"
FIGURES = ("ne", "gauc", *(f"hr@{k}" for k in HITS), "mrr")

Rows = dict[str, list[dict[str, Measure]]]  # by name, the figures of each seed


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`pass` and `staleness`."""
    one = commands.add_parser("pass", help="models side by side, one pass over a data set")
    one.add_argument(
        "--models",
        nargs="+",
        choices=[*VARIANTS, DLRM],
        default=["hstu", "transformer", DLRM],
        metavar="NAME",
        help=f"of {', '.join([*VARIANTS, DLRM])} (default: hstu transformer dlrm); the first is compared "
        "with the others",
    )
    one.add_argument(
        "--popular-days", type=float, default=7, metavar="DAYS", help="popularity counts these (%(default)s)"
    )
    one.add_argument(
        "--vocabulary-rows",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="also the first model under these budgets of embedding rows",
    )
    one.set_defaults(run=_pass)
    old = commands.add_parser("staleness", help="entropy by the age of the weights that serve")
    old.add_argument(
        "--every", type=int, default=500, metavar="EVENTS", help="a version is made (%(default)s)"
    )
    old.add_argument(
        "--ages", type=int, nargs="+", default=[0, 1, 10, 60], metavar="VERSIONS", help="(%(default)s)"
    )
    old.add_argument("--plot", metavar="FILE", help="draw it: .png, .svg or .pdf")
    old.set_defaults(run=_staleness)
    for command in (one, old):
        command.add_argument("--data", required=True, metavar="FILE", help="what jobs/replay.py takes")
        command.add_argument("--config", required=True, metavar="YAML", help="the system's")
        command.add_argument("--action", required=True, help="which of the configured actions")
        command.add_argument(
            "--seeds", type=seeds, default=[0, 1, 2], metavar="N", help="how many, or which: 3, or 0,4,5"
        )
        command.add_argument("--output", metavar="DIRECTORY", help="of all passes (<storage>/pass)")
        command.add_argument("--threads", type=int, metavar="N", help="of PyTorch; its own choice by default")


def _pass(options: argparse.Namespace) -> int:
    return _reporting(options, _compare)


def _staleness(options: argparse.Namespace) -> int:
    return _reporting(options, _compare_ages)


def _reporting(options: argparse.Namespace, command: Callable[[argparse.Namespace], None]) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        command(options)
    except (ConfigError, DatasetError, InvalidEvent) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nevaluate: stopped; the same command goes on from the last whole pass", file=sys.stderr)
        return 130
    return 0


@dataclasses.dataclass(frozen=True)
class _Work:
    """What both commands are given."""

    config: Config
    data: Dataset
    action: int
    place: pathlib.Path

    @classmethod
    def of(cls, options: argparse.Namespace) -> "_Work":
        config = load(options.config)
        actions = config.events.actions
        if options.action not in actions:
            raise ConfigError(f"--action {options.action}: the configured actions are {', '.join(actions)}")
        place = pathlib.Path(options.output) if options.output else config.storage / "pass"
        return cls(config, datasets.load(options.data, config), actions.index(options.action), place)

    def made(self, name: str, config: Config) -> Predictions | None:
        """The predictions of a pass that was made before with this configuration."""
        path, said = self._files(name, config)
        if path.exists() and said.exists() and said.read_text() == self._identity(config):
            return predictions.load(path)
        return None

    def keep(self, name: str, config: Config, made: Predictions) -> Predictions:
        """Have `made` find these."""
        path, said = self._files(name, config)
        predictions.save(path, made)
        said.write_text(self._identity(config))
        return made

    def _files(self, name: str, config: Config) -> tuple[pathlib.Path, pathlib.Path]:
        path = self.place / name / f"seed-{config.train.seed}.parquet"
        return path, path.with_suffix(".json")

    def _identity(self, config: Config) -> str:
        return json.dumps(
            {"data": self.data.name, "events": len(self.data), **config.model_dump(mode="json")}, indent=1
        )


def _seeded(config: Config, seed: int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})


def _compare(options: argparse.Namespace) -> None:
    work = _Work.of(options)
    rows: Rows = {}
    first: Predictions | None = None
    compared = {name: _configured(name, work.config) for name in options.models}
    for budget in options.vocabulary_rows:
        of_train = {"train": work.config.train.model_copy(update={"vocabulary_rows": budget})}
        compared[f"{options.models[0]}-{budget}-rows"] = compared[options.models[0]].model_copy(
            update=of_train
        )
    for name, unseeded in compared.items():
        rows[name] = []
        for seed in options.seeds:
            config = _seeded(unseeded, seed)
            said = work.made(name, config)
            if said is None:
                said = work.keep(name, config, _one_pass(work, name, config))
            first = said if first is None else first
            rows[name].append(measures(said, work.action))
    assert first is not None
    rows |= _unlearned(first, work.action, options.popular_days)
    _show(options, work, rows)


def _configured(name: str, config: Config) -> Config:
    """The configuration with a variant's model."""
    fields = dict(VARIANTS.get(name, {}))
    if fields.get("position_bias") == "none":
        fields["absolute_positions"] = config.histories.window + 1
    model = ModelConfig.model_validate({**config.model.model_dump(), **fields})
    return config.model_copy(update={"model": model})


def _one_pass(work: _Work, name: str, config: Config) -> Predictions:
    learner = DLRMLearner(config) if name.startswith(DLRM) else Learner(config)
    with _progress(f"{name} seed {config.train.seed}", len(work.data)) as show:
        return learned(micro_batches(work.data.events(), config), learner, show)


def _unlearned(said: Predictions, action: int, days: float) -> Rows:
    """What any recommender must beat, over the same events."""
    labels = said.labels[:, action]
    rows: Rows = {}
    for name, rate in running_rates(said.users, said.items, labels).items():
        of_actions = np.repeat(rate[:, None], said.labels.shape[1], 1).astype(np.float32)
        found = measures(dataclasses.replace(said, probabilities=of_actions), action)
        rows[f"running rate: {name}"] = [{figure: found[figure] for figure in ("ne", "gauc")}]
    ranks = popularity_ranks(said.items, said.times, round(days * DAY_MS))
    found = measures(dataclasses.replace(said, ranks=np.where(said.ranks < 0, -1, ranks)), action)
    rows[f"popular in {days:g} days"] = [{f: found[f] for f in FIGURES if f not in ("ne", "gauc")}]
    return rows


def _compare_ages(options: argparse.Namespace) -> None:
    work = _Work.of(options)
    ages = sorted(set(options.ages))
    rows: Rows = {_aged(age): [] for age in ages}
    for seed in options.seeds:
        config = _seeded(work.config, seed)
        names = {age: f"every-{options.every}-age-{age}" for age in ages}
        passes = {age: said for age in ages if (said := work.made(names[age], config)) is not None}
        if len(passes) < len(ages):
            with _progress(f"seed {seed}", len(work.data)) as show:
                batches = micro_batches(work.data.events(), config)
                passes = stale(batches, Learner(config), options.every, ages, show)
            for age, said in passes.items():
                work.keep(names[age], config, said)
        for age in ages:
            rows[_aged(age)].append(measures(passes[age], work.action))
    _show(options, work, rows)
    if options.plot:
        _plot(options, {age: rows[_aged(age)] for age in ages})


def _aged(age: int) -> str:
    return f"{age} versions old" if age != 1 else "1 version old"


def _show(options: argparse.Namespace, work: _Work, rows: Rows) -> None:
    """The figures, and how far each row is from the first."""
    (first, reference), *_ = rows.items()
    events = len(reference[0]["ne"].parts)
    table = Table(
        title=f"{work.data.name}, {options.action!r}, second half: {events:,} events; "
        f"below each mean over {len(options.seeds)} seeds what it has over {first!r}, ± 95 %",
    )
    table.add_column("")
    for figure in FIGURES:
        table.add_column(figure, justify="right")
    out: dict[str, dict[str, object]] = {}
    for name, measured in rows.items():
        cells, beside = [], []
        out[name] = {}
        for figure in FIGURES:
            if figure not in measured[0]:
                cells.append("")
                beside.append("")
                continue
            each = [m[figure].mean for m in measured]
            apart = difference([m[figure] for m in reference], [m[figure] for m in measured])
            cells.append(f"{np.mean(each):.4f}")
            beside.append("" if name == first else _signed(apart))
            out[name][figure] = [round(x, 5) for x in each]
            if name != first:
                out[name][f"{figure}_difference"] = [round(x, 5) for x in (apart.mean, *apart.interval)]
        table.add_row(name, *cells, style="bold")
        if name != first:
            table.add_row("", *beside, style="dim")
    Console(width=130).print(table)
    print(json.dumps({"data": work.data.name, "action": options.action, "events": events, "rows": out}))


def _signed(apart: Difference) -> str:
    return "" if math.isnan(apart.mean) else f"{apart.mean:+.4f} ± {1.96 * apart.error:.4f}"


def _plot(options: argparse.Namespace, by_age: dict[int, list[dict[str, Measure]]]) -> None:
    """Normalized entropy by age of the weights, a point a seed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'grstream[plots]'") from error
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    ages = list(by_age)
    for k in range(len(options.seeds)):
        axes.plot(ages, [by_age[a][k]["ne"].mean for a in ages], "o", color="#9db4c8", markersize=4)
    means = [float(np.mean([m["ne"].mean for m in by_age[a]])) for a in ages]
    axes.plot(ages, means, "o-", color="#1f4e79")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(ages, [str(a) for a in ages])
    axes.set_xlabel(f"age of the weights that serve, versions of {options.every:,} events")
    axes.set_ylabel(f"normalized entropy of {options.action}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.plot, dpi=150)


@contextlib.contextmanager
def _progress(title: str, events: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=events)
        yield lambda done: bar.update(task, completed=done)
