"""Quality over sliding windows of event time, in total and by how much of its user was known (law 6).

A window of an hour holds the newest hour of event time, to within a sixtieth of it, whatever the order in
which events come. An event is counted with those that were predicted from as many events of their user; one
that was placed in the middle of its history is counted apart, with the late ones, and in no other figure.

Everything but GAUC is made of sums. GAUC needs pairs of one user's events: it is exact while a window holds
no more than GAUC_EVENTS timely ones, and beyond that is of a sample of users, half of them, then a quarter
and so on, chosen by their keys. A sample is without bias; its standard error is that of a mean over so many
users.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from grstream.config import QualityConfig
from grstream.metrics import Floats, Predictions, entropy, log_loss, user_aucs

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

PARTS = 60  # a window slides in steps of so small a part of it
GAUC_EVENTS = 10_000  # per window: 70 bytes and less each, in memory and in a checkpoint
ALL, LATE = "all", "late"
_LEAST_SHARE = 53  # halvings, beyond which no user is left


class Figure(NamedTuple):
    """One figure of one window."""

    window: str  # its length, such as 24h
    slice: str  # which events: ALL timely ones, those of a range of history lengths, or the LATE ones
    action: str | None
    name: str  # events, ne, calibration, gauc, gauc_share (of users) or hr@<k>
    value: float
    events: int  # that it is made of


def window_name(hours: float) -> str:
    return f"{hours:g}h"


def slice_names(bounds: list[int]) -> list[str]:
    """Of the ranges of history lengths that these ascending bounds make, shortest first."""
    names, first = [], 0
    for bound in bounds:
        names.append(f"history {first}" if bound == first + 1 else f"history {first}-{bound - 1}")
        first = bound
    return [*names, f"history {first}+"]


class WindowedQuality:
    """Figures of all configured windows, fed with each step's predictions, in stream order."""

    def __init__(self, actions: list[str], config: QualityConfig) -> None:
        self._actions, self._config = actions, config
        self._bounds = np.array(config.history, np.int64)
        self._slices = [*slice_names(config.history), LATE]
        self.newest: dict[int, int] = {}  # partition -> greatest event time predicted, ms
        self._windows = {
            window_name(hours): _Window(
                round(hours * 3_600_000), len(self._slices), len(actions), self._fields
            )
            for hours in config.windows_h
        }

    @property
    def _fields(self) -> int:
        """Sums: events, those asked for retrieval, hits at each k; per action loss, labels, probability."""
        return 2 + len(self._config.hit_at) + 3 * len(self._actions)

    @property
    def clock(self) -> int:
        """The greatest event time predicted, ms; 0 before the first."""
        return max(self.newest.values(), default=0)

    @property
    def missed(self) -> dict[str, int]:
        """By window: events that came when it had moved on beyond them."""
        return {name: window.missed for name, window in self._windows.items()}

    def update(self, p: Predictions) -> None:
        if not len(p):
            return
        for partition in np.unique(p.partitions).tolist():
            newest = int(p.times[p.partitions == partition].max())
            self.newest[partition] = max(newest, self.newest.get(partition, newest))
        slices = np.searchsorted(self._bounds, p.history, side="right")
        slices[p.late] = len(self._bounds) + 1
        sums = self._sums(p)
        for window in self._windows.values():
            window.add(p, slices, sums)

    def _sums(self, p: Predictions) -> Floats:
        """What each event adds: (N, fields)."""
        asked = p.ranks >= 0
        columns = [np.ones(len(p)), asked]
        columns += [asked & (p.ranks < k) for k in self._config.hit_at]
        per_action = [log_loss(p.probabilities, p.labels), p.labels, p.probabilities]
        return np.column_stack([*columns, *per_action]).astype(np.float64)

    def figures(self) -> list[Figure]:
        """All that are defined: no slice without events, no entropy without both labels."""
        out: list[Figure] = []
        for name, window in self._windows.items():
            by_slice = window.sums.sum(0)
            rows = {ALL: by_slice[:-1].sum(0), **dict(zip(self._slices, by_slice, strict=True))}
            for slice_, row in rows.items():
                if row[0]:
                    out += [Figure(name, slice_, *figure) for figure in self._of(row)]
            for a, action in enumerate(self._actions):
                for s, value, events in window.gaucs(a):
                    slice_ = ALL if s is None else self._slices[s]
                    out.append(Figure(name, slice_, action, "gauc", value, events))
            share = window.share
            out.append(Figure(name, ALL, None, "gauc_share", share, round(rows[ALL][0] * share)))
        return out

    def _of(self, row: Floats) -> Iterator[tuple[str | None, str, float, int]]:
        """Action, name, value and events of what sums tell."""
        events, asked = int(row[0]), int(row[1])
        yield None, "events", events, events
        for k, hits in zip(self._config.hit_at, row[2:], strict=False):
            if asked:
                yield None, f"hr@{k}", float(hits) / asked, asked
        loss, positives, predicted = row[2 + len(self._config.hit_at) :].reshape(3, -1)
        for a, action in enumerate(self._actions):
            base = entropy(positives[a] / events) * events
            if base:
                yield action, "ne", float(loss[a] / base), events
            if positives[a]:
                yield action, "calibration", float(predicted[a] / positives[a]), events

    # -- state ------------------------------------------------------------------------------------------

    @property
    def _meaning(self) -> dict[str, Any]:
        """What the sums of a state are sums of."""
        return {
            "parts": PARTS,
            "actions": self._actions,
            "hit_at": self._config.hit_at,
            "history": self._config.history,
        }

    def state(self) -> dict[str, Any]:
        """A copy of all of it."""
        windows = {name: window.state() for name, window in self._windows.items()}
        return {"meaning": self._meaning, "newest": dict(self.newest), "windows": windows}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state. Windows begin anew that it lacks, and all do where it is of something else."""
        self.newest = dict(state["newest"])
        if state["meaning"] != self._meaning:
            logger.warning(
                "actions, quality.hit_at or quality.history changed: all windows of quality begin anew"
            )
            return
        for name, held in state["windows"].items():
            if name in self._windows:
                self._windows[name].load(held)


class _Window:
    """Sums in parts of the window, each with the place of its time modulo the window."""

    def __init__(self, width_ms: int, slices: int, actions: int, fields: int) -> None:
        self._step_ms = -(-width_ms // PARTS)
        self._newest: int | None = None  # part of time, in steps since 1970; older ones than PARTS are gone
        self.missed = 0
        self.sums = np.zeros((PARTS, slices, fields))
        # The sample for GAUC. A part's level says by how many halvings its users were sampled at the least.
        self._level = 0  # at which events are taken now
        self._levels = np.zeros(PARTS, np.int64)
        self._sampled = np.zeros(PARTS, np.int64)  # events of each part
        self._rows = [_Sample.none(actions)]

    def add(self, p: Predictions, slices: Ints, sums: Floats) -> None:
        parts = p.times // self._step_ms
        self._advance(int(parts.max()))
        assert self._newest is not None
        inside = parts > self._newest - PARTS
        if not inside.all():
            self.missed += len(parts) - int(inside.sum())
            p, slices, sums, parts = p.where(inside), slices[inside], sums[inside], parts[inside]
            if not len(p):
                return
        cells = parts % PARTS * self.sums.shape[1] + slices
        order = np.argsort(cells, kind="stable")
        cells = cells[order]
        starts = np.flatnonzero(np.append(True, cells[1:] != cells[:-1]))
        self.sums.reshape(-1, sums.shape[1])[cells[starts]] += np.add.reduceat(sums[order], starts, axis=0)
        self._take(_Sample(p.users, parts, slices.astype(np.int8), p.labels, p.probabilities), ~p.late)

    def _advance(self, part: int) -> None:
        if self._newest is None:
            self._newest = part
        if part <= self._newest:
            return
        gone = np.arange(max(self._newest, part - PARTS) + 1, part + 1) % PARTS
        self.sums[gone] = 0
        self._levels[gone] = self._level
        self._sampled[gone] = 0
        self._newest = part

    # -- the sample -------------------------------------------------------------------------------------

    @property
    def share(self) -> float:
        """Of the users that GAUC is over."""
        return 0.5 ** int(self._levels.max())

    def _take(self, rows: "_Sample", timely: npt.NDArray[np.bool_]) -> None:
        """Into the sample. What it holds afterwards depends on the stream alone, not on when it is tidied."""
        rows = rows.where(timely & (rows.draws() < 0.5**self._level))
        self._rows.append(rows)
        self._sampled += np.bincount(rows.parts % PARTS, minlength=PARTS)
        while self._sampled.sum() > GAUC_EVENTS and self._level < _LEAST_SHARE:
            self._level += 1
            self._levels = np.maximum(self._levels, self._level)
            live = self._live()
            self._rows = [live.where(live.draws() < 0.5**self._level)]
            self._sampled = np.bincount(self._rows[0].parts % PARTS, minlength=PARTS)
        if self._level and self._sampled.sum() * 4 < GAUC_EVENTS and self._levels.max() == self._level:
            self._level -= 1
        if len(self._rows) > PARTS or sum(len(r.users) for r in self._rows) > 2 * GAUC_EVENTS:
            self._live()

    def _live(self) -> "_Sample":
        """The sampled events that the window still holds, in stream order; the others are let go."""
        rows = _Sample.concat(self._rows)
        if self._newest is not None:
            rows = rows.where(rows.parts > self._newest - PARTS)
        self._rows = [rows]
        return rows

    def gaucs(self, action: int) -> Iterator[tuple[int | None, float, int]]:
        """Slice, None for all, GAUC, and the events of users that have both labels."""
        rows = self._live()
        rows = rows.where(rows.draws() < self.share)
        labels, scores = rows.labels[:, action], rows.probabilities[:, action]
        _, aucs, events = user_aucs(rows.users, labels, scores)
        if len(aucs):
            yield None, float(np.average(aucs, weights=events)), int(events.sum())
        slices = self.sums.shape[1]
        _, user = np.unique(rows.users, return_inverse=True)
        which, aucs, events = user_aucs(user * slices + rows.slices, labels, scores)
        for s in np.unique(which % slices).tolist():
            of = which % slices == s
            yield s, float(np.average(aucs[of], weights=events[of])), int(events[of].sum())

    # -- state ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "newest": self._newest,
            "missed": self.missed,
            "sums": self.sums.copy(),
            "level": self._level,
            "levels": self._levels.copy(),
            "sampled": self._sampled.copy(),
            "rows": {name: column.copy() for name, column in self._live()._asdict().items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        self._newest, self.missed, self.sums = state["newest"], state["missed"], state["sums"].copy()
        self._level, self._levels = state["level"], state["levels"].copy()
        self._sampled = state["sampled"].copy()
        self._rows = [_Sample(**state["rows"])]


class _Sample(NamedTuple):
    """Timely events that GAUC is made of: n of them."""

    users: Ints  # (n,) user keys
    parts: Ints  # (n,) of the window
    slices: npt.NDArray[np.int8]  # (n,)
    labels: npt.NDArray[np.bool_]  # (n, A)
    probabilities: npt.NDArray[np.float32]  # (n, A)

    @classmethod
    def none(cls, actions: int) -> "_Sample":
        return cls(
            np.empty(0, np.int64),
            np.empty(0, np.int64),
            np.empty(0, np.int8),
            np.empty((0, actions), np.bool_),
            np.empty((0, actions), np.float32),
        )

    @classmethod
    def concat(cls, parts: "list[_Sample]") -> "_Sample":
        columns: list[Any] = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return cls(*columns)

    def where(self, mask: npt.NDArray[np.bool_]) -> "_Sample":
        columns: list[Any] = [column[mask] for column in self]
        return _Sample(*columns)

    def draws(self) -> Floats:
        """A number from 0 to 1 for each event that is its user's, whose key is one already: (n,)."""
        return (self.users.view(np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
