"""Ids keep their form and integers never collide."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grstream import keys
from grstream.keys import Namespace

names = st.text("abcxyz_.", min_size=1, max_size=12)
int64 = st.integers(keys.INT64_MIN, keys.INT64_MAX)


@given(ids=st.lists(int64, min_size=1), namespace=st.integers(1, 100))
def test_an_integer_is_found_again_from_its_key(ids, namespace) -> None:
    array = np.array(ids, np.int64)
    assert keys.ints_of_keys(namespace, keys.keys_of_ints(namespace, array)).tolist() == ids


@given(value=int64)
def test_a_decimal_string_is_its_integer(value) -> None:
    assert keys.canonical_id(str(value)) == value
    assert keys.key_of(Namespace.ITEM, str(value)) == keys.key_of(Namespace.ITEM, value)
    assert keys.partition_key(value) == keys.partition_key(str(value)) == str(value).encode()


@pytest.mark.parametrize("text", ["007", "-0", "+1", "1.0", " 1", "9223372036854775808", "a", "٣"])
def test_other_strings_stay_strings(text) -> None:
    assert keys.canonical_id(text) == text


@pytest.mark.parametrize("value", ["", 2**63, -(2**63) - 1, "\ud800"])
def test_what_is_no_id_is_refused(value) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        keys.canonical_id(value)


def test_namespaces_do_not_share_keys() -> None:
    assert keys.key_of(Namespace.USER, 1) != keys.key_of(Namespace.ITEM, 1)
    assert keys.key_of(Namespace.USER, "a") != keys.key_of(Namespace.ITEM, "a")


def test_keys_are_what_they_were_in_every_release() -> None:
    """Keys are stored in checkpoints: a change of the function would lose every embedding."""
    assert keys.key_of(Namespace.ITEM, 12) == -1116705624757328809
    assert keys.key_of(Namespace.ITEM, "a") == 495176881085528829


@given(one=names, other=names, ids=st.lists(st.integers(-(2**38), 2**38 - 1), min_size=2, max_size=2))
def test_a_column_has_keys_of_its_own_by_its_name_alone(one, other, ids) -> None:
    spaces = [*Namespace, *{keys.feature_namespace(name) for name in (one, other)}]
    held = {(space, value): keys.key_of(space, value) for space in spaces for value in ids}
    assert len(set(held.values())) == len(held)
    assert keys.feature_namespace(one) >= Namespace.FEATURE


def test_namespaces_of_columns_are_fixed_for_good() -> None:
    """What a checkpoint has learned of a feature is found by these."""
    assert keys.feature_namespace("context.device") == 3_709_059
