"""The plots of a report, as SVG."""

import io
from collections.abc import Callable, Iterable

import matplotlib
import matplotlib.dates
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grstream.config import Config
from grstream.quality import ALL, slice_names, window_name
from jobs.entries import Entries

Line = tuple[str, npt.NDArray[np.int64], npt.NDArray[np.float64]]  # label, ms, values

POINTS = 1_500  # of a line: more than a page has pixels for
PARTITIONS = 8  # shown one by one; beyond, their greatest and their median
COLORS = ["#1f4e79", "#d1603d", "#3f8f5f", "#8c5fa8", "#b8902f", "#4aa3b5", "#a84a6b", "#6f7b86"]
WIDE, HIGH = 5.4, 2.6  # inches of one plot


def quality(config: Config, entries: Entries) -> str:
    """By window: entropy, calibration, GAUC and hit rates; then entropy by history for each action."""
    figures = []
    for hours in config.quality.windows_h:
        window = entries.where(window=window_name(hours))
        every = window.where(slice=ALL)
        figures.append(
            [
                _over_event_time(
                    f"normalized entropy, {window_name(hours)} window", _of(every, "ne", config), 1
                ),
                _over_event_time(
                    "calibration: predicted / actual positives", _of(every, "calibration", config), 1
                ),
                _over_event_time("GAUC", _of(every, "gauc", config), 0.5),
                _over_event_time("share of items among the k first retrieved", _hits(every, config)),
            ]
        )
    longest = window_name(max(config.quality.windows_h))
    window = entries.where(window=longest, figure="ne")
    names = slice_names(config.quality.history)
    by_history = []
    for action in config.events.actions:
        of = window.where(action=action)
        if not len(of):  # an action that every event has, or none
            continue
        lines = [_line(name.removeprefix("history "), of.where(slice=name)) for name in names]
        title = f"normalized entropy of {action}, {longest}, by events predicted from"
        by_history.append(_over_event_time(title, lines, 1))
    return "".join(_svg(drawings) for drawings in [*figures, by_history] if drawings)


def stream(entries: Entries) -> str:
    """Lag, freshness, delay and speed, and what was not trained on."""
    lag = _by_partition(entries.where(figure="lag"))
    fresh = _by_partition(entries.where(figure="freshness_s"))
    delay = _by_partition(entries.where(figure="learned_s"))
    events = entries.where(figure="trained_events")
    others = [
        _wall_line(name.removeprefix("settled/").replace("_", " "), of)
        for name in sorted(entries.words("figure"))
        if name.startswith("settled/") and name != "settled/trained"
        for of in (entries.where(figure=name),)
        if len(of) and of.value[-1]
    ]
    rest = [
        _wall_line(label, entries.where(figure=figure))
        for label, figure in (("weights version", "version"), ("checkpoint", "checkpoint"))
    ]
    return _svg(
        [
            _over_wall_time("offsets to the log's end, by partition", lag, zero=True),
            _over_wall_time("age of the newest event trained on", *_scaled(fresh), zero=True),
            _over_wall_time("from read to learned, mean", *_scaled(delay), zero=True),
            _over_wall_time("events trained on, per second", [("", *_speed(events))], zero=True),
            _over_wall_time("offsets that were no new events, in total", others, zero=True),
            _over_wall_time("published and saved", rest, zero=True),
        ]
    )


# -- lines --------------------------------------------------------------------------------------------------


def _line(label: str, of: Entries) -> Line:
    """Over event time; broken where that goes back, as when a further partition is begun with."""
    return _broken(label, of.event, of.value, np.diff(of.event) < 0)


def _wall_line(label: str, of: Entries) -> Line:
    """Over wall-clock time; broken where another run begins."""
    runs = of.table["run"].combine_chunks().indices.to_numpy()
    return _broken(label, of.at, of.value, np.diff(runs) != 0)


def _broken(
    label: str, ms: npt.NDArray[np.int64], values: npt.NDArray[np.float64], behind: npt.NDArray[np.bool_]
) -> Line:
    """A line with a hole behind each point of which it is said."""
    at = np.flatnonzero(behind) + 1
    return label, np.insert(ms, at, ms[at]), np.insert(values, at, np.nan)


def _of(window: Entries, figure: str, config: Config) -> list[Line]:
    of = window.where(figure=figure)
    return [_line(action, of.where(action=action)) for action in config.events.actions]


def _hits(window: Entries, config: Config) -> list[Line]:
    return [_line(f"k = {k}", window.where(figure=f"hr@{k}")) for k in config.quality.hit_at]


def _by_partition(of: Entries) -> list[Line]:
    partitions = of.partitions()
    if len(partitions) <= PARTITIONS:
        each = [(p, of.where(partition=p)) for p in partitions]
        return [_wall_line(f"partition {p}", rows) for p, rows in each]
    at, entry = np.unique(of.at, return_inverse=True)
    order = np.lexsort((of.value, entry))
    stops = np.cumsum(np.bincount(entry))
    starts = np.append(0, stops[:-1])
    values = of.value[order]
    return [
        (f"greatest of {len(partitions)} partitions", at, values[stops - 1]),
        ("median", at, values[(starts + stops) // 2]),
    ]


def _scaled(lines: list[Line]) -> tuple[list[Line], str]:
    """Seconds in the unit that suits the greatest."""
    greatest = max((float(np.nanmax(v)) for _, _, v in lines if len(v)), default=0.0)
    units = (("days", 86_400), ("hours", 3_600), ("minutes", 60), ("seconds", 1), ("ms", 0.001))
    unit, size = next((u for u in units if greatest >= 2 * u[1]), units[-1])
    return [(label, x, v / size) for label, x, v in lines], unit


def _speed(events: Entries) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Between entries; a run that began at its checkpoint has fewer than before, and makes no speed."""
    seconds = np.diff(events.at) / 1000
    gained = np.diff(events.value)
    return events.at[1:], np.where(gained >= 0, gained / np.maximum(seconds, 1e-3), np.nan)


# -- drawing ------------------------------------------------------------------------------------------------

Drawing = Callable[[Axes], None]


def _over_event_time(title: str, lines: list[Line], base: float | None = None) -> Drawing:
    return lambda axes: _draw(axes, title, lines, "event time, UTC", base=base)


def _over_wall_time(title: str, lines: list[Line], unit: str = "", zero: bool = False) -> Drawing:
    return lambda axes: _draw(axes, title, lines, "wall-clock time, UTC", unit=unit, zero=zero)


def _draw(
    axes: Axes,
    title: str,
    lines: list[Line],
    x_label: str,
    unit: str = "",
    base: float | None = None,
    zero: bool = False,
) -> None:
    lines = [line for line in lines if len(line[1])]
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if not lines:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color="#8795a1")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    for color, (label, ms, values) in zip(_repeated(COLORS), lines, strict=False):
        kept = np.unique(np.linspace(0, len(ms) - 1, min(len(ms), POINTS)).astype(int))
        x = ms[kept].astype("datetime64[ms]")
        marker = "." if len(kept) < 3 else ""
        axes.plot(x, values[kept], color=color, label=label, linewidth=1.3, marker=marker)
    if base is not None:
        axes.axhline(base, color="#8795a1", linewidth=0.8, linestyle=":")
    lowest, greatest = axes.dataLim.intervaly
    if zero and lowest < greatest / 2:
        axes.set_ylim(bottom=0)
    locator = matplotlib.dates.AutoDateLocator(minticks=3, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(matplotlib.dates.ConciseDateFormatter(locator))
    axes.xaxis.get_offset_text().set_fontsize(8)
    axes.tick_params(labelsize=8)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.grid(axis="y", color="#e3e8ec", linewidth=0.7)
    axes.set_axisbelow(True)
    if lines[0][0]:
        axes.legend(fontsize=8, frameon=False, ncols=1 + (len(lines) > 4))


def _repeated(colors: list[str]) -> Iterable[str]:
    while True:
        yield from colors


def _svg(drawings: list[Drawing]) -> str:
    """Two plots a row."""
    rows = -(-len(drawings) // 2)
    figure = Figure(figsize=(2 * WIDE, HIGH * rows), layout="constrained")
    all_axes = figure.subplots(rows, 2, squeeze=False).reshape(-1)
    for axes, draw in zip(all_axes, drawings, strict=False):
        draw(axes)
    for axes in all_axes[len(drawings) :]:
        axes.remove()
    out = io.StringIO()
    figure.savefig(out, format="svg")
    return out.getvalue()[out.getvalue().index("<svg") :]
