"""The strings of string ids, for the items that some event still has."""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from grstream.keys import Keys
from grstream.keytable import KeyTable

_SPARE = 4096
_KEYS_AT_ONCE = 1 << 16


class ItemNames:
    """Item keys to ids. Bounded by `prune`; no logic may depend on what it holds."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._kept = 0  # when last pruned

    def update(self, names: Mapping[int, str] | Iterable[tuple[int, str]]) -> None:
        self._names.update(names)

    def of(self, items: Keys) -> dict[int, str]:
        """The names of those of these items that have one."""
        names = self._names
        return {k: names[k] for k in items.tolist() if k in names} if names else {}

    def prune(self, stored: npt.NDArray[np.int64]) -> None:
        """Keep the names of stored items alone, once they may be less than half of all."""
        if len(self._names) <= 2 * self._kept + _SPARE:
            return
        keys = np.fromiter(self._names, np.int64, len(self._names))
        table = KeyTable(len(keys))
        table.insert(keys)  # in slots 0, 1, ...
        used = np.zeros(len(keys), np.bool_)
        for start in range(0, len(stored), _KEYS_AT_ONCE):
            found = table.find(stored[start : start + _KEYS_AT_ONCE])
            used[found[found >= 0]] = True
        self._names = {k: self._names[k] for k in keys[used].tolist()}
        self._kept = len(self._names)
