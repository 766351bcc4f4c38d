"""The dynamic embedding: a row for every key that was trained lately, and its rowwise optimizer.

Rows grow up to a budget; beyond it a new key takes the row of the one that was used least recently, and
starts as any new key does. Use is being in a micro-batch, of whatever rank: so a replay evicts alike. Where a
key must be met more than once to get a row, `Candidates` counts. With several ranks each holds the keys that
are its own (`grstream.shards`).

A key without a row has an initial vector that is a function of the key and the seed alone. So a server
scores an item that no version knows just as the trainer would have predicted it, and ranks that meet a new
key at the same time give it the same row without talking.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from grstream.candidates import Candidates, CandidatesState
from grstream.keys import Keys
from grstream.keytable import KeyTable
from grstream.row_optimizers import OPTIMIZERS, Columns
from kernels import embedding

# Retrieval normalises item vectors, so a short one gets long gradients: rows that start much shorter than
# this are steered by the retrieval loss alone until they have grown.
INITIAL_STD = 0.1
# Share of the rows that are put in order of last use at a time: sorting is then little beside all else.
_QUEUED = 1 / 16
DAY_MS = 86_400_000
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64


def initial_rows(keys: Keys, dim: int, seed: int) -> torch.Tensor:
    """Uniform vectors of standard deviation INITIAL_STD drawn by the keys themselves: (n, dim) float32."""
    counter = np.arange(1, dim + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = keys.view(np.uint64)[:, None] + (counter + np.uint64(seed * _MIX[1] % 2**64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX[1])
    x ^= x >> np.uint64(31)
    unit = (x >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - 1
    return torch.from_numpy(unit * np.float32(INITIAL_STD * 3**0.5))


def vectors_of(
    keys: Keys,  # (n,)
    rows: npt.NDArray[np.int64],  # (n,) -1 of a key without one
    table: torch.Tensor,  # (N, dim)
    seed: int,
) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
    """The vector of each key, its initial one if it has no row, and whether it has: (n, dim) and (n,)."""
    known = rows >= 0
    if known.all():
        return embedding.gather(table, on(table.device, rows)), known
    out = torch.empty(len(keys), table.shape[1], device=table.device)
    out[on(table.device, np.flatnonzero(known))] = embedding.gather(table, on(table.device, rows[known]))
    fresh = initial_rows(keys[~known], table.shape[1], seed)
    out[on(table.device, np.flatnonzero(~known))] = fresh.to(table.device, non_blocking=True)
    return out, known


class Touched(NamedTuple):
    """What no published version carries yet. Taking it changes nothing: `Vocabulary.carried` does."""

    rows: npt.NDArray[np.int64]  # (m,) ascending: new, given to another key, named, or updated
    names: dict[int, str]  # of the items among them
    mark: int  # up to which a version carries what was touched


def on(device: torch.device, array: npt.NDArray) -> torch.Tensor:
    """The array on the device, which is not waited for; on a CPU a view."""
    return torch.from_numpy(array).to(device, non_blocking=True)


@dataclasses.dataclass(frozen=True)
class VocabularyState:
    """All of a vocabulary, in the order of its rows: n keys."""

    keys: Keys  # (n,)
    rows: npt.NDArray[np.float32]  # (n, dim)
    optimizer: Columns  # (n, ...) each, see `grstream.row_optimizers`
    items: npt.NDArray[np.bool_]  # (n,) the key names an item, and may be retrieved
    levels: npt.NDArray[np.float64]  # (n, horizons) of the decayed counts of the events about it, an item
    clock_ms: int  # greatest time of an event that was counted
    used: npt.NDArray[np.int64]  # (n,) which admission it was last part of
    item_names: dict[int, str]  # of those whose ids are strings
    admissions: int  # so far
    budget: int | None  # that all these are within, or as large as one admission was
    candidates: CandidatesState | None = None


class Vocabulary:
    """Keys to embedding rows, growing as keys come. Not thread-safe; a server builds one per version.

    Keys and what is known of them are in main memory, the rows and their optimizer on `device`. `budget` is
    the most rows, without which none is evicted; what one admission takes is never refused, though. Without
    `candidates` a key gets a row the first time that it is met.

    Of each item the events are counted, each of them worth half as much after every half-life. Kept is the
    logarithm of what the count would be at time 0, `level` = log2 Σ 2^(t / half-life), which nothing but an
    event of the item changes.
    """

    def __init__(
        self,
        dim: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        budget: int | None = None,
        optimizer: str = "adagrad",  # of OPTIMIZERS
        candidates: Candidates | None = None,
        half_lives_days: Sequence[float] = (),
    ) -> None:
        self.dim = dim
        self.seed = seed
        self.budget = budget
        self.evicted = 0  # keys so far
        self.fresh = np.empty(0, np.int64)  # rows that the last admission gave to keys without one
        self.device = torch.device(device)
        self.item_names: dict[int, str] = {}  # of items that have a row
        self.clock_ms = 0  # greatest time of an event that was counted, at whichever rank
        self._candidates = candidates
        self._table = KeyTable()
        self._rows = torch.empty(0, dim, device=self.device)
        self._optimizer = OPTIMIZERS[optimizer](dim, self.device)
        self._items = np.empty(0, np.bool_)
        self._keys = np.empty(0, np.int64)
        self._half_lives = np.array(half_lives_days, np.float64) * DAY_MS
        self._levels = np.empty((0, len(self._half_lives)))
        self._used = np.empty(0, np.int64)
        self._admissions = 0
        # Rows in order of last use as of some admission, and that use: one used since is found by it.
        self._queue = self._queued_at = np.empty(0, np.int64)
        self.version: int | None = None  # that holds every row as it is, but for the touched ones
        self._touched_at = np.empty(0, np.int64)
        self.carried_mark = -1  # what was touched up to it is in that version
        self._moment = 0

    def restore(self, state: VocabularyState) -> None:
        """Become what the state was, in the place of an empty vocabulary.

        Of a state of a larger budget, what was used least recently is left out.
        Raises ValueError where the rows are another optimizer's.
        """
        kept = np.arange(len(state.keys))
        lowered = self.budget is not None and (state.budget is None or self.budget < state.budget)
        if self.budget is not None and lowered and len(kept) > self.budget:
            kept = np.sort(np.argsort(state.used, kind="stable")[-self.budget :])
        rows = self._table.insert(state.keys[kept])
        self._reserve(len(kept))
        self._rows[: len(kept)] = on(self.device, np.array(state.rows[kept]))
        self._optimizer.load({name: column[kept] for name, column in state.optimizer.items()})
        self._keys[rows] = state.keys[kept]
        self._items[rows] = state.items[kept]
        self._levels[rows] = state.levels[kept]
        self._used[rows] = state.used[kept]
        self._touched_at[rows] = self._moment
        self.clock_ms = state.clock_ms
        self._admissions = state.admissions
        self.name(state.item_names)
        if self._candidates is not None and state.candidates is not None:
            self._candidates.load(state.candidates)

    def state(self) -> VocabularyState:
        """A copy, which later updates do not touch."""
        n = len(self)
        return VocabularyState(
            keys=self._keys[:n].copy(),
            rows=self._rows[:n].cpu().numpy().copy(),
            optimizer=self._optimizer.state(n),
            items=self._items[:n].copy(),
            levels=self._levels[:n].copy(),
            clock_ms=self.clock_ms,
            used=self._used[:n].copy(),
            item_names=dict(self.item_names),
            admissions=self._admissions,
            budget=self.budget,
            candidates=None if self._candidates is None else self._candidates.state(),
        )

    def __len__(self) -> int:
        return len(self._table)

    def lookup(self, keys: Keys) -> npt.NDArray[np.int64]:
        """The row of each key, -1 where it has none: (n,)."""
        return self._table.find(keys)

    def admit(
        self,
        keys: Keys,  # (n,) distinct
        items: npt.NDArray[np.bool_],  # (n,) which name an item that may be retrieved from now on
        events: npt.NDArray[np.int64] | None = None,  # (n,) about each, for candidates; default: one
    ) -> npt.NDArray[np.int64]:
        """The rows of these keys, until the next admission; -1 of a key that must be met more often.

        A new key gets the next row, or beyond the budget that of the key used least recently.
        """
        rows = self._table.find(keys)
        new = rows < 0
        self._admissions += 1
        self._used[rows[~new]] = self._admissions
        named = rows[~new & items]
        self._touched_at[named[~self._items[named]]] = self._moment
        self._items[named] = True
        if self._candidates is not None:
            events = np.ones(len(keys), np.int64) if events is None else events
            new[new] = self._candidates.count(keys[new], events[new])
        if new.any():
            if self.budget is not None:
                self._evict(min(len(self) + int(new.sum()) - self.budget, int(new.sum())))
            fresh = rows[new] = self._table.insert(keys[new])
            self._reserve(self._table.stop)
            at = on(self.device, fresh)
            self._rows[at] = initial_rows(keys[new], self.dim, self.seed).to(self.device, non_blocking=True)
            self._optimizer.clear(at)
            self._levels[fresh] = -np.inf
            self._items[fresh] = items[new]
            self._keys[fresh] = keys[new]
            self._used[fresh] = self._admissions
            self._touched_at[fresh] = self._moment
        self.fresh = rows[new]
        return rows

    def name(self, names: Mapping[int, str]) -> None:
        """Keep the names of items that have a row. An item without one brings it again, with an event."""
        if names:
            rows = self._table.find(np.fromiter(names, np.int64, len(names))).tolist()
            kept = zip(names.items(), rows, strict=True)
            new = {row: named for named, row in kept if row >= 0 and named not in self.item_names.items()}
            self.item_names.update(new.values())
            self._touched_at[list(new)] = self._moment  # a name alone is a change, too

    def _evict(self, count: int) -> None:
        """Forget keys that are not part of this admission, least recently used first, as many as there are.

        All rows are taken while new keys wait for them, so rows stay dense. Nothing of a key stays, its name
        neither: one that comes back by way of a history is no item until an event about it brings both.
        """
        while count > 0:
            stale = self._queue[self._used[self._queue] == self._queued_at]
            gone = stale[:count]
            if len(gone):
                self._table.remove(gone)
                self._used[gone] = -1
                if self.item_names:
                    for key in self._keys[gone].tolist():
                        self.item_names.pop(key, None)
                self.evicted += len(gone)
                count -= len(gone)
                self._queue = stale[len(gone) :]
                self._queued_at = self._used[self._queue]
                continue
            used = self._used[: self._table.stop]
            idle = np.flatnonzero((used >= 0) & (used < self._admissions))
            if not len(idle):
                return
            size = min(len(idle), max(count, int(len(used) * _QUEUED)))
            bound = np.partition(used[idle], size - 1)[size - 1]
            oldest = idle[used[idle] <= bound]
            self._queue = oldest[np.argsort(used[oldest], kind="stable")]
            self._queued_at = used[self._queue]

    def gather(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """A copy of these rows: (n, dim)."""
        return embedding.gather(self._rows, on(self.device, rows))

    def vectors(self, keys: Keys) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """The vector of each key, and whether it has a row: (n, dim) and (n,)."""
        return self.fetch(keys, self._table.find(keys))

    def fetch(self, keys: Keys, rows: npt.NDArray[np.int64]) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """As `vectors`, of keys whose rows, -1 where they have none, are known."""
        return vectors_of(keys, rows, self._rows, self.seed)

    def item_rows(self) -> npt.NDArray[np.int64]:
        """The rows of all items, ascending: (n,)."""
        return np.flatnonzero(self._items[: len(self)])

    def are_items(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return self._items[rows]

    def count(self, items: Keys, times: npt.NDArray[np.int64]) -> None:
        """Another event about each of these items, at a time in ms; one may stand here several times.

        Of those without a row only the time counts.
        """
        rows = self._table.find(items)
        known = rows >= 0
        np.logaddexp2.at(self._levels, rows[known], times[known, None] / self._half_lives)
        self.clock_ms = max(self.clock_ms, int(times.max(initial=0)))

    def popularity(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """log(1 + count) of each item, by half-life, as of the newest event counted: (n, horizons)."""
        decayed = np.exp2(self._levels[rows] - self.clock_ms / self._half_lives)
        return np.log1p(decayed).astype(np.float32)

    def keys_of(self, rows: npt.NDArray[np.int64]) -> Keys:
        return self._keys[rows]

    def update(self, rows: npt.NDArray[np.int64], gradient: torch.Tensor, learning_rate: float) -> None:
        """A step of the rowwise optimizer. Rows are distinct."""
        self._optimizer.update(self._rows, on(self.device, rows), gradient, learning_rate)
        self._touched_at[rows] = self._moment

    def touched(self) -> Touched:
        """All that changed since `version`, or ever. What changes from now on is not under its mark."""
        rows = np.flatnonzero(self._touched_at[: len(self)] > self.carried_mark)
        names = self.item_names
        if names:
            names = {key: names[key] for key in self._keys[rows].tolist() if key in names}
        self._moment += 1
        return Touched(rows, names, self._moment - 1)

    def carried(self, mark: int, version: int) -> None:
        """A version that carries what was touched up to `mark` is durable."""
        self.carried_mark, self.version = mark, version

    def _reserve(self, n: int) -> None:
        held = len(self._keys)
        if n <= held:
            return
        size = max(1024, n, held * 3 // 2)
        rows = torch.empty(size, self.dim, device=self.device)
        rows[:held] = self._rows
        self._rows = rows
        self._optimizer.grow(size)
        self._items = np.resize(self._items, size)
        self._keys = np.resize(self._keys, size)
        self._levels = np.resize(self._levels, (size, len(self._half_lives)))
        self._used = np.resize(self._used, size)
        self._touched_at = np.resize(self._touched_at, size)
