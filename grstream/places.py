"""Where the rows of all ranks stand in a version: a row keeps its place from version to version.

Ranks number their rows apart, each from 0 up. A row gets the next free place when it is first met; those of a
single rank are its places.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from grstream.keys import Keys
from grstream.ranks import Ints
from grstream.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of a rank, copied: m of them."""

    rows: Ints  # (m,) their numbers there
    keys: Keys  # (m,)
    vectors: npt.NDArray[np.float32]  # (m, d)
    items: npt.NDArray[np.bool_]  # (m,)
    names: dict[int, str]  # of the items

    @classmethod
    def of(cls, held: Vocabulary, rows: Ints, names: dict[int, str]) -> "Part":
        vectors = held.gather(rows).cpu().numpy()
        return cls(rows, held.keys_of(rows), vectors, held.are_items(rows), dict(names))


class Places:
    """Of one group of ranks, kept by rank 0."""

    def __init__(self) -> None:
        self._of_rank: list[Ints] = []
        self.size = 0

    def grow(self, sizes: Sequence[int]) -> None:
        """Make room for so many rows of each rank; a rank's rows grow only."""
        if not self._of_rank:
            self._of_rank = [np.empty(0, np.int64)] * len(sizes)
        for rank, size in enumerate(sizes):
            more = size - len(self._of_rank[rank])
            if more:
                new = np.arange(self.size, self.size + more)
                self._of_rank[rank] = np.concatenate([self._of_rank[rank], new])
                self.size += more

    def of_every_row(self, columns: Sequence[npt.NDArray]) -> npt.NDArray:
        """What each rank says of its rows, by place: (size,)."""
        laid = np.zeros(self.size, columns[0].dtype)
        for places, column in zip(self._of_rank, columns, strict=True):
            laid[places] = column
        return laid

    def laid_out(self, parts: Sequence[Part]) -> tuple[Ints, dict[str, Any]]:
        """The places, ascending, of rows of every rank, and what stands there: as `Delta` has it."""
        places = np.concatenate([of[part.rows] for of, part in zip(self._of_rank, parts, strict=True)])
        order = np.argsort(places)

        def column(arrays: Sequence[npt.NDArray]) -> npt.NDArray:
            return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)[order]

        return places[order], {
            "keys": column([part.keys for part in parts]),
            "rows": column([part.vectors for part in parts]),
            "items": column([part.items for part in parts]),
            "item_names": {key: name for part in parts for key, name in part.names.items()},
        }
