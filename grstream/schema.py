"""The names behind bits and columns, and when what was saved under some goes on under others.

An action is a bit of an event's mask and a row of the model's heads; a feature is a column. Both are told by
their place in the configuration, so what is saved names them. A schema has *grown* from another if it has
that one's actions first, in their order, and all of its features, in their order; whatever else it names was
not there before. Anything else would give what was learned of one name to another, or lose it.
"""

import dataclasses
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from grstream.keys import ABSENT, Keys

Columns = npt.NDArray[np.int64]  # where each feature stands in another schema, -1 where it does not


class SchemaChanged(ValueError):
    """What was saved cannot go on under the configured actions, features or model; says what to do."""


class Named(Protocol):
    """What names actions and features: a configuration of events, or the recipe of a model."""

    @property
    def actions(self) -> list[str]: ...

    @property
    def features(self) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class Schema:
    """Actions and features by name."""

    actions: tuple[str, ...]  # in the order of an event's bits
    features: tuple[str, ...]  # in the order of its columns: `context.…` first, then `item.…`

    @classmethod
    def of(cls, named: Named) -> Self:
        return cls(tuple(named.actions), tuple(named.features))

    def __str__(self) -> str:
        return f"actions {', '.join(self.actions)}; features {', '.join(self.features) or 'none'}"

    @property
    def contexts(self) -> int:
        """How many of the columns, the first ones, are context."""
        return sum(name.startswith("context.") for name in self.features)

    def not_grown_from(self, older: "Schema") -> str | None:
        """Why this schema has not grown from another; None where it has, or is the same."""
        gone = [name for name in older.actions if name not in self.actions]
        if gone:
            return f"events.actions lacks {', '.join(gone)}"
        if self.actions[: len(older.actions)] != older.actions:
            return f"events.actions does not begin with {', '.join(older.actions)}"
        gone = [name for name in older.features if name not in self.features]
        if gone:
            return f"events lacks the features {', '.join(gone)}"
        if [name for name in self.features if name in older.features] != list(older.features):
            return f"events does not name the features {', '.join(older.features)} in this order"
        return None

    def columns_in(self, other: "Schema") -> Columns:
        """Where each feature is among the columns of `other`: (F,)."""
        at = {name: column for column, name in enumerate(other.features)}
        return np.array([at.get(name, -1) for name in self.features], np.int64)


def placed(features: Keys, columns: Columns) -> Keys:
    """Columns (n, G) of one schema as those of another (n, F), which `columns_in` it: ABSENT where new."""
    out = np.full((len(features), len(columns)), ABSENT, np.int64)
    known = columns >= 0
    out[:, known] = features[:, columns[known]]
    return out
