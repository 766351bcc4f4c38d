"""Keys that have no row yet, and how many events each has had: admission by frequency.

Counts are exact and in bounded memory: keys are in two generations, a key that is counted moves to the young
one, and when that is full the old one is forgotten, with the keys that had no event for longest.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from grstream.keys import Keys
from grstream.keytable import KeyTable


@dataclasses.dataclass(frozen=True)
class CandidatesState:
    """All candidates, n keys in no order that matters."""

    keys: Keys  # (n,)
    counts: npt.NDArray[np.int64]  # (n,) events
    young: npt.NDArray[np.bool_]  # (n,)


class Candidates:
    """Keys until they have had `needed` events. Of more than `capacity` some are forgotten."""

    def __init__(self, needed: int, capacity: int) -> None:
        self.needed, self.capacity = needed, capacity
        self._young, self._old = _Generation(), _Generation()

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def count(self, keys: Keys, events: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Count events about distinct keys; which have now had enough: (n,). Those are candidates no more."""
        enough = np.zeros(len(keys), np.bool_)
        met = np.flatnonzero(events)
        keys, counts = keys[met], events[met].copy()
        for generation in (self._young, self._old):
            counts += generation.take(keys)
        enough[met] = counts >= self.needed
        left = counts < self.needed
        if len(self._young) >= (self.capacity + 1) // 2:
            self._old, self._young = self._young, _Generation()
        self._young.put(keys[left], counts[left])
        return enough

    def state(self) -> CandidatesState:
        """A copy."""
        (young, of_young), (old, of_old) = self._young.held(), self._old.held()
        return CandidatesState(
            keys=np.concatenate([young, old]),
            counts=np.concatenate([of_young, of_old]),
            young=np.repeat([True, False], [len(young), len(old)]),
        )

    def load(self, state: CandidatesState) -> None:
        """Become these, in the place of none."""
        self._young.put(state.keys[state.young], state.counts[state.young])
        self._old.put(state.keys[~state.young], state.counts[~state.young])


class _Generation:
    def __init__(self) -> None:
        self._table = KeyTable()
        self._counts = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._table)

    def take(self, keys: Keys) -> npt.NDArray[np.int64]:
        """The counts of those that are here, which they are no longer, and 0: (n,)."""
        slots = self._table.find(keys)
        here = slots >= 0
        out = np.where(here, self._counts[slots] if len(self._counts) else 0, 0)
        self._table.remove(slots[here])
        return out

    def put(self, keys: Keys, counts: npt.NDArray[np.int64]) -> None:
        """Keys that are not here."""
        slots = self._table.insert(keys)
        if self._table.stop > len(self._counts):
            self._counts = np.resize(self._counts, max(1024, self._table.stop * 3 // 2))
        self._counts[slots] = counts

    def held(self) -> tuple[Keys, npt.NDArray[np.int64]]:
        slots = self._table.slots()
        return self._table.keys(slots), self._counts[slots]
