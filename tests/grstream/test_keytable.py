"""A key table is a dictionary from keys to dense slots."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grstream.keytable import KeyTable

int64s = st.one_of(st.integers(-4, 20), st.integers(-(2**63), 2**63 - 1))
steps = st.lists(st.tuples(st.booleans(), st.lists(int64s, unique=True, max_size=60)), max_size=20)


def _array(keys) -> np.ndarray:
    return np.array(list(keys), np.int64)


@settings(max_examples=200)
@given(steps=steps, probes=st.lists(int64s, max_size=30))
def test_a_table_finds_what_was_inserted_and_not_removed(steps, probes) -> None:
    table, model = KeyTable(), {}
    for removing, keys in steps:
        if removing:
            gone = [k for k in keys if k in model]
            table.remove(_array(model.pop(k) for k in gone))
        else:
            fresh = [k for k in keys if k not in model]
            slots = table.insert(_array(fresh))
            assert not set(slots.tolist()) & set(model.values())
            model.update(zip(fresh, slots.tolist(), strict=True))
        asked = [*probes, *model, *keys, 0]
        assert table.find(_array(asked)).tolist() == [model.get(k, -1) for k in asked]
        assert len(table) == len(model)
        assert table.slots().tolist() == sorted(model.values())
        assert table.keys(_array(model.values())).tolist() == list(model)
        assert table.stop >= max(model.values(), default=-1) + 1


def test_slots_are_given_in_order_of_insertion_and_reused_newest_first() -> None:
    table = KeyTable()
    assert table.insert(np.arange(100)).tolist() == list(range(100))
    table.remove(np.array([7, 3]))
    assert table.insert(np.arange(200, 203)).tolist() == [3, 7, 100]
    assert table.stop == 101


@pytest.mark.parametrize("stride", [1, 2**32, 2**40, 0x9E3779B97F4A7C15 - 2**64])
def test_keys_in_any_pattern_are_found_in_a_table_that_grows(stride) -> None:
    keys = np.arange(200_000) * np.int64(stride)
    table = KeyTable()
    for part in np.array_split(keys, 37):
        assert (table.find(part) == -1).all()
        table.insert(part)
    assert table.find(keys).tolist() == list(range(200_000))
    assert table.nbytes < 40 * len(keys)
    table.remove(table.find(keys[::2]))
    assert (table.find(keys[::2]) == -1).all()
    assert (table.find(keys[1::2]) == np.arange(1, 200_000, 2)).all()
