"""Data sets as action events, in the order of time: MovieLens, Deskdrop, any CSV or Parquet.

A data set is a file of rows (user, item, time, ...). `replay.columns` says which columns these are, known
formats bring their own; `replay.actions` says which rows carry which actions. Rows of one time keep their
order. A row that cannot be an event (no user, item or time) is counted in `Dataset.skipped`; a file that
is not what it should be is a `DatasetError`. Ids are taken as they are spelt: `007` is a string.

A data set is held in memory whole, as it must be sorted.
"""

import dataclasses
import datetime
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from grstream.config import ActionRule, ColumnsConfig, Config, ReplayConfig
from grstream.events import ActionEvent

# A file with the order of events but not their times gets times a second apart from here on (2000-01-01).
SYNTHETIC_EPOCH_MS = 946_684_800_000
_ROWS_AT_ONCE = 10_000  # rows turned into events at a time


class DatasetError(ValueError):
    """The file is not a data set that the configuration describes; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class _Format:
    """How files of a kind are read, and what their columns mean unless the configuration says otherwise."""

    file_name: re.Pattern[str]
    columns: ColumnsConfig | None = None
    header: tuple[str, ...] = ()  # of a file without one
    delimiter: str = ","


# In the order in which names are tried.
_FORMATS = {
    "ml-100k": _Format(
        re.compile(r"u\.data|u[1-5ab]\.(base|test)"),
        ColumnsConfig(user="user", item="item", time="timestamp"),
        ("user", "item", "rating", "timestamp"),
        "\t",
    ),
    "ml-1m": _Format(
        re.compile(r"ratings\.dat"),
        ColumnsConfig(user="user", item="item", time="timestamp"),
        ("user", "item", "rating", "timestamp"),
        "::",
    ),
    "ml-1m-tail": _Format(
        re.compile(r"tail\d+_\w+\.tsv"),
        ColumnsConfig(user="user_id", item="item_id", time="time"),
        delimiter="\t",
    ),
    "ml-1m-sequences": _Format(
        re.compile(r"sequences.*\.parquet"),
        ColumnsConfig(user="user", item="item", time="time", time_unit="ms"),
    ),
    "deskdrop": _Format(
        re.compile(r"users_interactions\.csv"),
        ColumnsConfig(user="personId", item="contentId", time="timestamp"),
    ),
    "csv": _Format(re.compile(r".*\.csv")),
    "parquet": _Format(re.compile(r".*\.parquet")),
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The events of a file, oldest first."""

    name: str
    rows: npt.NDArray[np.int64]  # (n,) the row of the file, counted from 0
    users: pa.Array  # (n,) int64 or string
    items: pa.Array  # (n,) int64 or string
    times: npt.NDArray[np.int64]  # (n,) milliseconds since 1970
    actions: npt.NDArray[np.int64]  # (n,) bits, of `action_names`
    action_names: tuple[str, ...]
    context: dict[str, pa.Array]  # of (n,), null where the row has none
    item_features: dict[str, pa.Array]
    skipped: dict[str, int]  # rows that are no events, by reason
    event_ids: pa.Array | None  # (n,) strings; None without ids

    def __len__(self) -> int:
        return len(self.rows)

    def events(self) -> Iterator[ActionEvent]:
        """The events."""
        sets = {
            mask: [name for bit, name in enumerate(self.action_names) if mask >> bit & 1]
            for mask in np.unique(self.actions).tolist()
        }
        for at in range(0, len(self), _ROWS_AT_ONCE):
            here = slice(at, at + _ROWS_AT_ONCE)
            features = [
                {name: column[here].to_pylist() for name, column in columns.items()}
                for columns in (self.context, self.item_features)
            ]
            ids = [None] * len(self.rows[here])
            if self.event_ids is not None:
                ids = self.event_ids[here].to_pylist()
            rows = zip(
                ids,
                self.users[here].to_pylist(),
                self.items[here].to_pylist(),
                self.times[here].tolist(),
                self.actions[here].tolist(),
                strict=True,
            )
            for i, (event_id, user, item, time, mask) in enumerate(rows):
                context, item_features = ({name: c[i] for name, c in f.items()} for f in features)
                yield ActionEvent(
                    event_id=event_id,
                    user_id=user,
                    item_id=item,
                    actions=sets[mask],
                    timestamp_ms=time,
                    context=context,
                    item_features=item_features,
                )


def load(path: str | os.PathLike[str], config: Config) -> Dataset:
    """Read a file as `config.replay` says. Raises DatasetError."""
    path = pathlib.Path(path)
    replay = config.replay
    name = replay.format or _told_by_name(path)
    columns = replay.columns or _FORMATS[name].columns
    if columns is None:
        raise DatasetError(
            f"{path.name}: a {name} file needs replay.columns, which names its user, item and time columns"
        )
    try:
        table = _read(path, name, needed_columns(columns, replay))
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"cannot read {path} as {name}: {error}") from error
    rows = mapped(table, columns, config, path.name, np.arange(len(table)))
    reasons = {
        "no time that can be read": ~rows.timed,
        "a time before 1970": rows.timed & (rows.times < 0),
        "no user": _nulls(rows.users),
        "no item": _nulls(rows.items),
    }
    usable = np.ones(len(table), np.bool_)
    skipped = {}
    for reason, unusable in reasons.items():
        if count := int(np.count_nonzero(usable & unusable)):
            skipped[reason] = count
        usable &= ~unusable
    order = np.flatnonzero(usable)
    order = order[np.argsort(rows.times[order], kind="stable")]
    at = pa.array(order)
    return Dataset(
        name=path.name,
        rows=order,
        users=rows.users.take(at),
        items=rows.items.take(at),
        times=rows.times[order],
        actions=rows.actions[order],
        action_names=tuple(config.events.actions),
        context={feature: column.take(at) for feature, column in rows.context.items()},
        item_features={feature: column.take(at) for feature, column in rows.item_features.items()},
        skipped=skipped,
        event_ids=None if rows.event_ids is None else rows.event_ids.take(at),
    )


@dataclasses.dataclass(frozen=True)
class Rows:
    """The n rows of a table in the configuration's terms, events or not; ids are int64 or string."""

    users: pa.Array  # (n,) null where there is none, as below
    items: pa.Array  # (n,)
    times: npt.NDArray[np.int64]  # (n,) milliseconds since 1970
    timed: npt.NDArray[np.bool_]  # (n,) where a time could be read
    actions: npt.NDArray[np.int64]  # (n,) bits, of `config.events.actions`
    context: dict[str, pa.Array]
    item_features: dict[str, pa.Array]
    event_ids: pa.Array | None  # (n,) strings


def mapped(
    table: pa.Table, columns: ColumnsConfig, config: Config, name: str, numbers: npt.NDArray[np.int64]
) -> Rows:
    """What rows say, by `config.replay`. `name` and `numbers` (n,) are their file and their places in it."""
    replay = config.replay
    times, timed = milliseconds(table[columns.time], columns.time_unit, columns.time)
    event_ids = None
    if columns.event_id is not None:
        event_ids = pc.cast(_ids(table, columns.event_id), pa.string())
    elif replay.event_ids:
        event_ids = pc.binary_join_element_wise(name, pc.cast(pa.array(numbers), pa.string()), ":")
    return Rows(
        users=_ids(table, columns.user),
        items=_ids(table, columns.item),
        times=times,
        timed=timed,
        actions=_masks(table, replay.actions, config.events.actions),
        context={feature: _ids(table, column) for feature, column in replay.context.items()},
        item_features={feature: _ids(table, column) for feature, column in replay.item_features.items()},
        event_ids=event_ids,
    )


def needed_columns(columns: ColumnsConfig, replay: ReplayConfig) -> list[str]:
    """The columns that `mapped` reads, each once."""
    rules = [rule.column for rule in replay.actions if rule.column is not None]
    needed = [columns.user, columns.item, columns.time, *rules]
    needed += [*replay.context.values(), *replay.item_features.values()]
    needed += [columns.event_id] if columns.event_id is not None else []
    return list(dict.fromkeys(needed))


def _told_by_name(path: pathlib.Path) -> str:
    for name, known in _FORMATS.items():
        if known.file_name.fullmatch(path.name):
            return name
    raise DatasetError(
        f"the name {path.name} tells no format; say replay.format, one of {', '.join(_FORMATS)}"
    )


def _read(path: pathlib.Path, name: str, needed: Sequence[str]) -> pa.Table:
    """The needed columns: those of a text file as strings, empty where there is nothing."""
    known = _FORMATS[name]
    if name == "ml-1m-sequences":
        table = _spread(pa.parquet.read_table(path, columns=["item_ids"]))
        _check_columns(path, table.column_names, needed)
        return table
    if name == "parquet":
        _check_columns(path, pa.parquet.read_schema(path).names, needed)
        return pa.parquet.read_table(path, columns=list(needed))
    data = path.read_bytes()
    delimiter = known.delimiter
    if len(delimiter) > 1:  # which pyarrow does not know
        data, delimiter = data.replace(delimiter.encode(), b"\t"), "\t"
    read = pa.csv.ReadOptions(column_names=list(known.header) or None)
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pa.csv.open_csv(pa.BufferReader(data), read, parse) as reader:
        _check_columns(path, reader.schema.names, needed)
    convert = pa.csv.ConvertOptions(
        include_columns=list(needed), column_types=dict.fromkeys(needed, pa.string())
    )
    return pa.csv.read_csv(pa.BufferReader(data), read, parse, convert)


def _check_columns(path: pathlib.Path, found: Sequence[str], needed: Sequence[str]) -> None:
    missing = [column for column in needed if column not in found]
    if missing:
        raise DatasetError(
            f"{path.name} has no column {', '.join(missing)}, which replay asks for; "
            f"it has {', '.join(found)}"
        )


def _spread(sequences: pa.Table) -> pa.Table:
    """ML-1M's sequences, row i being the items of user i + 1 in order, as rows with a made-up time.

    The k-th of a user's n events stands at the fraction (k + ½) / n of the whole, so that each user is active
    throughout and keeps its order; times are a second apart.
    """
    lists = sequences["item_ids"].combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    users = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    k = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    order = np.argsort((k + 0.5) / np.repeat(lengths, lengths), kind="stable")
    times = np.empty(len(users), np.int64)
    times[order] = SYNTHETIC_EPOCH_MS + 1000 * np.arange(len(users))
    return pa.table({"user": users, "item": lists.flatten(), "time": times})


def milliseconds(
    column: pa.ChunkedArray, unit: str, name: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """A column of times as milliseconds, and where they could be read. `unit`: as of `ColumnsConfig`."""
    if pa.types.is_string(column.type) and unit != "iso":
        number = pc.match_substring_regex(column, r"^-?[0-9]{1,15}(\.[0-9]+)?$")
        column = pc.cast(pc.if_else(number, column, pa.scalar(None, pa.string())), pa.float64())
    elif pa.types.is_string(column.type):
        parts = [_iso(text) for text in column.to_pylist()]
        column = pa.chunked_array([pa.array(parts, pa.timestamp("ms"))])
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        column = pc.cast(pc.cast(column, pa.timestamp("ms"), safe=False), pa.int64())
    elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise DatasetError(f"column {name} holds {column.type}, which is no time")
    else:
        # Beyond what milliseconds can say in an int64 a number is no time: it would wrap around.
        far = 9e18 / (1000 if unit == "s" else 1)
        within = pc.less(pc.abs(pc.cast(column, pa.float64(), safe=False)), far)  # NaN is not
        column = pc.if_else(pc.fill_null(within, False), column, pa.scalar(None, column.type))
        if unit == "s":
            column = pc.multiply(pc.cast(column, pa.int64()) if _is_integer(column) else column, 1000)
    column = pc.cast(pc.round(column), pa.int64(), safe=False)
    return pc.fill_null(column, 0).to_numpy(), ~_nulls(column)


def _is_integer(column: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_integer(column.type))


def _iso(text: str | None) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(text or "")
    except ValueError:
        return None
    if time.tzinfo is not None:
        time = time.astimezone(datetime.UTC).replace(tzinfo=None)
    return time


def _ids(table: pa.Table, name: str) -> pa.Array:
    """A column of ids as int64 or string, null where there is none."""
    column = table[name].combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_uint64(column.type):
        return pc.cast(column, pa.string())  # a spelt int64 is that integer, and a greater one a string
    if pa.types.is_integer(column.type):
        return pc.cast(column, pa.int64())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DatasetError(f"column {name} holds {column.type}; an id is an integer or a string")
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)


def _nulls(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    return np.asarray(column.is_null())


def _masks(table: pa.Table, rules: Sequence[ActionRule], actions: Sequence[str]) -> npt.NDArray[np.int64]:
    """Each row's actions as bits, by the rules."""
    masks = np.zeros(len(table), np.int64)
    for rule in rules:
        masks |= np.where(_carries(table, rule), 1 << actions.index(rule.action), 0)
    return masks


def _carries(table: pa.Table, rule: ActionRule) -> npt.NDArray[np.bool_]:
    if rule.column is None:
        return np.ones(len(table), np.bool_)
    column = table[rule.column]
    if rule.equals is not None:
        holds = pc.equal(pc.cast(column, pa.string()), rule.equals)
    else:
        if pa.types.is_string(column.type):
            column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
        try:
            holds = pc.greater_equal(pc.cast(column, pa.float64()), rule.at_least)
        except pa.ArrowInvalid as error:
            raise DatasetError(
                f"column {rule.column}, which action {rule.action} compares with {rule.at_least}, "
                f"is not numeric: {error}"
            ) from error
    return np.asarray(pc.fill_null(holds, False))
