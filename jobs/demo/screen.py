"""What the demo shows: a live panel on a terminal, plain lines elsewhere, and the findings as tables."""

import json
import shlex
import time
from collections.abc import Callable
from typing import Protocol

import rich.box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grstream.keys import Id
from jobs.demo.proof import BASE_RATE, STEPS, Call, Moved, Proof, Ranking
from jobs.observer import Observer, Sample
from jobs.stack import PARTS, LocalStack

CHART_ROWS, CHART_COLUMNS = 9, 60
PLAIN_S, STANDING_S = 5.0, 30.0  # between plain lines
MARKS = "●○◆◇▲△"  # one an action


class Screen(Protocol):
    """Shows how the demo stands, as often as it is told to."""

    def __enter__(self) -> "Screen": ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, view: "View") -> None: ...


class View:
    """All that is shown, as it is now."""

    def __init__(self, stack: LocalStack, title: str, pace: str) -> None:
        self.stack, self.title, self.pace = stack, title, pace
        self.observer: Observer | None = None
        self.proof: Proof | None = None
        self.lag: int | None = None
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def samples(self) -> list[Sample]:
        return list(self.observer.samples) if self.observer else []

    def progress(self) -> str:
        """One line about the trainer."""
        samples = self.samples
        if not samples or not samples[-1].events:
            return "nothing trained yet"
        now, then = samples[-1], samples[max(0, len(samples) - 4)]
        rate = (now.events - then.events) * 1000 / max(1, now.at_ms - then.at_ms)
        lag = "unknown" if self.lag is None else f"{self.lag:,}"
        return (
            f"{now.events:,} events trained · {rate:,.0f}/s · {lag} behind the log's end · "
            f"step {now.step:,} · checkpoint {now.checkpoint}"
        )

    def weights(self) -> str:
        """One line about versions."""
        if self.observer is None or not self.observer.manifests:
            return "no version yet"
        newest = self.observer.manifests[max(self.observer.manifests)]
        age_s = max(0.0, time.time() - newest.created_ms / 1000)
        live = self.observer.live
        line = f"version {newest.number} of step {newest.step:,}, {age_s:.1f} s old"
        if not live:
            return line + ", none serves yet"
        serving = max(live)
        manifest = self.observer.manifests.get(serving)
        late = f", {(live[serving] - manifest.created_ms) / 1000:.1f} s after it came" if manifest else ""
        return f"{line} · serving {serving}{late}"

    def entropies(self) -> dict[str, list[float]]:
        """Normalized entropy of recent events over time, by action."""
        curves: dict[str, list[float]] = {}
        for sample in self.samples:
            for name, value in sample.figures.items():
                if name.startswith("ne/"):
                    curves.setdefault(name[3:], []).append(value)
        return curves


def of(console: Console) -> Screen:
    """The screen that suits where the output goes."""
    return LiveScreen(console, panel) if console.is_terminal else PlainScreen(console, PLAIN_S)


def status(console: Console) -> Screen:
    """The same for a system that only stays up."""
    return LiveScreen(console, standing) if console.is_terminal else PlainScreen(console, STANDING_S)


class LiveScreen:
    """A picture of the view, drawn again and again."""

    def __init__(self, console: Console, picture: Callable[[View], RenderableType]) -> None:
        self._picture = picture
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> "LiveScreen":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, view: View) -> None:
        self._live.update(self._picture(view), refresh=True)


class PlainScreen:
    """Lines, for a pipe or a log: each part and step when it comes, and now and then a status."""

    def __init__(self, console: Console, every_s: float) -> None:
        self._console, self._every_s = console, every_s
        self._said: set[str] = set()
        self._next = 0.0

    def __enter__(self) -> "PlainScreen":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, view: View) -> None:
        for name, stage in view.stack.stages.items():
            if stage.state == "up":
                self._once(
                    view, f"{name} is up" + (f" after {stage.seconds:.1f} s" if stage.seconds > 1 else "")
                )
        if view.proof:
            for step, seen in view.proof.done.items():
                self._once(view, f"PROVEN: {step}: {seen}")
        if view.samples and view.seconds >= self._next:
            self._next = view.seconds + self._every_s
            latest = "  ".join(f"NE {name} {curve[-1]:.3f}" for name, curve in view.entropies().items())
            self._line(view, "  ".join(filter(None, [view.progress(), latest, view.weights()])))

    def _once(self, view: View, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._line(view, what)

    def _line(self, view: View, what: str) -> None:
        self._console.print(f"{view.seconds:6.1f} s  {what}", soft_wrap=True, highlight=False, markup=False)


def standing(view: View) -> RenderableType:
    """What is worth watching once the loop is proven."""
    return Group(*_entropy(view), Text(view.progress()), Text(view.weights()))


def panel(view: View) -> RenderableType:
    """The whole live view."""
    parts: list[RenderableType] = [_stages(view), Text()]
    if view.samples:
        parts += [Text(view.progress()), Text(view.weights()), Text()]
        parts += [*_entropy(view), Text()]
    if view.proof:
        parts.append(_steps(view.proof))
    return Panel(
        Group(*parts),
        title=f"[bold]grstream[/] · {view.title}",
        subtitle=f"{view.seconds:.0f} s",
        box=rich.box.ROUNDED,
        padding=(0, 1),
    )


def _stages(view: View) -> RenderableType:
    look = {
        "waiting": ("dim", "·"),
        "starting": ("yellow", "…"),
        "up": ("green", "✓"),
        "ended": ("blue", "■"),
    }
    shown = []
    for name in PARTS:
        stage = view.stack.stages[name]
        style, mark = look[stage.state]
        after = f" {stage.seconds:.0f} s" if stage.seconds >= 1 else ""
        shown.append(Text(f"{mark} {name}{after}", style=style))
    return Columns([*shown, Text(view.pace, style="dim")], padding=(0, 3))


def _entropy(view: View) -> list[RenderableType]:
    curves = view.entropies()
    if not curves:
        return []
    config = view.stack.config.train
    head = Text(
        f"normalized entropy of the last {config.recent_events:,} events, predicted before they were learned"
    )
    legend = Text("  ")
    for mark, (name, curve) in zip(MARKS, curves.items(), strict=False):
        legend.append(f"{mark} {name} {curve[-1]:.3f}   ")
    legend.append(f"┄ {BASE_RATE:.3f} is the base rate", style="dim")
    return [head, Text("\n".join(chart(curves))), legend]


def _steps(proof: Proof) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    current = next((step for step in STEPS if step not in proof.done), None)
    for step in STEPS:
        if step in proof.done:
            table.add_row(Text("✓", style="green"), step, Text(proof.done[step], style="bold"))
        else:
            style = "yellow" if step == current else "dim"
            table.add_row(Text("…" if step == current else "·", style=style), Text(step, style=style), "")
    return table


def chart(curves: dict[str, list[float]], rows: int = CHART_ROWS, columns: int = CHART_COLUMNS) -> list[str]:
    """Curves over time as lines of text, with the base rate dotted."""
    lowest = min(value for curve in curves.values() for value in curve)
    rise = max(0.02, (BASE_RATE - lowest) / (rows - 2))  # one row above the base rate, the rest below
    width = max(len(curve) for curve in curves.values())
    step = max(1, -(-width // columns))

    def row_of(value: float) -> int:
        return max(0, min(rows - 1, 1 + round((BASE_RATE - value) / rise)))

    canvas = [[" "] * columns for _ in range(rows)]
    canvas[row_of(BASE_RATE)] = ["┄"] * columns
    for mark, curve in zip(MARKS, curves.values(), strict=False):
        for column, value in enumerate(curve[::step]):
            canvas[row_of(value)][column] = mark
    return [f"  {BASE_RATE + rise * (1 - row):5.2f} │{''.join(line)}" for row, line in enumerate(canvas)]


def way(moved: Moved) -> RenderableType:
    """How long the posted actions took to each station."""
    way, posted = moved.way, moved.posted_ms
    table = Table(
        box=rich.box.SIMPLE, title="after the actions were posted", title_justify="left", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_row("visible", f"{moved.visible_ms:.0f} ms", "a score comes from a history that has them")
    table.add_row("trained", f"{(way.trained_ms - posted) / 1000:.2f} s", "the trainer has learned from them")
    table.add_row("published", f"{(way.published_ms - posted) / 1000:.2f} s", "in a version of the weights")
    table.add_row("live", f"{(way.live_ms - posted) / 1000:.2f} s", f"version {way.version} answers /v1/rank")
    return table


def ranking(moved: Moved) -> RenderableType:
    """One user's ranking before and after."""
    shots = (moved.before, moved.after, moved.learned)
    heads = ("before", "with the actions", "and learned")
    table = Table(
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("item", no_wrap=True)
    table.add_column("", no_wrap=True)
    for head, shot in zip(heads, shots, strict=True):
        table.add_column(
            f"{head}\nv{shot.version}, {shot.history_length} events", justify="right", no_wrap=True
        )
    places = [_places(shot) for shot in shots]
    for item in sorted(moved.after.scores, key=lambda i: places[1][i]):
        cells = [f"{s.scores[item]:.3f}  #{p[item]:<2}" for s, p in zip(shots, places, strict=True)]
        up = places[0][item] - places[1][item]
        cells[1] += f" {'▲' if up > 0 else '▼' if up < 0 else ' '}{abs(up) or '':<2}"
        style = "bold green" if item in moved.scene.favoured else ""
        table.add_row(str(item), moved.scene.kinds[item], *cells, style=style)
    known = [("known" if s.new_item_known else "not known yet") for s in shots]
    table.add_row("new item", "", *known, style="dim")
    head = f"{moved.scene.story}\nP({moved.action}) of what may be shown next, and its rank:"
    return Group(Text(head, style="bold"), table)


def _places(shot: Ranking) -> dict[Id, int]:
    return {item: i + 1 for i, item in enumerate(sorted(shot.scores, key=lambda i: -shot.scores[i]))}


def curl(call: Call, url: str) -> str:
    """A call as a line for the shell."""
    if call.body is None:
        return f"curl -s {shlex.quote(url + call.path)}"
    body = shlex.quote(json.dumps(call.body))
    return f"curl -s {shlex.quote(url + call.path)} -H 'Content-Type: application/json' -d {body}"
