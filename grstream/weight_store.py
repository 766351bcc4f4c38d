"""Versions of the weights in shared storage: numbered, immutable, checksummed, complete or absent (law 5).

A version is a directory `v0000000042` of a `WeightStore`: files of arrays and names, and a manifest that
names each with its size and SHA-256 and says everything else that a scorer needs: the model's configuration,
the actions and features, where in the stream the weights were taken, and which version they build on. It is
written beside, synced and renamed into place, so a reader sees all of it or nothing; `manifest.sha256` covers
the manifest. Numbers only go up. Neither Ray nor Kafka is imported here.

A version holds all rows (a base), or those touched since an older version (a delta), or both. Any version
there is can be read whole, from whichever is less to read: what the reader has and the deltas since, or the
newest base and the deltas after it.

Which version is served is the newest one, unless whoever runs the system orders otherwise (`orders.json`,
written by `grstream weights pin` and `rollback`, read by every scorer at its next poll).
"""

import datetime
import hashlib
import logging
import os
import pathlib
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pydantic

from grstream import directories
from grstream.weight_files import (
    OF_DELTA,
    OF_ROWS,
    OF_WEIGHTS,
    Unreadable,
    delta_of,
    encoded,
    weights_of,
)
from grstream.weights import (
    FORMAT,
    Beside,
    Changed,
    CorruptWeights,
    Delta,
    FileRecord,
    Manifest,
    Nearby,
    NonFiniteWeights,
    Recipe,
    Stored,
    VersionExists,
    VersionMissing,
    Weights,
    WeightsError,
    WeightsVersion,
)

logger = logging.getLogger(__name__)

MANIFEST, MANIFEST_DIGEST = "manifest.json", "manifest.sha256"
ORDERS = "orders.json"
_VERSION = re.compile(r"v(\d{10})")


class Orders(Stored):
    """What to serve instead of the newest version."""

    pinned: int | None = None  # this one, whatever is published
    withdrawn: list[int] = pydantic.Field([], description="never these")
    beside: Beside | None = None  # and this one to some of the users

    def newest(self, numbers: Sequence[int]) -> int | None:
        """The newest of these versions that is not withdrawn."""
        return max((number for number in numbers if number not in self.withdrawn), default=None)


class WeightStore:
    """Versions in a directory of shared storage. One process publishes and prunes; any number read.

    What is `nearby` is taken from there instead of being read from the directory, which still says alone
    which versions there are. A reader keeps the version that it gave last, to build the next one on.
    """

    def __init__(self, directory: str | os.PathLike[str], nearby: Nearby | None = None) -> None:
        self._directory = pathlib.Path(directory)
        self._nearby = nearby
        self._held: WeightsVersion | None = None
        self._rejected: set[int] = set()  # immutable, so once bad always bad: read and reported once
        self.corrupt = 0  # versions that `instead_of` passed over

    def publish(
        self,
        weights: Weights | None,
        recipe: Recipe,
        *,
        step: int,
        positions: Mapping[int, Sequence[tuple[int, int]]],
        newest_event_ms: int,
        number: int | None = None,
        delta: Delta | None = None,
    ) -> Manifest:
        """Make a version durable and then visible; without a `number`, the next one.

        `weights` make it a base, a `delta` lets it be read from the version before; one of them is needed.
        Raises VersionExists unless `number` is above all the store's numbers, NonFiniteWeights, and
        VersionMissing or CorruptWeights where the delta builds on what is not there. After an OSError the
        version may be there or not; what it was to carry must then be carried by the next one.
        """
        bad = next(
            (b for b in (part.not_finite() for part in (weights, delta) if part is not None) if b), None
        )
        if bad is not None:
            raise NonFiniteWeights(f"the weights of step {step} are not published: {bad} is not finite")
        newest = max(self.numbers(), default=0)
        number = newest + 1 if number is None else number
        if number <= newest:
            raise VersionExists(f"cannot publish version {number}: numbers must go up and {newest} exists")
        files = encoded(weights, delta)
        manifest = Manifest(
            number=number,
            lineage=secrets.token_hex(8) if delta is None else self.manifest(delta.previous).lineage,
            previous=None if delta is None else delta.previous,
            whole=weights is not None,
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
        return self._load(number, None)

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
        expected = (OF_WEIGHTS if manifest.whole else ()) + (OF_DELTA if manifest.previous else ())
        if manifest.files.keys() != set(expected):
            raise CorruptWeights(number, MANIFEST, f"lists the files {sorted(manifest.files)}")
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
                self._held = self._load(candidate, self._held)
                return self._held
            except CorruptWeights as error:
                self.reject(candidate)
                self.corrupt += 1
                logger.error("%s; version %d is not served", error, candidate, extra={"version": candidate})
            except (
                VersionMissing
            ) as error:  # pruned since it was listed: newer ones are there by the next call
                logger.info("weights version %d cannot be read now: %s", candidate, error)
        return None

    def reject(self, number: int) -> None:
        """Have `instead_of` pass over this version."""
        self._rejected.add(number)

    def wait(self, timeout_s: float) -> None:
        """Return after so long, or as soon as a new version is nearby."""
        if self._nearby is None:
            time.sleep(timeout_s)
        else:
            self._nearby.wait(timeout_s)

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
        if number is not None and number not in self.numbers():
            raise VersionMissing(f"no weights version {number} in {self._directory}")
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

    def beside(self) -> Beside | None:
        """The version that some of the users are to be served by, instead of the one for all."""
        return self.orders().beside

    def begin_ab(self, number: int, share: float) -> None:
        """Have a version serve a share of the users, 0 < share < 1, chosen by a hash; the others go on.

        Raises ValueError for another share, and VersionMissing or CorruptWeights, with nothing ordered.
        """
        before = self.orders()
        if not 0 < share < 1:
            raise ValueError(f"the share of users must lie between 0 and 1, not at {share}")
        if number not in self.numbers() or number in before.withdrawn:
            raise VersionMissing(f"no weights version {number} in {self._directory}, or it is withdrawn")
        beside = Beside(number=number, share=share)
        self._order(before.model_copy(update={"beside": beside}))  # before it is read, as with a pin
        try:
            self.load(number)
        except WeightsError:
            self._order(before)
            raise

    def end_ab(self) -> None:
        """All users are served alike again."""
        self._order(self.orders().model_copy(update={"beside": None}))

    def rollback(self, to: int | None = None) -> int:
        """Withdraw all versions above `to` for ever, and any pin; what is published later is served.

        An A/B test ends with the withdrawal of its version.

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
        beside = None if before.beside is None or before.beside.number in withdrawn else before.beside
        self._order(Orders(withdrawn=withdrawn, beside=beside))
        return to

    def describe(self) -> list[str]:
        """A table of the versions, newest first: a heading, and a line each."""
        orders, numbers = self.orders(), self.numbers()
        served = orders.newest(numbers) if orders.pinned is None else orders.pinned
        beside = orders.beside
        lines = [
            f"{'version':>10}  {'step':>9}  {'events':>12}  {'newest event':19}  {'published':19}  "
            f"{'MiB':>7}  {'builds on':>9}"
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
                *([f"to {beside.share:.0%} of users"] if beside and number == beside.number else []),
            ]
            lines.append(
                f"{number:10}  {manifest.step:9,}  {events:12,}  {_utc(manifest.newest_event_ms)}  "
                f"{_utc(manifest.created_ms)}  {size:7.1f}  "
                f"{'-' if manifest.whole else manifest.previous:>9}  {', '.join(notes)}".rstrip()
            )
        return lines

    def _order(self, orders: Orders) -> None:
        scratch = self._directory / f".{ORDERS}.{os.getpid()}"
        _write(scratch, orders.model_dump_json(indent=1).encode())
        directories.sync(scratch)
        os.rename(scratch, self._directory / ORDERS)
        directories.sync(self._directory)

    def prune(self, keep: int) -> list[int]:
        """Delete all but the newest `keep` versions that are not withdrawn, and what dead writers left.

        The newest, the pinned one and the one of an A/B test are kept, too, and so is every one that a kept
        one builds on. A version goes at once, by a rename, so that a reader misses it whole. Returns the
        numbers deleted.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, or numbers could be given twice; got {keep}")
        numbers, orders = self.numbers(), self.orders()
        good = [number for number in numbers if number not in orders.withdrawn]
        always = [*numbers[-1:], orders.pinned, orders.beside and orders.beside.number]
        kept = self._needed({n for n in numbers if n in good[-keep:] or n in always})
        gone = [number for number in numbers if number not in kept]
        for number in reversed(gone):  # what builds on another goes first
            directories.disappear(self._path(number))
        directories.sweep(self._directory)
        return gone

    def _needed(self, numbers: set[int]) -> set[int]:
        """These versions and those that they are read from, as far as their manifests can be read."""
        needed: set[int] = set()
        left = list(numbers)
        while left:
            at = left.pop()
            if at in needed:
                continue
            needed.add(at)
            try:
                manifest = self.manifest(at)
            except (CorruptWeights, VersionMissing):
                continue
            if not manifest.whole and manifest.previous is not None:
                left.append(manifest.previous)
        return needed

    def _load(self, number: int, held: WeightsVersion | None) -> WeightsVersion:
        """Read a version the way that is least to read, or failing that any other."""
        problem: WeightsError | None = None
        for way in self._ways(number, held):
            try:
                return self._read_along(way, held)
            except (CorruptWeights, VersionMissing) as error:
                problem = problem or error
        assert problem is not None  # there is a way, or `_ways` raises
        raise problem

    def _ways(self, number: int, held: WeightsVersion | None) -> Iterator[list[Manifest]]:
        """Ways to a version: from a base, or what is held, upwards by deltas; the least to read first.

        Raises CorruptWeights or VersionMissing where there is none.
        """
        met: list[tuple[int, list[Manifest]]] = []  # and not yet tried: bytes to read
        down: list[Manifest] = []
        read, found = 0, False
        at = self.manifest(number)
        problem: WeightsError = CorruptWeights(number, MANIFEST, "builds on nothing")
        while True:
            down.append(at)
            if held is not None and at.holds_what(held.manifest):
                met.append((read, down[::-1]))
                held = None
            elif at.whole:
                met.append((read + _bytes(at, OF_WEIGHTS), down[::-1]))
            if held is None or at.number < held.number:  # further down it is only more
                for _, way in sorted(met, key=lambda m: m[0]):
                    found = True
                    yield way
                met = []
            if at.previous is None:
                break
            read += _bytes(at, OF_ROWS)
            try:
                below = self.manifest(at.previous)
            except (CorruptWeights, VersionMissing) as error:
                problem = error
                break
            if below.lineage != at.lineage:
                problem = CorruptWeights(at.number, MANIFEST, f"builds on another version {below.number}")
                break
            at = below
        for _, way in sorted(met, key=lambda m: m[0]):
            found = True
            yield way
        if not found:
            raise problem

    def _read_along(self, way: Sequence[Manifest], held: WeightsVersion | None) -> WeightsVersion:
        manifest = way[-1]
        deltas = [self._delta(step, OF_ROWS) for step in way[1:-1]]
        deltas += [self._delta(step, OF_DELTA) for step in way[1:][-1:]]
        following = held is not None and way[0].holds_what(held.manifest)
        before = held.weights if held is not None and following else self._weights(way[0])
        try:
            weights = before.after(deltas)
        except ValueError as error:
            raise CorruptWeights(manifest.number, "its rows", f"do not fit: {error}") from error
        if held is None or not following:
            return WeightsVersion(manifest, weights)
        touched = [delta.places for delta in deltas]
        places = np.unique(np.concatenate(touched)) if touched else np.empty(0, np.int64)
        return WeightsVersion(manifest, weights, Changed(held.number, places))

    def _weights(self, manifest: Manifest) -> Weights:
        """All of a base. Raises as `load` does."""
        found = None if self._nearby is None else self._nearby.weights(manifest)
        if found is not None:
            return found
        try:
            return weights_of(self._verified(manifest, OF_WEIGHTS))
        except Unreadable as error:
            raise CorruptWeights(manifest.number, "its arrays", f"cannot be used: {error}") from error

    def _delta(self, manifest: Manifest, files: Sequence[str]) -> Delta:
        """What a version adds to the one before it, read from these files. Raises as `load` does."""
        found = None if self._nearby is None else self._nearby.delta(manifest)
        if found is not None:
            return found
        assert manifest.previous is not None
        try:
            return delta_of(manifest.previous, self._verified(manifest, files))
        except Unreadable as error:
            raise CorruptWeights(manifest.number, "its arrays", f"cannot be used: {error}") from error

    def _path(self, number: int) -> pathlib.Path:
        return self._directory / f"v{number:010d}"

    def _read(self, number: int, name: str) -> bytes:
        try:
            return (self._path(number) / name).read_bytes()
        except FileNotFoundError as error:
            if self._path(number).is_dir():
                raise CorruptWeights(number, name, "is missing") from error
            raise VersionMissing(f"no weights version {number} in {self._directory}") from error

    def _verified(self, manifest: Manifest, names: Sequence[str]) -> dict[str, bytes]:
        found = {}
        for name in names:
            data, record = self._read(manifest.number, name), manifest.files[name]
            if len(data) != record.bytes:
                problem = f"has {len(data)} bytes instead of {record.bytes}"
                raise CorruptWeights(manifest.number, name, problem)
            if _sha256(data) != record.sha256:
                raise CorruptWeights(manifest.number, name, "does not match its SHA-256")
            found[name] = data
        return found


def _bytes(manifest: Manifest, names: Sequence[str]) -> int:
    """What is to be read of these files."""
    return sum(manifest.files[name].bytes for name in names)


def _utc(ms: int) -> str:
    return f"{datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC):%Y-%m-%d %H:%M:%S}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_line(manifest: bytes) -> bytes:
    """What `sha256sum -c` reads."""
    return f"{_sha256(manifest)}  {MANIFEST}\n".encode()


def _write(path: pathlib.Path, data: bytes) -> None:
    path.write_bytes(data)
