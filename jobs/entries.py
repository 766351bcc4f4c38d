"""Rows of the log of quality, to be asked by name."""

import dataclasses
from collections.abc import Iterable
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grstream.journal import Mark
from grstream.quality_log import undone

_WORDS = ("run", "window", "slice", "action", "figure")


@dataclasses.dataclass(frozen=True)
class Entries:
    """R rows in the order of time."""

    table: pa.Table

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        return cls(table.unify_dictionaries().combine_chunks())

    def __len__(self) -> int:
        return len(self.table)

    @property
    def at(self) -> npt.NDArray[np.int64]:
        """(R,) ms, wall clock"""
        return self.table["at_ms"].to_numpy()

    @property
    def event(self) -> npt.NDArray[np.int64]:
        """(R,) ms, newest event time"""
        return self.table["event_ms"].to_numpy()

    @property
    def entries(self) -> npt.NDArray[np.int64]:
        """(R,) of the run's journal"""
        return self.table["entries"].to_numpy()

    @property
    def value(self) -> npt.NDArray[np.float64]:
        """(R,)"""
        return self.table["value"].to_numpy()

    def where(self, partition: int | None = None, **words: str) -> Self:
        """The rows that are of these."""
        mask = np.ones(len(self), bool)
        for name, word in words.items():
            column = self.table[name].combine_chunks()
            known = column.dictionary.to_pylist()
            if word not in known:
                return type(self)(self.table.slice(0, 0))
            mask &= (
                pc.equal(column.indices, known.index(word)).fill_null(False).to_numpy(zero_copy_only=False)
            )
        if partition is not None:
            mask &= pc.equal(self.table["partition"], partition).fill_null(False).to_numpy()
        return type(self)(self.table.filter(pa.array(mask)))

    def words(self, name: str) -> set[str]:
        """What stands in a column of words."""
        return {word.as_py() for word in pc.unique(self.table[name].cast(pa.string())) if word.is_valid}

    def partitions(self) -> list[int]:
        return sorted(p.as_py() for p in pc.unique(self.table["partition"]) if p.is_valid)

    def newest(self) -> Self:
        """The last entry, and of each figure that it lacks nothing."""
        at = self.at
        return type(self)(self.table.filter(pa.array(at == at.max(initial=0))))

    def one(self, figure: str) -> float:
        """A figure that stands here once at the most; nan where it does not."""
        found = self.where(figure=figure).value
        return float(found[-1]) if len(found) else float("nan")

    def lasting(self, line: Iterable[Mark]) -> Self:
        """Without what a crash has undone."""
        return type(self)(self.table.filter(pa.array(~undone(self.table, line))))
