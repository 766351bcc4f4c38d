"""When what was saved under some names goes on under others."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from grstream.config import EventsConfig
from grstream.keys import ABSENT
from grstream.schema import Schema, placed

few = st.lists(st.sampled_from("abcd"), unique=True)
FEATURES = [f"{place}.{name}" for place in ("context", "item") for name in "xyz"]
schemas = st.builds(
    Schema,
    actions=few.map(tuple),
    features=st.lists(st.sampled_from(FEATURES), unique=True).map(lambda f: tuple(sorted(f, key=_place))),
)


def _place(feature: str) -> str:
    return feature.split(".")[0]


@given(older=schemas, newer=schemas)
def test_a_schema_has_grown_where_taking_away_what_is_new_gives_the_old_one(
    older: Schema, newer: Schema
) -> None:
    kept = Schema(
        newer.actions[: len(older.actions)], tuple(f for f in newer.features if f in older.features)
    )
    assert (newer.not_grown_from(older) is None) == (kept == older)


@given(older=schemas, newer=schemas)
def test_columns_are_found_by_name(older: Schema, newer: Schema) -> None:
    columns = newer.columns_in(older)
    keys = {name: 1 + number for number, name in enumerate(FEATURES)}
    held = np.array([[keys[name] for name in older.features]] * 2, np.int64).reshape(2, len(older.features))
    expected = [keys[name] if name in older.features else ABSENT for name in newer.features]
    assert placed(held, columns).tolist() == [expected] * 2


def test_the_reason_names_what_is_wrong() -> None:
    older = Schema(("click", "like"), ("context.device", "item.genre"))

    def reason(actions: str, features: str) -> str | None:
        return Schema(tuple(actions.split()), tuple(features.split())).not_grown_from(older)

    features = "context.device item.genre"
    assert reason("click like buy", f"context.app {features} item.size") is None
    assert reason("click buy", features) == "events.actions lacks like"
    assert reason("like click", features) == "events.actions does not begin with click, like"
    assert reason("buy click like", features) == "events.actions does not begin with click, like"
    assert reason("click like", "context.device item.kind") == "events lacks the features item.genre"
    assert reason("click like", "item.genre context.device") == (
        "events does not name the features context.device, item.genre in this order"
    )


def test_a_configuration_of_events_names_one() -> None:
    events = EventsConfig(actions=["click"], context=["device", "app"], item_features=["genre"])
    schema = Schema.of(events)
    assert schema == Schema(("click",), ("context.device", "context.app", "item.genre"))
    assert schema.contexts == 2
    assert str(schema) == "actions click; features context.device, context.app, item.genre"
