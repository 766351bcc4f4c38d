"""Rows of Parquet as the records that they would have been in the topic: wire bytes, partition, order.

All is done by columns. What a row is, an event or not, and why not, is judged by the decoder of the log
itself, from the bytes: a row without a user gives bytes without one.
"""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grstream.config import Config
from grstream.datasets import DatasetError, Rows, mapped, milliseconds, needed_columns
from grstream.events import EventDecoder
from grstream.kafka import partition_of
from grstream.keys import Namespace, key_of

_TO_ESCAPE = r'["\\\x00-\x1f]'  # what JSON does not take in a string as it is


@dataclasses.dataclass(frozen=True)
class Records:
    """What n rows of a file came to."""

    table: pa.Table  # partition, order, offset, timestamp_ms, user, key, value: those that go into the log
    rejected: pa.Table  # rows that are no events: file, row, reason, field, user (key), values (the row)
    left_out: int  # rows whose record time is not before the bound


class RecordMaker:
    """Makes records of rows as `config.replay` says; `before_ms` bounds their record times."""

    def __init__(self, config: Config, partitions: int, before_ms: int | None) -> None:
        self._config, self._partitions, self._before_ms = config, partitions, before_ms
        self._columns, self._names = config.replay.columns, config.replay.records
        if self._columns is None and self._names.value is None:
            raise DatasetError("a backfill needs replay.columns, which names the user, item and time columns")
        self._decoder = EventDecoder(config.events)

    @property
    def of_dump(self) -> bool:
        """Whether rows say their own offsets."""
        return self._names.offset is not None

    @property
    def needed(self) -> list[str]:
        """The columns that are read."""
        known = self._names
        needed = [known.record_time, known.partition, known.offset, known.key, known.value]
        if known.value is None:
            assert self._columns is not None
            needed += needed_columns(self._columns, self._config.replay)
        return list(dict.fromkeys(name for name in needed if name is not None))

    def make(self, table: pa.Table, file: str, numbers: npt.NDArray[np.int64]) -> Records:
        """Records of n rows, which stand at these places (n,) of a file. Raises DatasetError."""
        table = _plain(table)
        users: pa.Array | None = None
        times = np.full(len(table), -1, np.int64)
        if self._names.value is not None:
            values = pc.cast(table[self._names.value].combine_chunks(), pa.binary())
        else:
            assert self._columns is not None
            rows = mapped(table, self._columns, self._config, file, numbers)
            values, times = wire_values(rows, self._config.events.actions), rows.times
            users = pc.cast(rows.users, pa.string())
        if self._names.record_time is not None:
            times, timed = milliseconds(table[self._names.record_time], "ms", self._names.record_time)
            times = np.where(timed, times, -1)
        record_keys = pa.nulls(len(table), pa.binary())  # a lake's events say enough
        if self._names.key is not None:
            record_keys = pc.cast(table[self._names.key].combine_chunks(), pa.binary())
        elif self.of_dump and users is not None:
            record_keys = pc.cast(users, pa.binary())
        decoded = self._decoder.decode(
            0, np.arange(len(table)), values.to_pylist(), times, record_keys.to_pylist()
        )
        bad = np.array([r.offset for r in decoded.rejected], np.int64)
        said = users if users is not None else record_keys
        bad_users = [_user_key(said[row].as_py()) for row in bad.tolist()]
        good, known = np.zeros(len(table), np.bool_), np.zeros(len(table), np.bool_)
        speaks_of = np.zeros(len(table), np.int64)
        good[decoded.batch.offsets] = True
        for rows_of, keys in (
            (decoded.batch.offsets, decoded.batch.users),
            (decoded.tombstones.offsets, decoded.tombstones.users),
            (bad, [key or 0 for key in bad_users]),
        ):
            speaks_of[rows_of], known[rows_of] = keys, True
        known[bad] = [key is not None for key in bad_users]
        if self.of_dump:
            partition, offset = self._places(table)
            kept, order = np.ones(len(table), np.bool_), offset
        else:
            assert users is not None
            kept = good if self._before_ms is None else good & (times < self._before_ms)
            partition, offset, order = self._dealt_out(users, kept), np.zeros(len(table), np.int64), times
        made = pa.table(
            {
                "partition": pa.array(partition, pa.int32()),
                "order": pa.array(order, pa.int64()),
                "offset": pa.array(offset, pa.int64()),
                "timestamp_ms": pa.array(times, pa.int64()),
                "user": pa.array(speaks_of, pa.int64(), mask=~known),
                "key": record_keys,
                "value": values,
            }
        )
        if not kept.all():
            made = made.filter(pa.array(kept))
        rejected = pa.table(
            {
                "file": pa.array([file] * len(bad), pa.string()),
                "row": pa.array(numbers[bad]),
                "reason": pa.array([r.reason for r in decoded.rejected], pa.string()),
                "field": pa.array([r.field for r in decoded.rejected], pa.string()),
                "user": pa.array(bad_users, pa.int64()),
                "values": table.take(pa.array(bad)).to_struct_array(),
            }
        )
        return Records(made, rejected, int(good.sum() - (good & kept).sum()))

    def _places(self, table: pa.Table) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        places = []
        for name in (self._names.partition, self._names.offset):
            column = table[name]
            if not pa.types.is_integer(column.type) or column.null_count or pc.min(column).as_py() < 0:
                raise DatasetError(f"column {name} of a dump must hold an integer of 0 or more in each row")
            places.append(column.to_numpy())
        if places[0].max() >= self._partitions:
            raise DatasetError(
                f"column {self._names.partition} names partition {places[0].max()}, and the topic "
                f"{self._config.kafka.topic} has {self._partitions}: it is not the topic that was dumped"
            )
        return places[0].astype(np.int32), places[1].astype(np.int64)

    def _dealt_out(self, users: pa.Array, of: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """The partition of each of these rows' users, as the topic's producers deal them out."""
        partition = np.full(len(of), -1, np.int32)
        encoded = users.filter(pa.array(of)).dictionary_encode()
        by_user = [partition_of(user, self._partitions) for user in encoded.dictionary.to_pylist()]
        partition[of] = np.array(by_user, np.int32)[encoded.indices.to_numpy()]
        return partition


def wire_values(rows: Rows, actions: list[str]) -> pa.Array:
    """The rows as JSON events, each (n,) binary; what a row lacks is left out."""
    sets, inverse = np.unique(rows.actions, return_inverse=True)
    begins = [
        '{"actions":' + json.dumps([name for bit, name in enumerate(actions) if mask >> bit & 1])
        for mask in sets.tolist()
    ]
    parts = [
        pa.array(begins, pa.string()).take(pa.array(inverse)),
        _member(',"user_id":', _json(rows.users)),
        _member(',"item_id":', _json(rows.items)),
        _member(',"timestamp_ms":', pc.cast(pa.array(rows.times, mask=~rows.timed), pa.string())),
    ]
    if rows.event_ids is not None:
        parts.append(_member(',"event_id":', _json(rows.event_ids)))
    for name, features in (("context", rows.context), ("item_features", rows.item_features)):
        if features:
            # Arrow's null_handling="skip" drops rows that are null throughout, so commas are cut off here.
            members = [_member("," + json.dumps(key) + ":", _json(c)) for key, c in features.items()]
            inner = pc.utf8_slice_codeunits(_joined(members), 1)
            parts.append(pc.binary_join_element_wise(f',"{name}":{{', inner, "}", ""))
    return pc.cast(_joined([*parts, "}"]), pa.binary())


def _joined(parts: Sequence[pa.Array | str]) -> pa.Array:
    """Strings one after another, row by row; a null is none."""
    return pc.binary_join_element_wise(*parts, "", null_handling="replace", null_replacement="")


def _member(name: str, column: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(name, column, "")


def _json(column: pa.Array) -> pa.Array:
    """Ids as JSON numbers or strings; null where there is none."""
    if pa.types.is_integer(column.type):
        return pc.cast(column, pa.string())
    to_escape = pc.match_substring_regex(column, _TO_ESCAPE)
    quoted = pc.binary_join_element_wise('"', pc.cast(column, pa.string()), '"', "")
    if pc.any(to_escape).as_py():
        escaped = [json.dumps(s, ensure_ascii=False) for s in column.filter(to_escape).to_pylist()]
        quoted = pc.replace_with_mask(quoted, pc.fill_null(to_escape, False), pa.array(escaped, pa.string()))
    return quoted


def _user_key(user: str | bytes | None) -> int | None:
    """The key of a user's id as it is spelt, None where that is none."""
    try:
        return key_of(Namespace.USER, user.decode() if isinstance(user, bytes) else user or "")
    except ValueError:
        return None


def _plain(table: pa.Table) -> pa.Table:
    """Strings as strings, however a writer stored them."""
    for i, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            kind = pa.string()
        if kind != field.type:
            table = table.set_column(i, field.name, pc.cast(table[i], kind))
    return table
