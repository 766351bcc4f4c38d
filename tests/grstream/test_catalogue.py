import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grstream.catalogue import Catalogue, CatalogueFold, ItemDecoder, ItemRecord
from grstream.config import EventsConfig
from grstream.events import InvalidEvent
from grstream.keys import ABSENT, Namespace, feature_namespace, key_of

CONFIG = EventsConfig(actions=["click"], item_features=["category", "brand"])
Row = tuple[int, Any, bytes | None, int]  # offset, key, value, record time


def content(catalogue: Catalogue) -> dict[int, tuple[list[int], bool]]:
    columns = (catalogue.keys, catalogue.features, catalogue.available)
    return {k: (f, a) for k, f, a in zip(*(c.tolist() for c in columns), strict=True)}


def fold(fold: CatalogueFold, partition: int, rows: list[Row]) -> None:
    batch, rejected = ItemDecoder(CONFIG).decode(partition, *(zip(*rows, strict=True) if rows else [()] * 4))
    assert not rejected
    fold.take(batch)


def test_a_record_is_what_the_configuration_allows_or_refused_with_its_field() -> None:
    decoder = ItemDecoder(CONFIG)
    whole = {"item_id": "7", "item_features": {"brand": "b", "category": None}, "timestamp_ms": 3}
    assert decoder.validate(json.dumps(whole).encode()) == ItemRecord(
        item_id=7, item_features={"brand": "b"}, timestamp_ms=3
    )
    for change, field in [
        ({"colour": 1}, "colour"),
        ({"item_features": {"colour": 1}}, "item_features.colour"),
        ({"available": "no"}, "available"),
        ({"item_id": 1.5}, "item_id"),
        ({"timestamp_ms": -1}, "timestamp_ms"),
    ]:
        with pytest.raises(InvalidEvent) as caught:
            decoder.validate(json.dumps(whole | change).encode())
        assert caught.value.field == field
    lenient = ItemDecoder(CONFIG.model_copy(update={"unknown_fields": "ignore"}))
    odd = whole | {"colour": 1, "item_features": {"colour": [], "brand": "b"}}
    assert lenient.validate(json.dumps(odd).encode()).item_features == {"brand": "b"}


def test_a_key_must_spell_the_item() -> None:
    batch, rejected = ItemDecoder(CONFIG).decode(
        0,
        range(5),
        [b"1", None, b"2", b"\xff", b"ann"],
        [ItemRecord(item_id=1).to_json(), b"{}", ItemRecord(item_id=3).to_json(), None, None],
        [-1] * 5,
    )
    assert [(r.offset, r.field) for r in rejected] == [(1, "key"), (2, "item_id"), (3, "key")]
    ann = key_of(Namespace.ITEM, "ann")
    assert (batch.keys.tolist(), batch.names) == ([key_of(Namespace.ITEM, 1), ann], {ann: "ann"})


def test_features_have_the_keys_and_columns_of_events() -> None:
    state = CatalogueFold(2)
    fold(state, 0, [(0, b"1", ItemRecord(item_id=1, item_features={"brand": "b"}).to_json(), 5)])
    brand = key_of(feature_namespace("item.brand"), "b")
    assert content(state.catalogue()) == {key_of(Namespace.ITEM, 1): ([ABSENT, brand], True)}


IDS: list[int | str] = [1, 2, "ann", "bob"]
records = st.tuples(
    st.sampled_from(IDS), st.none() | st.tuples(st.booleans(), st.integers(0, 2)), st.integers(-1, 9)
)


def row(offset: int, item: int | str, said: tuple[bool, int] | None, time: int) -> Row:
    value = None
    if said is not None:
        value = ItemRecord(item_id=item, available=said[0], item_features={"brand": said[1]}).to_json()
    return offset, str(item).encode(), value, time


def expected(log: list[Row]) -> dict[int, tuple[list[int], bool]]:
    """The last record of each key, one after the other in plain Python."""
    out = {}
    for _, key, value, _ in log:
        said = ItemRecord.model_validate_json(value) if value else ItemRecord(item_id=0, available=False)
        given = said.item_features.get("brand")
        brand = ABSENT if given is None else key_of(feature_namespace("item.brand"), given)
        out[key_of(Namespace.ITEM, key.decode())] = ([ABSENT, brand], said.available)
    return out


@given(st.lists(records, max_size=40), st.data())
def test_the_last_record_of_a_key_holds_however_the_log_is_cut(log: list, data: st.DataObject) -> None:
    rows = [row(i, *record) for i, record in enumerate(log)]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(rows)))) | {0, len(rows)})
    state, held, revision = CatalogueFold(2), [], 0
    for start, stop in itertools.pairwise(cuts):
        before = state.catalogue()
        fold(state, 0, rows[start:stop])
        now = state.catalogue()
        held.append((now, content(now)))
        assert (now.revision > before.revision) == (content(now) != content(before))
        where = now.changed_since(before.revision)
        was = content(before)
        assert set(now.keys[where].tolist()) == {k for k, v in content(now).items() if was.get(k) != v}
        assert now.keys[: len(before)].tolist() == before.keys.tolist()
        assert content(now) == expected(rows[:stop])
        revision = now.revision
    assert state.revision == revision
    for catalogue, was in held:  # none changes with what came later
        assert content(catalogue) == was
    ann = key_of(Namespace.ITEM, "ann")
    assert state.catalogue().names.get(ann) == ("ann" if ann in content(state.catalogue()) else None)


@given(st.lists(st.tuples(st.integers(0, 2), records), max_size=30), st.randoms(use_true_random=False))
def test_partitions_may_be_read_in_any_order(log: list, random: Any) -> None:
    """A topic that got more partitions has old records of a key in one and newer ones in another."""
    parts: dict[int, list[Row]] = {}
    for i, (partition, record) in enumerate(log):
        parts.setdefault(partition, []).append(row(i, *record))
    in_turn, mixed = CatalogueFold(2), CatalogueFold(2)
    for partition, rows in sorted(parts.items()):
        fold(in_turn, partition, rows)
    left = {p: list(rows) for p, rows in parts.items()}
    while left:
        partition = random.choice(sorted(left))
        fold(mixed, partition, [left[partition].pop(0)])
        left = {p: rows for p, rows in left.items() if rows}
    assert content(in_turn.catalogue()) == content(mixed.catalogue())


def test_a_catalogue_cannot_be_written_to_and_copies_only_when_it_must() -> None:
    state = CatalogueFold(2)
    fold(state, 0, [row(0, 1, (True, 1), 1), row(1, 2, (True, 1), 1)])
    first = state.catalogue()
    with pytest.raises(ValueError, match="read-only"):
        first.available[0] = False
    fold(state, 0, [row(2, "ann", (True, 1), 1)])
    second = state.catalogue()
    assert np.shares_memory(first.features, second.features)  # an item more is no change of those before
    fold(state, 0, [row(3, 1, None, 1)])
    assert first.available.tolist() == [True, True]
    assert state.catalogue().available.tolist() == [False, True, True]
