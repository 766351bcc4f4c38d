"""Versions of the weights: numbered, immutable, checksummed, complete or absent (law 5).

A version is a directory `v0000000042` of a `WeightStore`: arrays as safetensors, the strings of string ids
as JSON, and a manifest that names each file with its size and SHA-256 and says everything else that a scorer
needs: the model's configuration, the actions and features, and where in the stream the weights were taken.
It is written beside, synced and renamed into place, so a reader sees all of it or nothing; `manifest.sha256`
covers the manifest. Numbers only go up. Neither Ray nor Kafka is imported here.

Which version is served is the newest one, unless whoever runs the system orders otherwise (`orders.json`,
written by `grstream weights pin` and `rollback`, read by every scorer at its next poll).
"""

import dataclasses
import datetime
import hashlib
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pydantic
import safetensors
import safetensors.numpy

from grstream import directories
from grstream.config import Config, ModelConfig
from grstream.keys import Id, Keys, Namespace, ints_of_keys

logger = logging.getLogger(__name__)

FORMAT = 2  # of a version's files; a reader refuses another. In 1, keys of features were of other namespaces
MANIFEST, MANIFEST_DIGEST = "manifest.json", "manifest.sha256"
DENSE, ROWS, NAMES = "dense.safetensors", "rows.safetensors", "item_names.json"
ORDERS = "orders.json"
_VERSION = re.compile(r"v(\d{10})")


class WeightsError(RuntimeError):
    """Something is wrong with a store of weights versions."""


class CorruptWeights(WeightsError):
    """A version's bytes are not those that were published. It must not be served."""

    def __init__(self, number: int, file: str, problem: str) -> None:
        super().__init__(
            f"weights version {number} is corrupt: {file} {problem}; delete its directory or restore the file"
        )
        self.number, self.file = number, file


class NonFiniteWeights(WeightsError):
    """Weights that hold infinities or NaN are never published."""


class VersionExists(WeightsError):
    """The number to be published is not above every number that the store has held."""


class VersionMissing(WeightsError):
    """The store has no such version: never published, or pruned."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a model has learned, as plain arrays: a copy that its learner no longer touches."""

    dense: dict[str, npt.NDArray]  # parameter name -> array
    keys: Keys  # (n,) every key that has an embedding row
    rows: npt.NDArray[np.float32]  # (n, d)
    items: npt.NDArray[np.bool_]  # (n,) which keys are items, and so may be retrieved
    item_names: dict[int, str]  # item key -> id, for string ids

    def __post_init__(self) -> None:
        n = len(self.keys)
        if self.keys.shape != (n,) or self.items.shape != (n,) or self.rows.ndim != 2 or len(self.rows) != n:
            raise ValueError(
                f"expected keys (n,), items (n,) and rows (n, d), got {self.keys.shape}, {self.items.shape} "
                f"and {self.rows.shape}"
            )

    def not_finite(self) -> str | None:
        """Which of the arrays holds a value that is not finite, if one does."""
        named = [*self.dense.items(), ("the embedding rows", self.rows)]
        return next((name for name, array in named if not np.isfinite(array).all()), None)

    def item_id(self, key: int) -> Id:
        """The id of an item key."""
        name = self.item_names.get(key)
        return int(ints_of_keys(Namespace.ITEM, np.array([key]))[0]) if name is None else name


class _Stored(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Recipe(_Stored):
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


class FileRecord(_Stored):
    bytes: int
    sha256: str


class Manifest(_Stored):
    """What a version is, where in the stream it was taken, and which files it is made of."""

    format: int = FORMAT
    number: int = pydantic.Field(ge=1)
    step: int = pydantic.Field(ge=0)
    created_ms: int
    positions: dict[int, list[tuple[int, int]]]  # partition -> consumed offsets as [start, stop) ranges
    newest_event_ms: int
    recipe: Recipe
    files: dict[str, FileRecord]

    def covers(self, partition: int, offset: int) -> bool:
        """Whether the weights have consumed an offset."""
        return any(start <= offset < stop for start, stop in self.positions.get(partition, ()))


class Orders(_Stored):
    """What to serve instead of the newest version."""

    pinned: int | None = None  # this one, whatever is published
    withdrawn: list[int] = []  # never these

    def newest(self, numbers: Sequence[int]) -> int | None:
        """The newest of these versions that is not withdrawn."""
        return max((number for number in numbers if number not in self.withdrawn), default=None)


@dataclasses.dataclass(frozen=True)
class WeightsVersion:
    manifest: Manifest
    weights: Weights

    @property
    def number(self) -> int:
        return self.manifest.number


class WeightSource(Protocol):
    """Where a scorer gets its weights from."""

    def instead_of(self, number: int) -> WeightsVersion | None:
        """The good version to be served, if it is not `number`, which is; 0 where none is."""
        ...

    def reject(self, number: int) -> None:
        """Never give this version again: it turned out not to be usable."""
        ...


class WeightStore:
    """Versions in a directory of shared storage. One process publishes and prunes; any number read."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = pathlib.Path(directory)
        self._rejected: set[int] = set()  # immutable, so once bad always bad: read and reported once

    def publish(
        self,
        weights: Weights,
        recipe: Recipe,
        *,
        step: int,
        positions: Mapping[int, Sequence[tuple[int, int]]],
        newest_event_ms: int,
        number: int | None = None,
    ) -> Manifest:
        """Make a version durable and then visible; without a `number`, the next one.

        Raises VersionExists unless `number` is above all the store's numbers, and NonFiniteWeights.
        """
        bad = weights.not_finite()
        if bad is not None:
            raise NonFiniteWeights(f"the weights of step {step} are not published: {bad} is not finite")
        newest = max(self.numbers(), default=0)
        number = newest + 1 if number is None else number
        if number <= newest:
            raise VersionExists(f"cannot publish version {number}: numbers must go up and {newest} exists")
        files = {DENSE: _dense_bytes(weights), ROWS: _rows_bytes(weights), NAMES: _names_bytes(weights)}
        manifest = Manifest(
            number=number,
            step=step,
            created_ms=time.time_ns() // 1_000_000,
            positions={p: [(int(a), int(b)) for a, b in ranges] for p, ranges in positions.items()},
            newest_event_ms=newest_event_ms,
            recipe=recipe,
            files={n: FileRecord(bytes=len(data), sha256=_sha256(data)) for n, data in files.items()},
        )
        files[MANIFEST] = manifest.model_dump_json(indent=1).encode()
        files[MANIFEST_DIGEST] = _digest_line(files[MANIFEST])
        try:
            with directories.appearing(self._path(number)) as scratch:
                for name, data in files.items():
                    _write(scratch / name, data)
        except directories.DirectoryExists as error:
            raise VersionExists(f"cannot publish version {number}: another publisher just did") from error
        return manifest

    def numbers(self) -> list[int]:
        """The numbers of the versions that are there, oldest first."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for match in map(_VERSION.fullmatch, names) if match)

    def load(self, number: int) -> WeightsVersion:
        """Read and verify a version. Raises VersionMissing, or CorruptWeights naming the file."""
        manifest = self.manifest(number)
        if manifest.files.keys() != {DENSE, ROWS, NAMES}:
            raise CorruptWeights(number, MANIFEST, f"lists the files {sorted(manifest.files)}")
        data = {name: self._verified(number, name, record) for name, record in manifest.files.items()}
        try:
            return WeightsVersion(manifest, _weights(data))
        except (safetensors.SafetensorError, ValueError, TypeError) as error:
            raise CorruptWeights(
                number, "its arrays", f"cannot be read as what they should be: {error}"
            ) from error

    def manifest(self, number: int) -> Manifest:
        """Read and verify what a version says of itself. Raises as `load` does."""
        text = self._read(number, MANIFEST)
        if self._read(number, MANIFEST_DIGEST) != _digest_line(text):
            raise CorruptWeights(number, MANIFEST, f"does not match {MANIFEST_DIGEST}")
        try:
            manifest = Manifest.model_validate_json(text)
        except pydantic.ValidationError as error:
            raise CorruptWeights(number, MANIFEST, f"is not a manifest: {error}") from error
        if manifest.format != FORMAT or manifest.number != number:
            problem = f"says format {manifest.format}, number {manifest.number}; expected {FORMAT}, {number}"
            raise CorruptWeights(number, MANIFEST, problem)
        return manifest

    def instead_of(self, number: int) -> WeightsVersion | None:
        """The version to be served, if it is not `number`, which is; 0 where none is.

        It is the pinned one, or else the newest good one that is not withdrawn: an older one only in place of
        one that is. A corrupt one is logged and passed over. Raises WeightsError where the orders are.
        """
        orders = self.orders()
        candidates = [n for n in self.numbers() if n not in orders.withdrawn]
        back = number in orders.withdrawn
        if orders.pinned is not None:
            candidates, back = [orders.pinned], True
        for candidate in reversed(candidates):
            if candidate == number or (candidate < number and not back):
                return None
            if candidate in self._rejected:
                continue
            try:
                return self.load(candidate)
            except CorruptWeights as error:
                self.reject(candidate)
                logger.error("%s; it is not served", error)
            except VersionMissing:  # pruned since it was listed, so newer ones are there by the next call
                logger.info("weights version %d was pruned while it was being read", candidate)
        return None

    def reject(self, number: int) -> None:
        """Have `instead_of` pass over this version."""
        self._rejected.add(number)

    def orders(self) -> Orders:
        """What was ordered last. Raises WeightsError where it cannot be read."""
        try:
            return Orders.model_validate_json((self._directory / ORDERS).read_bytes())
        except FileNotFoundError:
            return Orders()
        except pydantic.ValidationError as error:
            raise WeightsError(f"{self._directory / ORDERS} is not what grstream writes: {error}") from error

    def pin(self, number: int | None) -> None:
        """Have this version served, whatever is published; None: the newest again.

        Raises VersionMissing or CorruptWeights, with nothing ordered.
        """
        before = self.orders()
        if number is not None:
            # Ordered before it is read, so that no publisher prunes it in between.
            self._order(before.model_copy(update={"pinned": number}))
            try:
                self.load(number)
            except WeightsError:
                self._order(before)
                raise
        else:
            self._order(before.model_copy(update={"pinned": None}))

    def rollback(self, to: int | None = None) -> int:
        """Withdraw all versions above `to` for ever, and any pin; what is published later is served.

        Without `to`, the newest one that is not withdrawn goes. Returns the version that is now to be served.
        Raises VersionMissing where there is none or it is withdrawn, CorruptWeights where it cannot be read.
        """
        before, numbers = self.orders(), self.numbers()
        if to is None:
            newest = before.newest(numbers)
            to = before.newest([n for n in numbers if newest is not None and n < newest])
            if to is None:
                raise VersionMissing(f"no older weights version in {self._directory} to go back to")
        if to in before.withdrawn:
            raise VersionMissing(f"weights version {to} was itself withdrawn")
        self.load(to)
        # Pruned ones need no mention: their numbers never come back.
        withdrawn = [n for n in numbers if n > to or n in before.withdrawn]
        self._order(Orders(withdrawn=withdrawn))
        return to

    def describe(self) -> list[str]:
        """A table of the versions, newest first: a heading, and a line each."""
        orders, numbers = self.orders(), self.numbers()
        served = orders.newest(numbers) if orders.pinned is None else orders.pinned
        lines = [
            f"{'version':>10}  {'step':>9}  {'events':>12}  {'newest event':19}  {'published':19}  {'MiB':>7}"
        ]
        for number in reversed(numbers):
            try:
                manifest = self.manifest(number)
            except CorruptWeights as error:
                lines.append(f"{number:10}  {error}")
                continue
            events = sum(stop - start for ranges in manifest.positions.values() for start, stop in ranges)
            size = sum(file.bytes for file in manifest.files.values()) / 2**20
            notes = [
                *(["withdrawn"] if number in orders.withdrawn else []),
                *(["pinned"] if number == orders.pinned else []),
                *(["to be served"] if number == served else []),
            ]
            lines.append(
                f"{number:10}  {manifest.step:9,}  {events:12,}  {_utc(manifest.newest_event_ms)}  "
                f"{_utc(manifest.created_ms)}  {size:7.1f}  {', '.join(notes)}".rstrip()
            )
        return lines

    def _order(self, orders: Orders) -> None:
        scratch = self._directory / f".{ORDERS}.{os.getpid()}"
        _write(scratch, orders.model_dump_json(indent=1).encode())
        directories.sync(scratch)
        os.rename(scratch, self._directory / ORDERS)
        directories.sync(self._directory)

    def prune(self, keep: int) -> list[int]:
        """Delete all but the newest `keep` versions and what dead writers left; the numbers deleted.

        The one that is ordered to be served is kept, too. A version goes at once, by a rename, so that a
        reader misses it whole.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, or numbers could be given twice; got {keep}")
        numbers, orders = self.numbers(), self.orders()
        kept = {orders.pinned, orders.newest(numbers)}
        gone = [number for number in numbers[:-keep] if number not in kept]
        for number in gone:
            directories.disappear(self._path(number))
        directories.sweep(self._directory)
        return gone

    def _path(self, number: int) -> pathlib.Path:
        return self._directory / f"v{number:010d}"

    def _read(self, number: int, name: str) -> bytes:
        try:
            return (self._path(number) / name).read_bytes()
        except FileNotFoundError as error:
            if self._path(number).is_dir():
                raise CorruptWeights(number, name, "is missing") from error
            raise VersionMissing(f"no weights version {number} in {self._directory}") from error

    def _verified(self, number: int, name: str, record: FileRecord) -> bytes:
        data = self._read(number, name)
        if len(data) != record.bytes:
            raise CorruptWeights(number, name, f"has {len(data)} bytes instead of {record.bytes}")
        if _sha256(data) != record.sha256:
            raise CorruptWeights(number, name, "does not match its SHA-256")
        return data


def _dense_bytes(weights: Weights) -> bytes:
    return safetensors.numpy.save({name: np.asarray(a, order="C") for name, a in weights.dense.items()})


def _rows_bytes(weights: Weights) -> bytes:
    arrays = {"keys": weights.keys, "rows": weights.rows, "items": weights.items}
    return safetensors.numpy.save({name: np.asarray(a, order="C") for name, a in arrays.items()})


def _names_bytes(weights: Weights) -> bytes:
    return json.dumps({str(key): name for key, name in weights.item_names.items()}).encode()


def _weights(data: Mapping[str, bytes]) -> Weights:
    arrays = safetensors.numpy.load(data[ROWS])
    names = {int(key): str(name) for key, name in json.loads(data[NAMES]).items()}
    return Weights(dense=safetensors.numpy.load(data[DENSE]), item_names=names, **arrays)


def _utc(ms: int) -> str:
    return f"{datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC):%Y-%m-%d %H:%M:%S}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_line(manifest: bytes) -> bytes:
    """What `sha256sum -c` reads."""
    return f"{_sha256(manifest)}  {MANIFEST}\n".encode()


def _write(path: pathlib.Path, data: bytes) -> None:
    path.write_bytes(data)
