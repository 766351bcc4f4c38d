"""Rows of Parquet become the bytes that a producer would have sent, in the partition it would choose."""

import json
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest

from grstream.config import Config, ConfigError, parse
from grstream.datasets import DatasetError
from grstream.events import ActionEvent, EventSchema
from grstream.kafka import partition_of
from grstream.keys import INT64_MAX, INT64_MIN, Namespace, key_of
from grstream.records import RecordMaker, Records

COLUMNS = {"user": "u", "item": "i", "time": "t", "time_unit": "ms", "event_id": "id"}
FAR = 2**62


def config(**replay: Any) -> Config:
    return parse(
        {
            "storage": "var",
            "events": {
                "actions": ["seen", "liked"],
                "context": ["place"],
                "item_features": ["kind", "maker"],
            },
            "replay": {
                "columns": COLUMNS,
                "actions": [{"action": "seen"}, {"action": "liked", "column": "stars", "at_least": 4}],
                "context": {"place": "p"},
                "item_features": {"kind": "k", "maker": "m"},
                **replay,
            },
        }
    )


def make(rows: dict[str, Any], before_ms: int | None = FAR, partitions: int = 7, **replay: Any) -> Records:
    maker = RecordMaker(config(**replay), partitions, before_ms)
    table = pa.table(rows)
    return maker.make(table.select(maker.needed), "f.parquet", np.arange(len(table)))


ints = st.integers(INT64_MIN, INT64_MAX)
texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ['"', "\\", "\n\x00é", "007", "-0"]
)
ids = st.one_of(
    st.lists(st.none() | ints, min_size=4, max_size=4), st.lists(st.none() | texts, min_size=4, max_size=4)
)


@hypothesis.given(ids, ids, ids, ids, st.lists(st.integers(0, FAR - 1), min_size=4, max_size=4))
def test_a_row_is_the_event_of_its_values(
    users: list, items: list, places: list, makers: list, times: list
) -> None:
    def column(values: list) -> pa.Array:
        texts = any(isinstance(v, str) for v in values)
        return pa.array(values, pa.string() if texts else pa.int64())

    ids = ['a"1', None, "é\\", "7"]
    stars = [4, 3, None, 5]
    rows = {
        **{"u": column(users), "i": column(items), "t": times, "id": ids, "stars": stars},
        **{"p": column(places), "k": pa.array([None] * 4, pa.string()), "m": column(makers)},
    }
    found = make(rows)
    schema = EventSchema(config().events)
    expected = [
        ActionEvent(
            event_id=ids[n],
            user_id=users[n],
            item_id=items[n],
            actions=["seen", "liked"] if (stars[n] or 0) >= 4 else ["seen"],
            timestamp_ms=times[n],
            context={"place": places[n]} if places[n] not in (None, "") else {},
            item_features={"maker": makers[n]} if makers[n] not in (None, "") else {},
        )
        for n in range(4)
        if users[n] not in (None, "") and items[n] not in (None, "")
    ]
    assert [schema.validate(value) for value in found.table["value"].to_pylist()] == expected
    assert found.table["timestamp_ms"].to_pylist() == [e.timestamp_ms for e in expected]
    assert found.table["partition"].to_pylist() == [partition_of(e.user_id, 7) for e in expected]
    assert found.table["user"].to_pylist() == [key_of(Namespace.USER, e.user_id) for e in expected]
    assert len(found.rejected) == 4 - len(expected)


def rows(**columns: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"u": [1, 2], "i": [1, 2], "t": [10, 20], "id": ["a", "b"], "stars": [1, 5]}
    return {**plain, "p": ["x", "y"], "k": [1, 2], "m": [1, 2], **columns}


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"u": pa.array([1, None], pa.int64())}, "user_id"),
        ({"i": ["x", ""]}, "item_id"),
        ({"t": [1, -5]}, "timestamp_ms"),
        ({"t": [1.0, float("nan")]}, "timestamp_ms"),
        ({"t": ["1", "yesterday"]}, "timestamp_ms"),
        ({"t": pa.array([1, 2**64 - 1], pa.uint64())}, "timestamp_ms"),
    ],
)
def test_a_row_that_is_no_event_is_kept_with_the_reason(wrong: dict[str, Any], field: str) -> None:
    found = make(rows(**wrong))
    assert len(found.table) == 1
    [rejected] = found.rejected.to_pylist()
    assert (rejected["file"], rejected["row"], rejected["field"]) == ("f.parquet", 1, field)
    assert rejected["reason"]
    assert rejected["values"]["id"] == "b"
    assert rejected["user"] == (None if field == "user_id" else key_of(Namespace.USER, 2))


def test_an_unsigned_id_beyond_int64_is_the_string_that_spells_it() -> None:
    found = make(rows(u=pa.array([7, 2**64 - 1], pa.uint64())))
    schema = EventSchema(config().events)
    assert [schema.validate(v).user_id for v in found.table["value"].to_pylist()] == [7, str(2**64 - 1)]


def test_rows_at_the_bound_and_later_are_left_out_and_counted() -> None:
    found = make(rows(), before_ms=20)
    assert (found.table["timestamp_ms"].to_pylist(), found.left_out) == ([10], 1)
    found = make(rows(w=[25, 15]), before_ms=20, records={"record_time": "w"})
    assert (found.table["timestamp_ms"].to_pylist(), found.left_out) == ([15], 1)


def test_an_event_far_beyond_its_record_s_own_time_is_rejected_as_on_the_topic() -> None:
    found = make(rows(t=[10, 10_000_000], w=[10, 20]), records={"record_time": "w"})
    assert (len(found.table), found.rejected["field"].to_pylist()) == (1, ["timestamp_ms"])


def test_without_a_column_of_ids_file_and_row_are_the_id_or_there_is_none() -> None:
    columns = {k: v for k, v in COLUMNS.items() if k != "event_id"}
    found = make(rows(), columns=columns)
    assert [json.loads(v)["event_id"] for v in found.table["value"].to_pylist()] == [
        "f.parquet:0",
        "f.parquet:1",
    ]
    found = make(rows(), columns=columns, event_ids=False)
    assert not any("event_id" in json.loads(v) for v in found.table["value"].to_pylist())


DUMP = {"partition": "P", "offset": "O"}


def test_rows_of_a_dump_keep_their_places_and_what_is_no_event_keeps_its_own() -> None:
    found = make(rows(P=[6, 0], O=[FAR, 3], u=["é", None]), before_ms=None, records=DUMP)
    assert found.table.select(["partition", "offset", "order"]).to_pylist() == [
        {"partition": 6, "offset": FAR, "order": FAR},
        {"partition": 0, "offset": 3, "order": 3},
    ]
    assert found.table["user"].to_pylist() == [key_of(Namespace.USER, "é"), None]
    assert found.rejected["row"].to_pylist() == [1]
    assert found.table["key"].to_pylist() == ["é".encode(), None]


def test_a_dump_may_hold_the_records_bytes_themselves() -> None:
    values = [b'{"user_id":1,"item_id":2,"actions":[],"timestamp_ms":5}', b"poison", None]
    found = make(
        {"P": [0] * 3, "O": [1, 2, 3], "k": [b"1", None, "ü".encode()], "v": values, "w": [7, 8, None]},
        before_ms=None,
        columns=None,
        records={**DUMP, "key": "k", "value": "v", "record_time": "w"},
    )
    assert found.table["key"].to_pylist() == [b"1", None, "ü".encode()]
    assert found.table["user"].to_pylist() == [key_of(Namespace.USER, 1), None, key_of(Namespace.USER, "ü")]
    assert found.table["value"].to_pylist() == values
    assert found.table["timestamp_ms"].to_pylist() == [7, 8, -1]
    assert found.rejected["row"].to_pylist() == [1]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"P": [0, 7], "O": [1, 2]}, "names partition 7, and the topic actions has 7"),
        ({"P": [0, 1], "O": [1, -2]}, "column O of a dump must hold an integer of 0 or more"),
        ({"P": [0, 1], "O": pa.array([1, None], pa.int64())}, "column O of a dump"),
        ({"P": ["0", "1"], "O": [1, 2]}, "column P of a dump"),
    ],
)
def test_a_dump_that_is_not_of_the_topic_is_refused(places: dict[str, Any], said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        make(rows(**places), before_ms=None, records=DUMP)


def test_a_configuration_of_records_that_says_half_is_refused() -> None:
    for records, said in [
        ({"partition": "P"}, "given together"),
        ({"value": "v"}, "need partition and offset"),
    ]:
        with pytest.raises(ConfigError, match=said):
            config(records=records)
    with pytest.raises(DatasetError, match=r"needs replay\.columns"):
        RecordMaker(config(columns=None), 1, FAR)


def test_strings_may_be_stored_in_any_of_arrows_ways() -> None:
    plain = make(rows(u=["a", "b"]))
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        assert make(rows(u=pa.array(["a", "b"]).cast(kind))).table.equals(plain.table)
