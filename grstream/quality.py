"""Quality over sliding windows of event time, in total and by how much of its user was known (law 6).

A window of an hour holds the newest hour of event time, to within a sixtieth of it, whatever the order in
which a partition's events come. Partitions are not read abreast: while a stream is caught up with, one may
be months ahead of another. So each has a window of its own, which ends with its newest event, and figures are
over all of these together. One that has been read to its end, and is only quiet, has the window that ends
with the newest event of all such.

An event is counted with those that were predicted from as many events of their user; one that was placed in
the middle of its history is counted apart, with the late ones, and in no other figure.

Everything but GAUC is made of sums. GAUC needs pairs of one user's events: it is exact while a window holds
no more than GAUC_EVENTS timely ones, and beyond that is of a sample of users, half of them, then a quarter
and so on, chosen by their keys. A sample is without bias; its standard error is that of a mean over so many
users.
"""

import logging
from collections.abc import Collection, Iterator
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
_NEVER = -(2**62)
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

    def ends(self, caught_up: Collection[int | None] = ()) -> dict[int, int]:
        """Where the windows of each partition end, ms. `caught_up`: partitions read to their end."""
        together = max((newest for p, newest in self.newest.items() if p in caught_up), default=0)
        return {p: together if p in caught_up else newest for p, newest in self.newest.items()}

    def figures(self, caught_up: Collection[int | None] = ()) -> list[Figure]:
        """All that are defined: no slice without events, no entropy without both labels."""
        out: list[Figure] = []
        ends = self.ends(caught_up)
        for name, window in self._windows.items():
            within = window.within(ends)
            by_slice = window.total(within)
            rows = {ALL: by_slice[:-1].sum(0), **dict(zip(self._slices, by_slice, strict=True))}
            for slice_, row in rows.items():
                if row[0]:
                    out += [Figure(name, slice_, *figure) for figure in self._of(row)]
            for a, action in enumerate(self._actions):
                for s, value, events in window.gaucs(a, within):
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
    """Sums in parts of a window, for each partition: those of a time are at its place modulo the window."""

    def __init__(self, width_ms: int, slices: int, actions: int, fields: int) -> None:
        self._step_ms = -(-width_ms // PARTS)
        self.missed = 0
        self._newest = np.empty(
            0, np.int64
        )  # (P,) part of time, in steps since 1970; older than PARTS are gone
        self._sums = np.empty((0, PARTS, slices, fields))
        # The sample for GAUC. A part's level says by how many halvings its users were sampled at the least.
        self._level = 0  # at which events are taken now
        self._levels = np.empty((0, PARTS), np.int64)
        self._sampled = np.empty((0, PARTS), np.int64)  # events of each part
        self._rows = [_Sample.none(actions)]

    def add(self, p: Predictions, slices: Ints, sums: Floats) -> None:
        parts = p.times // self._step_ms
        self._reserve(int(p.partitions.max()) + 1)
        for partition in np.unique(p.partitions).tolist():
            self._advance(partition, int(parts[p.partitions == partition].max()))
        inside = parts > self._newest[p.partitions] - PARTS
        if not inside.all():
            self.missed += len(parts) - int(inside.sum())
            p, slices, sums, parts = p.where(inside), slices[inside], sums[inside], parts[inside]
            if not len(p):
                return
        places = p.partitions.astype(np.int64) * PARTS + parts % PARTS
        cells = places * self._sums.shape[2] + slices
        order = np.argsort(cells, kind="stable")
        cells = cells[order]
        starts = np.flatnonzero(np.append(True, cells[1:] != cells[:-1]))
        flat = self._sums.reshape(-1, sums.shape[1])
        flat[cells[starts]] += np.add.reduceat(sums[order], starts, axis=0)
        rows = _Sample(p.users, p.partitions, parts, slices.astype(np.int8), p.labels, p.probabilities)
        self._take(rows, ~p.late)

    def _reserve(self, partitions: int) -> None:
        more = partitions - len(self._newest)
        if more > 0:
            self._newest = np.append(self._newest, np.full(more, _NEVER))
            self._sums = np.concatenate([self._sums, np.zeros((more, *self._sums.shape[1:]))])
            self._levels = np.concatenate([self._levels, np.full((more, PARTS), self._level)])
            self._sampled = np.concatenate([self._sampled, np.zeros((more, PARTS), np.int64)])

    def _advance(self, partition: int, part: int) -> None:
        newest = int(self._newest[partition])
        if part <= newest:
            return
        gone = np.arange(max(newest, part - PARTS) + 1, part + 1) % PARTS
        self._sums[partition, gone] = 0
        self._levels[partition, gone] = self._level
        self._sampled[partition, gone] = 0
        self._newest[partition] = part

    def within(self, ends_ms: dict[int, int]) -> npt.NDArray[np.bool_]:
        """Which parts belong to the windows that end there: (P, PARTS)."""
        held = self._newest[:, None] - (self._newest[:, None] - np.arange(PARTS)) % PARTS
        ends = np.array([ends_ms.get(p, 0) for p in range(len(self._newest))], np.int64) // self._step_ms
        return held > ends[:, None] - PARTS

    def total(self, within: npt.NDArray[np.bool_]) -> Floats:
        """Sums by slice: (S, fields)."""
        return self._sums[within].sum(0)

    # -- the sample -------------------------------------------------------------------------------------

    @property
    def share(self) -> float:
        """Of the users that GAUC is over."""
        return 0.5 ** int(self._levels.max(initial=0))

    def _take(self, rows: "_Sample", timely: npt.NDArray[np.bool_]) -> None:
        """Into the sample. What it holds afterwards depends on the stream alone, not on when it is tidied."""
        rows = rows.where(timely & (rows.draws() < 0.5**self._level))
        self._rows.append(rows)
        self._sampled += self._counts(rows)
        while self._sampled.sum() > GAUC_EVENTS and self._level < _LEAST_SHARE:
            self._level += 1
            self._levels = np.maximum(self._levels, self._level)
            live = self._live()
            self._rows = [live.where(live.draws() < 0.5**self._level)]
            self._sampled = self._counts(self._rows[0])
        if self._level and self._sampled.sum() * 4 < GAUC_EVENTS and self._levels.max() == self._level:
            self._level -= 1
        if len(self._rows) > PARTS or sum(len(r.users) for r in self._rows) > 2 * GAUC_EVENTS:
            self._live()

    def _counts(self, rows: "_Sample") -> Ints:
        """Events by partition and part: (P, PARTS)."""
        places = rows.partitions.astype(np.int64) * PARTS + rows.parts % PARTS
        return np.bincount(places, minlength=self._sampled.size).reshape(self._sampled.shape)

    def _live(self) -> "_Sample":
        """The sampled events that the windows still hold, in stream order; the others are let go."""
        rows = _Sample.concat(self._rows)
        if len(self._newest):
            rows = rows.where(rows.parts > self._newest[rows.partitions] - PARTS)
        self._rows = [rows]
        return rows

    def gaucs(self, action: int, within: npt.NDArray[np.bool_]) -> Iterator[tuple[int | None, float, int]]:
        """Slice, None for all, GAUC, and the events of users that have both labels."""
        rows = self._live()
        rows = rows.where(within[rows.partitions, rows.parts % PARTS] & (rows.draws() < self.share))
        labels, scores = rows.labels[:, action], rows.probabilities[:, action]
        _, aucs, events = user_aucs(rows.users, labels, scores)
        if len(aucs):
            yield None, float(np.average(aucs, weights=events)), int(events.sum())
        slices = self._sums.shape[2]
        _, user = np.unique(rows.users, return_inverse=True)
        which, aucs, events = user_aucs(user * slices + rows.slices, labels, scores)
        for s in np.unique(which % slices).tolist():
            of = which % slices == s
            yield s, float(np.average(aucs[of], weights=events[of])), int(events[of].sum())

    # -- state ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        cells = self._sums.reshape(-1, self._sums.shape[3])
        filled = np.flatnonzero(cells[:, 0])
        return {
            "missed": self.missed,
            "newest": self._newest.copy(),
            "filled": filled,
            "sums": cells[filled],
            "level": self._level,
            "levels": self._levels.copy(),
            "sampled": self._sampled.copy(),
            "rows": {name: column.copy() for name, column in self._live()._asdict().items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.missed, self._newest = state["missed"], state["newest"].copy()
        self._sums = np.zeros((len(self._newest), *self._sums.shape[1:]))
        self._sums.reshape(-1, self._sums.shape[3])[state["filled"]] = state["sums"]
        self._level, self._levels = state["level"], state["levels"].copy()
        self._sampled = state["sampled"].copy()
        self._rows = [_Sample(**state["rows"])]


class _Sample(NamedTuple):
    """Timely events that GAUC is made of: n of them."""

    users: Ints  # (n,) user keys
    partitions: npt.NDArray[np.int32]  # (n,)
    parts: Ints  # (n,) of the window
    slices: npt.NDArray[np.int8]  # (n,)
    labels: npt.NDArray[np.bool_]  # (n, A)
    probabilities: npt.NDArray[np.float32]  # (n, A)

    @classmethod
    def none(cls, actions: int) -> "_Sample":
        return cls(
            np.empty(0, np.int64),
            np.empty(0, np.int32),
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
