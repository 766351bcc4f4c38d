"""The items that may be recommended, as the topic `kafka.items_topic` says: announced, described, withdrawn.

Wire format: a JSON object in UTF-8 (`ItemRecord`), the record's key being the item id, spelt out. The last
record of a key holds. A record without a value withdraws its item, as `"available": false` does; but a
compacted topic forgets the former after a time (`delete.retention.ms`), and with it that the item was
withdrawn: one that weights may still know is withdrawn by the latter.

`CatalogueFold` takes records and gives `Catalogue`s, which never change. Neither knows of Kafka.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pydantic

from grstream.config import EventsConfig
from grstream.events import Features, InvalidEvent, Rejected, WireId
from grstream.keys import ABSENT, INT64_MAX, Keys, Namespace, canonical_id, feature_namespace, key_of
from grstream.keytable import KeyTable

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class ItemRecord(pydantic.BaseModel):
    """What is said of an item. Ids are held in their canonical form."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")

    item_id: WireId
    item_features: Features = pydantic.Field({}, description="categorical features of the item")
    available: bool = pydantic.Field(True, description="false: withdrawn, until it is announced again")
    timestamp_ms: int | None = pydantic.Field(
        None, ge=0, le=INT64_MAX, description="milliseconds since 1970; for people, nothing goes by it"
    )

    def to_json(self) -> bytes:
        """As a record's value."""
        return self.__pydantic_serializer__.to_json(self, exclude_defaults=True)


class _LenientRecord(ItemRecord):
    model_config = pydantic.ConfigDict(extra="ignore")


@dataclasses.dataclass(frozen=True)
class ItemBatch:
    """Decoded records of one partition, in the order of their offsets; n rows."""

    partition: int
    keys: Keys  # (n,) of the items
    features: Keys  # (n, F_item) ABSENT where not given
    available: Bools  # (n,)
    record_times: Ints  # (n,) ms, of the records; -1 for none
    names: dict[int, str]  # key -> id, of the string ids

    def __len__(self) -> int:
        return len(self.keys)


class ItemDecoder:
    """Decodes records of any partition, each by itself."""

    def __init__(self, config: EventsConfig) -> None:
        self._names = config.item_features
        self._namespaces = [feature_namespace(f"item.{name}") for name in config.item_features]
        self._strict = config.unknown_fields == "reject"
        self._model = ItemRecord if self._strict else _LenientRecord
        self._heeded = None if self._strict else {"item_features": config.item_features}

    def decode(
        self,
        partition: int,
        offsets: Sequence[int],
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        record_times_ms: Sequence[int],
    ) -> tuple[ItemBatch, list[Rejected]]:
        """n records in the order of their offsets, and which are no items."""
        rows, rejected = [], []
        names: dict[int, str] = {}
        for offset, key, value, time in zip(offsets, keys, values, record_times_ms, strict=True):
            try:
                rows.append((*self._row(key, value, names), time))
            except InvalidEvent as error:
                rejected.append(Rejected(offset, error.reason, error.field))
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        return (
            ItemBatch(
                partition,
                np.array(columns[0], np.int64),
                np.array(columns[1], np.int64).reshape(len(rows), len(self._names)),
                np.array(columns[2], np.bool_),
                np.array(columns[3], np.int64),
                names,
            ),
            rejected,
        )

    def validate(self, value: bytes) -> ItemRecord:
        """The record, or InvalidEvent with the reason and the field."""
        try:
            record = self._model.model_validate_json(value, context=self._heeded)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            reason = first["msg"].removeprefix("Value error, ")
            raise InvalidEvent(reason, ".".join(map(str, first["loc"])) or None) from error
        unknown = record.item_features.keys() - set(self._names)
        if unknown:  # what is ignored is not in the record
            allowed = ", ".join(self._names) or "none is configured"
            raise InvalidEvent(f"unknown feature; allowed: {allowed}", f"item_features.{min(unknown)[:80]}")
        return record

    def _row(
        self, key: bytes | None, value: bytes | None, names: dict[int, str]
    ) -> tuple[int, list[int], bool]:
        """Key, feature keys and availability of one record."""
        try:
            spelt = canonical_id((key or b"").decode())
        except ValueError as error:
            raise InvalidEvent(
                f"a record's key spells the item's id, and {key!r} spells none", "key"
            ) from error
        record = ItemRecord(item_id=spelt, available=False) if value is None else self.validate(value)
        if record.item_id != spelt:
            raise InvalidEvent(
                f"the record's key says {str(spelt)[:80]!r}: compaction and withdrawal go by the key, which "
                "must spell the same id",
                "item_id",
            )
        item = key_of(Namespace.ITEM, spelt)
        if isinstance(spelt, str):
            names[item] = spelt
        given = record.item_features
        features = [
            key_of(namespace, given[name]) if name in given else ABSENT
            for name, namespace in zip(self._names, self._namespaces, strict=True)
        ]
        return item, features, record.available


@dataclasses.dataclass(frozen=True, eq=False)
class Catalogue:
    """What is known of n items at one moment. An item keeps its place in later ones of the same fold."""

    revision: int  # of two catalogues of one fold, the one that knows more has the greater one
    keys: Keys  # (n,)
    features: Keys  # (n, F_item) in the order of events.item_features, ABSENT where not given
    available: Bools  # (n,) False: withdrawn
    revisions: Ints  # (n,) when each place last changed
    # Key -> id of string ids. Shared with later catalogues: it may name more items; look up, do not iterate.
    names: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.keys)

    def changed_since(self, revision: int) -> Ints:
        """The places, ascending, that are new or other than in the catalogue of that revision."""
        return np.flatnonzero(self.revisions > revision)


class CatalogueFold:
    """Folds records into a catalogue: the last record of a key holds, however they are cut into batches.

    Within a partition the last is the one of the greatest offset. Records of one key lie in several
    partitions after the topic got more: then the partition with the newest record (by its time, then by
    number) holds. Not thread-safe, but its catalogues are.
    """

    def __init__(self, item_features: int, revision: int = 0) -> None:
        """Of no item; revisions count on from `revision`."""
        self._table = KeyTable()  # slots are places: none is ever freed
        self._revision = revision
        self._names: dict[int, str] = {}
        self._features = np.empty((0, item_features), np.int64)
        self._available = np.empty(0, np.bool_)
        self._revisions = np.empty(0, np.int64)
        self._keys = np.empty(0, np.int64)
        self._newest = np.empty((0, 2), np.int64)  # time and partition of the newest record
        self._seen = 0  # places that the last catalogue shares with the arrays here

    @property
    def revision(self) -> int:
        return self._revision

    def take(self, batch: ItemBatch) -> None:
        """Fold in the next records of a partition."""
        if not len(batch):
            return
        self._names.update(batch.names)
        keys, rows, newest = _last_of_each(batch)
        places = self._table.find(keys)
        fresh = places < 0
        places[fresh] = self._table.insert(keys[fresh])
        self._grow()
        self._keys[places[fresh]] = keys[fresh]
        self._newest[places[fresh]] = np.iinfo(np.int64).min
        time, partition = self._newest[places].T
        own = partition == batch.partition
        newer = (newest > time) | ((newest == time) & (batch.partition > partition))
        kept = own | newer
        places, rows, fresh = places[kept], rows[kept], fresh[kept]
        self._newest[places, 0] = np.maximum(time, newest)[kept]
        self._newest[places, 1] = batch.partition
        changed = (
            fresh
            | (self._available[places] != batch.available[rows])
            | (self._features[places] != batch.features[rows]).any(1)
        )
        places, rows = places[changed], rows[changed]
        if not len(places):
            return
        if self._seen and places.min() < self._seen:  # catalogues hold these arrays: theirs stay as they are
            self._features, self._available = self._features.copy(), self._available.copy()
            self._revisions = self._revisions.copy()
            self._seen = 0
        self._revision += 1
        self._features[places] = batch.features[rows]
        self._available[places] = batch.available[rows]
        self._revisions[places] = self._revision

    def catalogue(self) -> Catalogue:
        """As of now. It costs nothing; the next change of an item that it holds copies the arrays once."""
        self._seen = n = len(self._table)
        return Catalogue(
            revision=self._revision,
            keys=_read_only(self._keys[:n]),
            features=_read_only(self._features[:n]),
            available=_read_only(self._available[:n]),
            revisions=_read_only(self._revisions[:n]),
            names=types.MappingProxyType(self._names),
        )

    def _grow(self) -> None:
        """Room for all places. What catalogues hold stays as it is: the arrays are others then."""
        n = self._table.stop
        if n <= len(self._keys):
            return
        room = max(n, 3 * len(self._keys) // 2, 64)
        for name in ("_keys", "_features", "_available", "_revisions", "_newest"):
            column = getattr(self, name)
            grown = np.zeros((room, *column.shape[1:]), column.dtype)
            grown[: len(column)] = column
            setattr(self, name, grown)
        self._seen = 0


def _last_of_each(batch: ItemBatch) -> tuple[Keys, Ints, Ints]:
    """The distinct keys of a batch, each one's last row and its newest time."""
    order = np.argsort(batch.keys, kind="stable")
    keys = batch.keys[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    last = np.concatenate([first[1:], [len(keys)]]) - 1
    # In the order in which they came, so that places do not depend on the keys' values.
    rows, newest = order[last], np.maximum.reduceat(batch.record_times[order], first)
    came = np.argsort(order[first], kind="stable")
    return keys[first][came], rows[came], newest[came]


def _read_only(column: npt.NDArray) -> npt.NDArray:
    view = column.view()
    view.flags.writeable = False
    return view
