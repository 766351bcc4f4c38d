"""Records of JSON to columns, through pyarrow: the fast way of `EventDecoder`.

`ColumnReader.read` fills in the rows that it can read and gives back the others, which may be good or bad; it
accepts nothing that `EventSchema` refuses.

How one bad record, or one oddly typed id, is kept from the rest: records are joined by newlines and parsed at
once, under an explicit schema. Ids may be integers or strings; which of the two a field holds is guessed from
the batch before. If the parse fails, records are grouped by the types that their ids seem to have, and a
group that fails still is halved until what is left is small.

Why rows cannot shift: every record begins with `{`, ends with `}` and holds no newline, and Arrow counts as
many rows as there are records. An unclosed record is followed by `{` after `}` inside an object, or by a raw
newline inside a string; both are errors. So each record holds whole objects, at least one, hence exactly one.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from grstream.config import EventsConfig
from grstream.keys import (
    ABSENT,
    Keys,
    Namespace,
    canonical_id,
    feature_namespace,
    keys_of_ints,
    keys_of_strings,
)

Rows = npt.NDArray[np.int64]  # indices into a batch's records

# At this many records or fewer, halving a refused parse costs more than judging each record alone.
SLOW_AT_MOST = 32
# Inside a field that it ignores Arrow skips what pydantic's parser refuses: deep nesting, endless numbers.
# Records that could hold such a thing are left to the slow way, so that both refuse the same.
_IGNORED_BYTES, _IGNORED_BRACKETS = 4096, 100
# Of an event's `served`, which is judged and not kept.
_SERVED = pa.struct(
    {
        "by": pa.string(),
        "version": pa.int64(),
        "arm": pa.string(),
        "score": pa.float64(),
        "rank": pa.int64(),
    }
)
_DECIMAL = r"^(?:0|-?[1-9][0-9]{0,18})$"
_INT64_DIGITS = 18  # a decimal of so many digits is an int64 for certain


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of n records; a row counts where `good`."""

    good: npt.NDArray[np.bool_]  # (n,)
    users: Keys  # (n,)
    items: Keys  # (n,)
    actions: npt.NDArray[np.int32]  # (n,)
    times: npt.NDArray[np.int64]  # (n,)
    features: npt.NDArray[np.int64]  # (n, F)
    event_keys: Keys  # (n,)
    item_names: dict[int, str]
    exposures: Keys  # (n,)

    @classmethod
    def empty(cls, rows: int, features: int) -> "Columns":
        return cls(
            good=np.zeros(rows, np.bool_),
            users=np.zeros(rows, np.int64),
            items=np.zeros(rows, np.int64),
            actions=np.zeros(rows, np.int32),
            times=np.zeros(rows, np.int64),
            features=np.full((rows, features), ABSENT, np.int64),
            event_keys=np.full(rows, ABSENT, np.int64),
            item_names={},
            exposures=np.full(rows, ABSENT, np.int64),
        )


def event_keys(users: Keys, event_ids: Sequence[str]) -> Keys:
    """Keys of (user, event id): an event id names one occurrence among its user's."""
    return _of_users(Namespace.EVENT, users, event_ids)


def exposure_keys(users: Keys, exposure_ids: Sequence[str]) -> Keys:
    """Keys of (user, exposure id)."""
    return _of_users(Namespace.EXPOSURE, users, exposure_ids)


def _of_users(namespace: Namespace, users: Keys, ids: Sequence[str]) -> Keys:
    keys = keys_of_ints(namespace, keys_of_strings(namespace, ids) ^ users)
    return np.where(keys == ABSENT, 1, keys)


@dataclasses.dataclass(frozen=True)
class _Read:
    """One call of `ColumnReader.read`: what it reads, what it fills, what it leaves."""

    values: Sequence[bytes | None]  # (n,)
    latest: npt.NDArray[np.int64]  # (n,) the greatest time that an event of this record may have
    columns: Columns
    left: list[Rows]


class ColumnReader:
    """Fills columns from records; what it remembers between batches serves speed alone."""

    def __init__(self, config: EventsConfig) -> None:
        self._config = config
        self._ignoring = config.unknown_fields == "ignore"
        self._actions = pa.array(config.actions, pa.string())
        self._namespaces = [feature_namespace(name) for name in config.features]
        self._parsers: dict[frozenset[bytes], pa.json.ParseOptions] = {}
        self._strings: frozenset[bytes] = frozenset()  # id fields that were last seen to be strings
        names = {"user_id", "item_id", *config.context, *config.item_features}
        self._id_fields = re.compile(rb'"(%s)"\s*:\s*(["0-9-])' % "|".join(map(re.escape, names)).encode())

    def read(
        self, values: Sequence[bytes | None], record_times: npt.NDArray[np.int64], columns: Columns
    ) -> list[int]:
        """Fill the columns from the n records. Returns the rows, ascending, that are left to the slow way."""
        # A record without a time (-1) gives no measure of the future. Saturates instead of overflowing.
        latest = np.where(
            record_times < 0,
            np.iinfo(np.int64).max,
            np.minimum(record_times, np.iinfo(np.int64).max - self._config.max_future_ms)
            + self._config.max_future_ms,
        )
        read = _Read(values, latest, columns, [])
        rows = np.arange(len(values))
        if None in values:
            rows = np.array([i for i, value in enumerate(values) if value is not None], np.int64)
        joined = _join(values, rows)
        if not self._safe(joined, len(rows)) or (self._ignoring and not self._shallow(values)):
            safe = np.array([self._safe_alone(values[i]) for i in rows.tolist()], np.bool_)
            read.left.append(rows[~safe])
            rows = rows[safe]
            joined = _join(values, rows)
        if len(rows) and not self._take(read, rows, self._strings, joined):
            groups = sorted(self._group(values, rows), key=lambda group: len(group[1]))
            for strings, members in groups:
                self._halve(read, members, strings)
            self._strings = groups[-1][0]
        return np.sort(np.concatenate(read.left)).tolist() if read.left else []

    @staticmethod
    def _safe(joined: bytes, records: int) -> bool:
        """Whether each of the joined records begins and ends as an object, on one line, in UTF-8."""
        if not (
            joined.startswith(b"{")
            and joined.endswith(b"}")
            and joined.count(b"\n") == joined.count(b"}\n{") == records - 1
        ):
            return False
        if joined.isascii():
            return True
        try:
            joined.decode()
        except UnicodeDecodeError:
            return False
        return True

    @staticmethod
    def _shallow(values: Sequence[bytes | None]) -> bool:
        return all(
            value is None
            or (len(value) <= _IGNORED_BYTES and value.count(b"[") + value.count(b"{") <= _IGNORED_BRACKETS)
            for value in values
        )

    def _safe_alone(self, value: bytes | None) -> bool:
        return value is not None and self._safe(value, 1) and (not self._ignoring or self._shallow([value]))

    def _group(self, values: Sequence[bytes | None], rows: Rows) -> Iterator[tuple[frozenset[bytes], Rows]]:
        """Rows grouped so that, as far as seen, no group has an id field both as string and as integer."""
        alike: dict[frozenset[tuple[bytes, bool]], list[int]] = {}
        for row in rows.tolist():
            seen = frozenset(
                (name, first == b'"') for name, first in self._id_fields.findall(values[row] or b"")
            )
            alike.setdefault(seen, []).append(row)
        merged: list[tuple[set[tuple[bytes, bool]], list[int]]] = []
        for seen, members in alike.items():
            opposite = {(name, not string) for name, string in seen}
            for fields, others in merged:
                if not fields & opposite:
                    fields |= seen
                    others += members
                    break
            else:
                merged.append((set(seen), members))
        for fields, members in merged:
            strings = frozenset(name for name, string in fields if string)
            yield strings, np.sort(np.array(members, np.int64))

    def _halve(self, read: _Read, rows: Rows, strings: frozenset[bytes]) -> None:
        if len(rows) > SLOW_AT_MOST:
            if not self._take(read, rows, strings, _join(read.values, rows)):
                self._halve(read, rows[: len(rows) // 2], strings)
                self._halve(read, rows[len(rows) // 2 :], strings)
        else:
            read.left.append(rows)

    def _take(self, read: _Read, rows: Rows, strings: frozenset[bytes], joined: bytes) -> bool:
        """Parse the joined rows and fill them in; False, with nothing done, if they do not parse."""
        options = pa.json.ReadOptions(use_threads=False, block_size=len(joined) + 1)
        try:
            table = pa.json.read_json(pa.BufferReader(joined), options, self._parser(strings))
        except pa.ArrowInvalid:
            return False
        if len(table) != len(rows):
            return False
        good = self._fill(read.columns, rows, table, read.latest[rows])
        if not good.all():
            read.left.append(rows[~good])
        return True

    def _parser(self, strings: frozenset[bytes]) -> pa.json.ParseOptions:
        if strings not in self._parsers:

            def id_type(name: str) -> pa.DataType:
                return pa.string() if name.encode() in strings else pa.int64()

            schema = {
                "event_id": pa.string(),
                "user_id": id_type("user_id"),
                "item_id": id_type("item_id"),
                "actions": pa.list_(pa.string()),
                "timestamp_ms": pa.int64(),
                "context": pa.struct([(name, id_type(name)) for name in self._config.context]),
                "item_features": pa.struct([(name, id_type(name)) for name in self._config.item_features]),
                **({"exposure_id": pa.string(), "served": _SERVED} if self._config.exposures else {}),
            }
            self._parsers[strings] = pa.json.ParseOptions(
                explicit_schema=pa.schema(schema),
                unexpected_field_behavior="ignore" if self._ignoring else "error",
            )
        return self._parsers[strings]

    def _fill(
        self, columns: Columns, rows: Rows, table: pa.Table, latest: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Fill in the table's rows where they are good; returns where."""
        times, good = _integers(_column(table, "timestamp_ms"))
        good &= (times >= 0) & (times <= latest)
        users, fine, _ = _id_keys(Namespace.USER, _column(table, "user_id"))
        good &= fine
        items, fine, names = _id_keys(Namespace.ITEM, _column(table, "item_id"))
        good &= fine
        actions, fine = self._masks(_column(table, "actions"))
        good &= fine
        features = np.full((len(rows), columns.features.shape[1]), ABSENT, np.int64)
        f = 0
        for field, of_field in (
            ("context", self._config.context),
            ("item_features", self._config.item_features),
        ):
            for i in range(len(of_field)):
                column = pc.struct_field(_column(table, field), i)
                keys, fine, _ = _id_keys(self._namespaces[f], column)
                given = column.is_valid().to_numpy(zero_copy_only=False)
                good &= fine | ~given
                features[:, f] = np.where(given, keys, ABSENT)
                f += 1
        occurrences, fine = _named(event_keys, users, _column(table, "event_id"))
        good &= fine
        exposures = np.full(0, ABSENT, np.int64)
        if self._config.exposures:
            exposures, fine = _named(exposure_keys, users, _column(table, "exposure_id"))
            good &= fine
            # An exposure id names one showing: sent again without an event id, it is the same event.
            occurrences = np.where((occurrences == ABSENT) & (actions == 0), exposures, occurrences)

        if good.all():
            at: Rows | slice = slice(None)
            to = rows
        else:
            at = np.flatnonzero(good)
            to = rows[at]
        columns.good[to] = True
        columns.users[to] = users[at]
        columns.items[to] = items[at]
        columns.actions[to] = actions[at]
        columns.times[to] = times[at]
        columns.features[to] = features[at]
        columns.event_keys[to] = occurrences[at]
        if len(exposures):
            columns.exposures[to] = exposures[at]
        if names:
            present = set(items[at].tolist())
            columns.item_names.update((key, name) for key, name in names.items() if key in present)
        return good

    def _masks(self, column: pa.Array) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Each row's actions as bits, and whether they are configured names without repeats."""
        good = column.is_valid().to_numpy(zero_copy_only=False)
        lengths = pc.fill_null(column.value_lengths(), 0).to_numpy(zero_copy_only=False)
        codes = pc.index_in(column.flatten(), self._actions)
        known = codes.is_valid().to_numpy(zero_copy_only=False)
        bits = np.int64(1) << pc.fill_null(codes, 0).to_numpy(zero_copy_only=False).astype(np.int64)
        if not known.all():
            good[np.repeat(np.arange(len(lengths)), lengths)[~known]] = False
        if (lengths == 1).all():
            return bits.astype(np.int32), good
        masks = np.zeros(len(lengths), np.int64)
        some = np.flatnonzero(lengths)
        if len(some):
            starts = (np.cumsum(lengths) - lengths)[some]
            masks[some] = np.bitwise_or.reduceat(bits, starts)
            good[some] &= np.add.reduceat(bits, starts) == masks[some]  # else an action is repeated
        return masks.astype(np.int32), good


def _join(values: Sequence[bytes | None], rows: Rows) -> bytes:
    if len(rows) == len(values):
        return b"\n".join(values)  # type: ignore[arg-type]
    return b"\n".join([values[i] or b"" for i in rows.tolist()])


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _integers(column: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The values, 0 where null, and where they are not null (a fresh array)."""
    if not column.null_count:
        return column.to_numpy(), np.ones(len(column), np.bool_)
    return pc.fill_null(column, 0).to_numpy(), column.is_valid().to_numpy(zero_copy_only=False)


def _id_keys(namespace: int, column: pa.Array) -> tuple[Keys, npt.NDArray[np.bool_], dict[int, str]]:
    """Keys of a column of ids, where there is a valid id, and the strings by key."""
    if pa.types.is_integer(column.type):
        ids, good = _integers(column)
        return keys_of_ints(namespace, ids), good, {}
    encoded = column.dictionary_encode()
    codes, good = _integers(encoded.indices)
    if not len(encoded.dictionary):
        return np.zeros(len(column), np.int64), good, {}
    keys = np.empty(len(encoded.dictionary), np.int64)
    decimal = pc.match_substring_regex(encoded.dictionary, _DECIMAL)
    spelt = decimal.to_numpy(zero_copy_only=False)
    strings = np.flatnonzero(~spelt).tolist()
    texts = encoded.dictionary.filter(pc.invert(decimal)).to_pylist()
    if len(strings) < len(spelt):
        integers = encoded.dictionary.filter(decimal)
        short = pc.binary_length(integers)
        if pc.max(short).as_py() <= _INT64_DIGITS:
            keys[spelt] = keys_of_ints(namespace, pc.cast(integers, pa.int64()).to_numpy())
        else:
            for i, text in zip(np.flatnonzero(spelt).tolist(), integers.to_pylist(), strict=True):
                value = canonical_id(text)
                if isinstance(value, int):
                    keys[i] = keys_of_ints(namespace, np.array([value], np.int64))[0]
                else:
                    strings.append(i)
                    texts.append(text)
    keys[strings] = of_texts = keys_of_strings(namespace, texts)
    if "" in texts:
        empty = strings[texts.index("")]
        good &= codes != empty
    return keys[codes], good, dict(zip(of_texts.tolist(), texts, strict=True))


def _named(
    keys_of: Callable[[Keys, Sequence[str]], Keys], users: Keys, column: pa.Array
) -> tuple[Keys, npt.NDArray[np.bool_]]:
    """Keys of (user, id), ABSENT where there is no id, and where the id, if any, is valid."""
    good = np.ones(len(column), np.bool_)
    if column.null_count == len(column):
        return np.full(len(column), ABSENT, np.int64), good
    ids = column.to_pylist()
    if column.null_count:
        given = column.is_valid().to_numpy(zero_copy_only=False)
        keys = np.full(len(column), ABSENT, np.int64)
        keys[given] = keys_of(users[given], [i for i in ids if i is not None])
    else:
        keys = keys_of(users, ids)
    if "" in ids:
        good[[i for i, text in enumerate(ids) if text == ""]] = False
    return keys, good
