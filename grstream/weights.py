"""Weights: what a model has learned, whole or as what changed, and what a version of them says of itself.

Embedding rows have places 0 <= place < n, which a row keeps as long as its key does: a new key gets the next
place or that of a key that was evicted. So what changed between two versions is an array of places and what
now stands there, and laid over the older version it gives the newer one bit for bit. Plain arrays: neither
torch, Ray nor Kafka is imported here.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pydantic

from grstream.config import Config, ModelConfig
from grstream.keys import Id, Keys, Namespace, ints_of_keys

PRIOR = "prior"  # among the dense arrays: what is added to each key's score in retrieval, as of the version
FORMAT = 2  # of what is written; a reader refuses another. In 1, keys of features were of other namespaces


class WeightsError(RuntimeError):
    """Something is wrong with a store of weights versions."""


class CorruptWeights(WeightsError):
    """A version's bytes are not those that were published. It must not be served."""

    def __init__(self, number: int, file: str, problem: str) -> None:
        super().__init__(number, file, problem)
        self.number, self.file, self.problem = number, file, problem

    def __str__(self) -> str:
        return (
            f"weights version {self.number} is corrupt: {self.file} {self.problem}; delete its directory or "
            f"restore the file"
        )


class NonFiniteWeights(WeightsError):
    """Weights that hold infinities or NaN are never published."""


class VersionExists(WeightsError):
    """The number to be published is not above every number that the store has held."""


class VersionMissing(WeightsError):
    """The store has no such version: never published, or pruned."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a model has learned, as plain arrays: a copy that its learner no longer touches."""

    dense: dict[str, npt.NDArray]  # parameter name -> array; and PRIOR (n,), where retrieval has one
    keys: Keys  # (n,) every key that has an embedding row, by place
    rows: npt.NDArray[np.float32]  # (n, d)
    items: npt.NDArray[np.bool_]  # (n,) which keys are items, and so may be retrieved
    item_names: dict[int, str]  # item key -> id, for string ids

    def __post_init__(self) -> None:
        _require_rows(self.keys, self.rows, self.items)

    def not_finite(self) -> str | None:
        """Which of the arrays holds a value that is not finite, if one does."""
        return _not_finite(self.dense, self.rows)

    def item_id(self, key: int) -> Id:
        """The id of an item key."""
        name = self.item_names.get(key)
        return int(ints_of_keys(Namespace.ITEM, np.array([key]))[0]) if name is None else name

    def after(self, deltas: Sequence["Delta"]) -> "Weights":
        """A copy with these laid over it, one after the other. Raises ValueError where one does not fit."""
        if not deltas:
            return self
        n = len(self.keys)
        for delta in deltas:
            delta.require_fits(n)
            n = delta.size
        keys, rows, items = (_grown(array, n) for array in (self.keys, self.rows, self.items))
        names = dict(self.item_names)
        n = len(self.keys)
        for delta in deltas:
            if names:
                # A key that was evicted took its name along, even if a history has brought it back.
                held = keys[delta.places[delta.places < n]]
                for key in np.setdiff1d(held, delta.keys[delta.items]).tolist():
                    names.pop(key, None)
            names.update(delta.item_names)
            keys[delta.places], rows[delta.places] = delta.keys, delta.rows
            items[delta.places] = delta.items
            n = delta.size
        return Weights(deltas[-1].dense, keys, rows, items, names)


@dataclasses.dataclass(frozen=True)
class Delta:
    """What differs from a version before: dense parameters whole, and the rows touched since."""

    previous: int  # number of that version
    size: int  # rows there are now
    dense: dict[str, npt.NDArray]  # may be left out where another delta follows
    places: npt.NDArray[np.int64]  # (m,) ascending
    keys: Keys  # (m,) as now at these places: one that was evicted is at none
    rows: npt.NDArray[np.float32]  # (m, d)
    items: npt.NDArray[np.bool_]  # (m,)
    item_names: dict[int, str]  # of the items among these

    def __post_init__(self) -> None:
        _require_rows(self.keys, self.rows, self.items)
        places = self.places
        if places.shape != self.keys.shape or (places[1:] <= places[:-1]).any():
            raise ValueError(f"expected a place for each of {len(self.keys)} rows, ascending")
        if len(places) and not 0 <= places[0] <= places[-1] < self.size:
            raise ValueError(f"places must be from 0 to {self.size - 1}, got {places[0]} to {places[-1]}")

    def not_finite(self) -> str | None:
        """Which of the arrays holds a value that is not finite, if one does."""
        return _not_finite(self.dense, self.rows)

    def require_fits(self, n: int) -> None:
        """Raise ValueError unless it says what stands at every place beyond `n`, the size before."""
        if self.size < n or int((self.places >= n).sum()) != self.size - n:
            raise ValueError(f"a delta of {self.size} rows, {len(self.places)} touched, does not fit {n}")


def _grown(array: npt.NDArray, n: int) -> npt.NDArray:
    """A copy with room for `n` rows."""
    copy = np.empty((n, *array.shape[1:]), array.dtype)
    copy[: len(array)] = array
    return copy


def _require_rows(keys: Keys, rows: npt.NDArray[np.float32], items: npt.NDArray[np.bool_]) -> None:
    n = len(keys)
    if keys.shape != (n,) or items.shape != (n,) or rows.ndim != 2 or len(rows) != n:
        raise ValueError(
            f"expected keys (n,), items (n,) and rows (n, d), got {keys.shape}, {items.shape} "
            f"and {rows.shape}"
        )


def _not_finite(dense: dict[str, npt.NDArray], rows: npt.NDArray[np.float32]) -> str | None:
    named = [*dense.items(), ("the embedding rows", rows)]
    return next((name for name, array in named if not np.isfinite(array).all()), None)


class Stored(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Recipe(Stored):
    """What must be known, beside the arrays, to build the model that they are the weights of."""

    model: ModelConfig
    actions: list[str]
    features: list[str]
    vocabulary_seed: int

    @classmethod
    def of(cls, config: Config) -> "Recipe":
        return cls(
            model=config.model,
            actions=list(config.events.actions),
            features=config.events.features,
            vocabulary_seed=config.train.seed,
        )


class FileRecord(Stored):
    bytes: int
    sha256: str


class Manifest(Stored):
    """What a version is, where in the stream it was taken, and which files it is made of.

    A version is whole (a base), or builds on `previous`, of the same lineage, or both: then either way gives
    the same weights.
    """

    format: int = FORMAT
    number: int = pydantic.Field(ge=1)
    lineage: str = pydantic.Field("", description="of versions that build on one another: drawn by the first")
    previous: int | None = pydantic.Field(None, description="the version that the touched rows go on top of")
    whole: bool = True
    step: int = pydantic.Field(ge=0)
    created_ms: int
    positions: dict[int, list[tuple[int, int]]]  # partition -> consumed offsets as [start, stop) ranges
    newest_event_ms: int
    recipe: Recipe
    files: dict[str, FileRecord]

    def covers(self, partition: int, offset: int) -> bool:
        """Whether the weights have consumed an offset."""
        return any(start <= offset < stop for start, stop in self.positions.get(partition, ()))

    def holds_what(self, other: "Manifest") -> bool:
        """Whether the two are of the same version: numbers alone may come again in another directory."""
        return (self.lineage, self.number) == (other.lineage, other.number)


class Changed(NamedTuple):
    """Where a version differs from one before it, of the same lineage, if it differs at all."""

    since: int
    places: npt.NDArray[np.int64]  # ascending; those that are new among them


@dataclasses.dataclass(frozen=True)
class WeightsVersion:
    manifest: Manifest
    weights: Weights
    changed: Changed | None = None  # from what the reader had before, where it came from there

    @property
    def number(self) -> int:
        return self.manifest.number


class Beside(pydantic.BaseModel):
    """Arm b of an A/B test: a version for some of the users, chosen by a hash."""

    model_config = pydantic.ConfigDict(frozen=True)

    number: int
    share: float = pydantic.Field(gt=0, lt=1)  # of users


class WeightSource(Protocol):
    """Where a scorer gets its weights from."""

    def instead_of(self, number: int) -> WeightsVersion | None:
        """The good version to be served, if it is not `number`, which is; 0 where none is."""
        ...

    def reject(self, number: int) -> None:
        """Never give this version again: it turned out not to be usable."""
        ...

    def beside(self) -> "Beside | None":
        """What is to be served to some of the users."""
        ...

    def load(self, number: int) -> WeightsVersion:
        """A version by its number. Raises VersionMissing and CorruptWeights."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return after so long, or sooner where it learns that there is a new version."""
        ...


class Nearby(Protocol):
    """Contents of versions that need not be fetched from storage. It may have none, and says what is new."""

    def weights(self, manifest: Manifest) -> Weights | None: ...

    def delta(self, manifest: Manifest) -> Delta | None: ...

    def wait(self, timeout_s: float) -> None: ...
