"""The dynamic embedding: a row for every key that was trained lately, and its rowwise Adagrad.

Rows grow up to a budget; beyond it a new key takes the row of the one that was used least recently, and
starts as any new key does. Use is being in a micro-batch, of whatever rank: so ranks evict alike, and so does
a replay.

A key without a row has an initial vector that is a function of the key and the seed alone. So a server
scores an item that no version knows just as the trainer would have predicted it, and ranks that meet a new
key at the same time give it the same row without talking.
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from grstream.keys import Keys
from grstream.keytable import KeyTable
from kernels import embedding

# Retrieval normalises item vectors, so a short one gets long gradients: rows that start much shorter than
# this are steered by the retrieval loss alone until they have grown.
INITIAL_STD = 0.1
# Share of the rows that are put in order of last use at a time: sorting is then little beside all else.
_QUEUED = 1 / 16
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
        return embedding.gather(table, torch.from_numpy(rows).to(table.device)), known
    out = torch.empty(len(keys), table.shape[1], device=table.device)
    where = torch.from_numpy(known).to(table.device)
    out[where] = embedding.gather(table, torch.from_numpy(rows[known]).to(table.device))
    out[~where] = initial_rows(keys[~known], table.shape[1], seed).to(table.device)
    return out, known


class Mark(NamedTuple):
    """A moment of a vocabulary, up to which a version carries what was touched."""

    moment: int
    names: int  # that there were


class Touched(NamedTuple):
    """What no published version carries yet. Taking it changes nothing: `Vocabulary.carried` does."""

    rows: npt.NDArray[np.int64]  # (m,) ascending: new, given to another key, or updated
    names: dict[int, str]  # new ones
    mark: Mark


@dataclasses.dataclass(frozen=True)
class VocabularyState:
    """All of a vocabulary, in the order of its rows: n keys."""

    keys: Keys  # (n,)
    rows: npt.NDArray[np.float32]  # (n, dim)
    squares: npt.NDArray[np.float32]  # (n,) Adagrad's sum of mean squared gradients
    items: npt.NDArray[np.bool_]  # (n,) the key names an item, and may be retrieved
    counts: npt.NDArray[np.int64]  # (n,) events that were about it, an item
    used: npt.NDArray[np.int64]  # (n,) which admission it was last part of
    item_names: dict[int, str]  # of items whose ids are strings


class Vocabulary:
    """Keys to embedding rows, growing as keys come. Not thread-safe; a server builds one per version.

    Keys and what is known of them are in main memory, the rows and their optimizer on `device`. `budget` is
    the most rows, without which none is evicted; what one admission takes is never refused, though.
    """

    def __init__(
        self, dim: int, seed: int = 0, device: torch.device | str = "cpu", budget: int | None = None
    ) -> None:
        self.dim = dim
        self.seed = seed
        self.budget = budget
        self.evicted = 0  # keys so far
        self.fresh = np.empty(0, np.int64)  # rows that the last admission gave to keys without one
        self.device = torch.device(device)
        self.item_names: dict[int, str] = {}
        self._table = KeyTable()
        self._rows = torch.empty(0, dim, device=self.device)
        self._squares = torch.empty(0, device=self.device)
        self._items = np.empty(0, np.bool_)
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._used = np.empty(0, np.int64)
        self._admissions = 0
        # Rows in order of last use as of some admission, and that use: one used since is found by it.
        self._queue = self._queued_at = np.empty(0, np.int64)
        self.version: int | None = None  # that holds every row as it is, but for the touched ones
        self._touched_at = np.empty(0, np.int64)
        self._mark, self._carried = Mark(0, 0), Mark(-1, 0)

    @classmethod
    def from_rows(
        cls,
        dim: int,
        seed: int,
        keys: Keys,  # (n,) distinct
        rows: npt.NDArray[np.float32],  # (n, dim)
        items: npt.NDArray[np.bool_] | None = None,  # (n,) default: none is known to be an item
        device: torch.device | str = "cpu",
        budget: int | None = None,
    ) -> "Vocabulary":
        vocabulary = cls(dim, seed, device)
        vocabulary.admit(keys, np.zeros(len(keys), np.bool_) if items is None else items)
        vocabulary._rows[: len(keys)] = torch.from_numpy(np.array(rows))
        vocabulary.budget = budget
        return vocabulary

    @classmethod
    def from_state(
        cls,
        state: VocabularyState,
        seed: int,
        device: torch.device | str = "cpu",
        budget: int | None = None,
    ) -> "Vocabulary":
        dim = state.rows.shape[1]
        vocabulary = cls.from_rows(dim, seed, state.keys, state.rows, state.items, device, budget)
        vocabulary._squares[: len(state.keys)] = torch.from_numpy(np.array(state.squares))
        vocabulary._counts[: len(state.keys)] = state.counts
        vocabulary._used[: len(state.keys)] = state.used
        vocabulary._admissions = int(state.used.max(initial=0))
        vocabulary.item_names = dict(state.item_names)
        return vocabulary

    def state(self) -> VocabularyState:
        """A copy, which later updates do not touch."""
        n = len(self)
        return VocabularyState(
            keys=self._keys[:n].copy(),
            rows=self._rows[:n].cpu().numpy().copy(),
            squares=self._squares[:n].cpu().numpy().copy(),
            items=self._items[:n].copy(),
            counts=self._counts[:n].copy(),
            used=self._used[:n].copy(),
            item_names=dict(self.item_names),
        )

    def __len__(self) -> int:
        return len(self._table)

    def lookup(self, keys: Keys) -> npt.NDArray[np.int64]:
        """The row of each key, -1 where it has none: (n,)."""
        return self._table.find(keys)

    def admit(self, keys: Keys, items: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """The rows of distinct keys, until the next admission. `items`: which of them name an item.

        A new key gets the next row, or beyond the budget that of the key used least recently.
        """
        rows = self._table.find(keys)
        new = rows < 0
        self._admissions += 1
        self._used[rows[~new]] = self._admissions
        if new.any():
            if self.budget is not None:
                self._evict(min(len(self) + int(new.sum()) - self.budget, int(new.sum())))
            fresh = rows[new] = self._table.insert(keys[new])
            self._reserve(self._table.stop)
            at = torch.from_numpy(fresh).to(self.device)
            self._rows[at] = initial_rows(keys[new], self.dim, self.seed).to(self.device)
            self._squares[at] = 0
            self._counts[fresh] = 0
            self._items[fresh] = items[new]
            self._keys[fresh] = keys[new]
            self._used[fresh] = self._admissions
            self._touched_at[fresh] = self._mark.moment
        self.fresh = rows[new]
        return rows

    def _evict(self, count: int) -> None:
        """Forget keys that are not part of this admission, least recently used first, as many as there are.

        All rows are taken while new keys wait for them, so rows stay dense. Names stay: an item may come back
        by way of a history, whose events bring none.
        """
        while count > 0:
            stale = self._queue[self._used[self._queue] == self._queued_at]
            gone = stale[:count]
            if len(gone):
                self._table.remove(gone)
                self._used[gone] = -1
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
        return embedding.gather(self._rows, torch.from_numpy(rows).to(self.device))

    def vectors(self, keys: Keys) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """The vector of each key, and whether it has a row: (n, dim) and (n,)."""
        return vectors_of(keys, self._table.find(keys), self._rows, self.seed)

    def item_rows(self) -> npt.NDArray[np.int64]:
        """The rows of all items, ascending: (n,)."""
        return np.flatnonzero(self._items[: len(self)])

    def are_items(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return self._items[rows]

    def count(self, rows: npt.NDArray[np.int64]) -> None:
        """Another event about each of these items; a row may stand here several times."""
        np.add.at(self._counts, rows, 1)

    def popularity(self) -> torch.Tensor:
        """Each item's share of the counted events, as if it had had one more: float32, as `item_rows`."""
        counts = torch.from_numpy(self._counts[self.item_rows()] + 1)
        return counts.float() / counts.sum().clamp(min=1)

    def keys_of(self, rows: npt.NDArray[np.int64]) -> Keys:
        return self._keys[rows]

    def update(self, rows: npt.NDArray[np.int64], gradient: torch.Tensor, learning_rate: float) -> None:
        """Rowwise Adagrad: one accumulator a row, of the mean squared gradient. Rows are distinct."""
        at = torch.from_numpy(rows).to(self.device)
        embedding.rowwise_adagrad_(self._rows, self._squares, at, gradient, learning_rate)
        self._touched_at[rows] = self._mark.moment

    def touched(self) -> Touched:
        """All that changed since `version`, or ever. What changes from now on is not under its mark."""
        rows = np.flatnonzero(self._touched_at[: len(self)] > self._carried.moment)
        # Names only come, and a dict keeps the order in which they came.
        new = len(self.item_names) - self._carried.names
        names = dict(itertools.islice(reversed(self.item_names.items()), new))
        mark = Mark(self._mark.moment, len(self.item_names))
        self._mark = Mark(mark.moment + 1, mark.names)
        return Touched(rows, names, mark)

    def carried(self, mark: Mark, version: int) -> None:
        """A version that carries what was touched up to `mark` is durable."""
        self._carried, self.version = mark, version

    def _reserve(self, n: int) -> None:
        held = len(self._keys)
        if n <= held:
            return
        size = max(1024, n, held * 3 // 2)
        rows = torch.empty(size, self.dim, device=self.device)
        squares = torch.empty(size, device=self.device)
        rows[:held], squares[:held] = self._rows, self._squares
        self._rows, self._squares = rows, squares
        self._items = np.resize(self._items, size)
        self._keys = np.resize(self._keys, size)
        self._counts = np.resize(self._counts, size)
        self._used = np.resize(self._used, size)
        self._touched_at = np.resize(self._touched_at, size)
