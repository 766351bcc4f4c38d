"""Turn the log of quality into one page: how well a trainer predicts, how far behind it is, what it dropped.

    python jobs/report.py --config X.yaml [--out report.html] [--since 7d|12h|ISO-TIME]

The page is one file, with its plots inside. `--since` is wall-clock time; the log reaches back
`quality.keep_days`.
"""

import argparse
import datetime
import html
import pathlib
import re
import sys
import time
from collections.abc import Sequence

from grstream.checkpoints import CheckpointStore
from grstream.config import Config, ConfigError, load
from grstream.journal import Mark, ancestry, newest_run
from grstream.monitor import DIRECTORY
from grstream.quality import ALL, LATE, slice_names, window_name
from grstream.quality_log import read
from jobs.entries import Entries

_SINCE = re.compile(r"(\d+(?:\.\d+)?)([hd])")
_MEANINGS = {
    "trained": "learned from",
    "duplicate": "an event id that was there before",
    "dead_letter": "no event; kept in the dead-letter topic with the reason",
    "tombstone": "empty records",
    "control": "transaction markers, aborted records, what compaction removed",
    "lost": "gone from the log before they were read",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        config = load(options.config)
        page = report(config, options.since)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    options.out.write_text(page)
    print(f"{options.out}: {len(page) / 1e6:.1f} MB")
    return 0


def report(config: Config, since: str = "7d") -> str:
    """The page. FileNotFoundError without a log, ConfigError without matplotlib, ValueError for `since`."""
    try:
        from jobs import plots
    except ImportError as error:
        raise ConfigError("the page needs matplotlib: pip install 'grstream[plots]'") from error
    since_ms = _since(since)
    table = read(config.storage / DIRECTORY, since_ms)
    if not len(table):
        raise FileNotFoundError(f"the log of quality has no entry since {_time(since_ms)}: give --since")
    journals = config.storage / "metrics"
    newest = newest_run(journals)
    if newest is None:
        raise FileNotFoundError(f"no journal in {journals}")
    line = list(ancestry(journals, Mark(newest, sys.maxsize)))
    every = Entries.of(table)
    lasting = every.lasting(line)
    return _page(
        f"grstream · {config.kafka.topic}",
        [
            ("Now", _now(config, every)),
            ("Quality by window and action", _by_action(config, lasting)),
            (f"Quality by history, newest {_longest(config)}", _by_history(config, lasting)),
            ("Quality over event time", plots.quality(config, lasting)),
            ("The stream, over wall-clock time", plots.stream(every)),
            ("What became of every offset", _dispositions(every)),
            ("Runs", _runs(every, line)),
        ],
    )


# -- sections -----------------------------------------------------------------------------------------------


def _now(config: Config, entries: Entries) -> str:
    newest = entries.newest()
    lag = newest.where(figure="lag").value
    fresh = newest.where(figure="freshness_s").value
    numbers = CheckpointStore(config.storage / "checkpoints").numbers()
    tiles = {
        "newest entry": _time(int(newest.at[0])),
        "events trained on": f"{newest.one('trained_events'):,.0f}",
        "steps": f"{newest.one('step'):,.0f}",
        "lag, offsets": f"{lag.sum():,.0f}" if len(lag) else "unknown",
        "freshness of the stalest partition": _duration(float(fresh.max())) if len(fresh) else "—",
        "weights version": f"{newest.one('version'):.0f}",
        "checkpoint": str(max(numbers)) if numbers else "none",
        "embedding rows": f"{newest.one('vocabulary_keys'):,.0f}",
        "gate": "open" if newest.one("gate_open") else "closed: weights are not published",
    }
    return (
        "<dl>"
        + "".join(f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in tiles.items())
        + "</dl>"
    )


def _by_action(config: Config, entries: Entries) -> str:
    newest = entries.newest()
    rows = []
    for hours in config.quality.windows_h:
        window = newest.where(window=window_name(hours), slice=ALL)
        share = window.one("gauc_share")
        for action in config.events.actions:
            of = window.where(action=action)
            rows.append(
                [
                    window_name(hours),
                    action,
                    *_figures(of, window),
                    _number(share, ".0%"),
                    *_hits(config, window),
                ]
            )
    header = ["window", "action", "events", "NE", "calibration", "GAUC", "of events", "of users"]
    note = (
        "NE: log loss of predictions made before learning, over the entropy of the mean label; below 1 beats "
        "the base rate. Calibration: predicted over actual positives. GAUC: of the events of users that have "
        "both labels, and where these are too many, of a sample of users. HR@k: the item was among the k "
        "first retrieved; it is of the event, not of an action."
    )
    return _table([*header, *(f"HR@{k}" for k in config.quality.hit_at)], rows, text=2) + f"<p>{note}</p>"


def _by_history(config: Config, entries: Entries) -> str:
    window = entries.newest().where(window=_longest(config))
    rows = []
    for slice_ in (*slice_names(config.quality.history), LATE):
        of_slice = window.where(slice=slice_)
        for action in config.events.actions:
            of = of_slice.where(action=action)
            rows.append([_slice(slice_), action, *_figures(of, of_slice), *_hits(config, of_slice)])
    header = ["events predicted from", "action", "events", "NE", "calibration", "GAUC", "of events"]
    return _table([*header, *(f"HR@{k}" for k in config.quality.hit_at)], rows, text=2)


def _dispositions(entries: Entries) -> str:
    newest = entries.newest()
    rows = [
        [name.replace("_", " "), f"{newest.one(f'settled/{name}'):,.0f}", meaning]
        for name, meaning in _MEANINGS.items()
    ]
    rows += [
        [
            f"missed by {name}",
            f"{newest.where(window=name).one('missed'):,.0f}",
            "trained on, too old for the window",
        ]
        for name in sorted(newest.words("window"))
    ]
    return _table(["offsets", "count", ""], rows, text=1)


def _runs(entries: Entries, line: list[Mark]) -> str:
    """The runs that have entries, newest first."""
    built_upon = {mark.run: mark.entries for mark in line}
    rows = []
    for run in sorted(entries.words("run"), reverse=True):
        of = entries.where(run=run)
        first, last = of.at.min(), of.at.max()
        steps = of.where(figure="step").value
        if run == line[0].run:
            end = "the newest"
        elif run not in built_upon:
            end = "undone: none went on from it"
        else:
            end = f"went on from after {built_upon[run]:,} turns of {of.entries.max():,} or more"
        span = _duration((last - first) / 1000)
        rows.append([_time(int(first)), span, f"{steps[0]:,.0f}", f"{steps[-1]:,.0f}", end])
    return _table(["began", "entries for", "from step", "to step", ""], rows, text=1)


# -- parts --------------------------------------------------------------------------------------------------


def _figures(of: Entries, events: Entries) -> list[str]:
    """Events, entropy, calibration, and GAUC with the events that it is of."""
    cells = [_number(of.one(name), ".4f") for name in ("ne", "calibration", "gauc")]
    pairs = of.where(figure="gauc").table["events"].to_pylist()
    return [_number(events.one("events"), ",.0f"), *cells, f"{pairs[-1]:,}" if pairs else "—"]


def _hits(config: Config, of: Entries) -> list[str]:
    return [_number(of.one(f"hr@{k}"), ".4f") for k in config.quality.hit_at]


def _longest(config: Config) -> str:
    return window_name(max(config.quality.windows_h))


def _slice(name: str) -> str:
    return "late, placed in the middle" if name == LATE else f"{name.removeprefix('history ')} of the user's"


def _number(value: float, form: str) -> str:
    return "—" if value != value else format(value, form)


def _table(header: list[str], rows: list[list[str]], text: int) -> str:
    """`text`: how many leading columns are words; a last one without a header is, too."""

    def row(cells: list[str], tag: str) -> str:
        words = [i < text or not header[i] for i in range(len(cells))]
        marked = zip(cells, words, strict=True)
        return (
            "<tr>" + "".join(f"<{tag}{' class=w' * w}>{html.escape(c)}</{tag}>" for c, w in marked) + "</tr>"
        )

    return f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _page(title: str, sections: list[tuple[str, str]]) -> str:
    body = "".join(f"<section><h2>{html.escape(name)}</h2>{content}</section>" for name, content in sections)
    title = html.escape(title)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1>{body}</html>\n"
    )


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b2733 }
body { max-width: 1120px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 .6em }
p { color: #56636f; max-width: 50em }
dl { display: flex; flex-wrap: wrap; gap: 1em 2.4em; margin: 0 }
dt { color: #56636f; font-size: .85em } dd { margin: 0; font-size: 1.2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25em .9em; text-align: right; border-bottom: 1px solid #e3e8ec }
th { font-weight: 600; color: #56636f } .w { text-align: left }
svg { max-width: 100%; height: auto; display: block; margin: 0 0 1em }
"""


def _time(ms: int) -> str:
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _since(text: str) -> int:
    """A length of time back from now, or a time, as ms. ValueError."""
    match = _SINCE.fullmatch(text)
    if match:
        return int(time.time() * 1000 - float(match[1]) * {"h": 3_600_000, "d": 86_400_000}[match[2]])
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"--since {text}: expected 12h, 7d or an ISO date and time") from error
    return int(moment.timestamp() * 1000)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Turn the log of quality into one page.")
    parser.add_argument("--config", required=True, help="the system's YAML")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("report.html"), help="default: %(default)s"
    )
    parser.add_argument("--since", default="7d", help="12h, 7d or an ISO date and time; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
