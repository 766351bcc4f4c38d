"""Data sets become events in time order, by the configuration's rules, and nothing is left out unsaid."""

import collections
import itertools
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from grstream.config import Config, ConfigError, SyntheticConfig, load_run, parse
from grstream.config import load as load_config
from grstream.datasets import SYNTHETIC_EPOCH_MS, DatasetError, load
from grstream.events import EventSchema
from grstream.synthetic import INTERESTS, SyntheticStream

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
COLUMNS = {"user": "who", "item": "what", "time": "when"}


def config(replay: dict[str, Any], **events: Any) -> Config:
    events = {"actions": ["seen", "liked"]} | events
    return parse({"storage": "var", "events": events, "replay": replay})


def test_rows_of_any_csv_become_events_in_time_order_with_ids_as_they_are_spelt(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "when,who,what,stars,note,place\n"
        '30,-7,007,4.5,"a, ""b"",\nc",PT\n'
        "10,9223372036854775807,x,3,,\n"
        "30,1,y,,,BR\n"
        "10.5,ana,z,5,,\n"
    )
    replay = {
        "columns": COLUMNS,
        "actions": [{"action": "seen"}, {"action": "liked", "column": "stars", "at_least": 4}],
        "context": {"country": "place"},
    }
    events = list(load(path, config(replay, context=["country"])).events())
    assert [(e.user_id, e.item_id, e.timestamp_ms, e.actions, e.event_id) for e in events] == [
        (2**63 - 1, "x", 10_000, ["seen"], "log.csv:1"),
        ("ana", "z", 10_500, ["seen", "liked"], "log.csv:3"),
        (-7, "007", 30_000, ["seen", "liked"], "log.csv:0"),
        (1, "y", 30_000, ["seen"], "log.csv:2"),
    ]
    assert [e.context for e in events] == [{}, {}, {"country": "PT"}, {"country": "BR"}]
    without_ids = config(replay | {"event_ids": False}, context=["country"])
    assert {e.event_id for e in load(path, without_ids).events()} == {None}


@pytest.mark.parametrize(
    ("unit", "cells", "expected"),
    [
        ("s", ["1", "-1", "", "x", "1.0015"], [1000, 1002]),
        ("ms", ["1", "-1", "", "x", "9007199254740"], [1, 9007199254740]),
        ("iso", ["1970-01-01T00:00:01Z", "1969-01-01", "", "x", "1970-01-01 02:00:00+02:00"], [0, 1000]),
    ],
)
def test_a_row_without_a_usable_time_is_counted(
    tmp_path: pathlib.Path, unit: str, cells: list[str], expected: list[int]
) -> None:
    path = tmp_path / "log.csv"
    path.write_text("who,what,when\n" + "".join(f"1,2,{cell}\n" for cell in cells))
    dataset = load(path, config({"columns": COLUMNS | {"time_unit": unit}}))
    assert [e.timestamp_ms for e in dataset.events()] == expected
    assert dataset.skipped == {"no time that can be read": 2, "a time before 1970": 1}


def test_a_row_without_user_or_item_is_counted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("who,what,when\n,2,1\n1,,1\n1,2,1\n,,1\n")
    dataset = load(path, config({"columns": COLUMNS}))
    assert len(dataset) == len(list(dataset.events())) == 1
    assert dataset.skipped == {"no user": 2, "no item": 1}


def test_parquet_columns_keep_their_types(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.parquet"
    table = {
        "who": pa.array(["a", None, "b"]).dictionary_encode(),
        "what": pa.array([2, 2, -(2**63)]),
        "when": pa.array([2_000_000, 1, 1_000_000], pa.timestamp("us")),
        "kind": pa.array([1, 1, 2]),
    }
    pa.parquet.write_table(pa.table(table), path)
    replay = {"columns": COLUMNS, "actions": [{"action": "liked", "column": "kind", "equals": "2"}]}
    events = list(load(path, config(replay)).events())
    assert [(e.user_id, e.item_id, e.timestamp_ms, e.actions) for e in events] == [
        ("b", -(2**63), 1000, ["liked"]),
        ("a", 2, 2000, []),
    ]


def test_a_file_that_is_not_as_described_is_named_with_what_to_change(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("who,what,when,stars\n1,2,3,many\n")
    stars = [{"action": "liked", "column": "stars", "at_least": 4}]
    for replay, said in [
        ({}, "log.csv: a csv file needs replay.columns"),
        (
            {"columns": COLUMNS | {"user": "usr"}},
            "log.csv has no column usr, .* it has who, what, when, stars",
        ),
        (
            {"columns": COLUMNS, "actions": stars},
            "column stars, which action liked compares with 4.0, is not",
        ),
        ({"columns": COLUMNS, "format": "parquet"}, "cannot read .*log.csv as parquet"),
    ]:
        with pytest.raises(DatasetError, match=said):
            load(path, config(replay))
    with pytest.raises(DatasetError, match=r"log\.bin tells no format; say replay\.format, one of ml-100k"):
        load(tmp_path / "log.bin", config({}))
    with pytest.raises(DatasetError, match=r"cannot read .*u.data as ml-100k.*No such file"):
        load(tmp_path / "u.data", config({}))
    (tmp_path / "torn.csv").write_text("who,what,when\n1,2\n")
    with pytest.raises(DatasetError, match=r"cannot read .*torn.csv as csv"):
        load(tmp_path / "torn.csv", config({"columns": COLUMNS}))


def test_a_rule_says_one_thing_of_a_configured_action() -> None:
    for rule, said in [
        ({"action": "bought"}, "replay.actions names bought, which events.actions does not"),
        ({"action": "liked", "column": "stars"}, "one of at_least and equals"),
        ({"action": "liked", "at_least": 1}, "one of at_least and equals"),
    ]:
        with pytest.raises(ConfigError, match=said):
            config({"actions": [rule]})


def test_movielens_ratings_are_told_by_their_names(tmp_path: pathlib.Path) -> None:
    rules = [{"action": "seen"}, {"action": "liked", "column": "rating", "at_least": 4}]
    for name, text in [
        ("u.data", "1\t20\t3\t881250949\n2\t30\t4\t881250948\n"),
        ("ratings.dat", "1::20::3::881250949\n2::30::4::881250948\n"),
        ("tail20_dev.tsv", "user_id\titem_id\trating\ttime\n1\t20\t3\t881250949\n2\t30\t4\t881250948\n"),
    ]:
        (tmp_path / name).write_text(text)
        events = list(load(tmp_path / name, config({"actions": rules})).events())
        assert [(e.user_id, e.item_id, e.timestamp_ms, e.actions) for e in events] == [
            (2, 30, 881250948000, ["seen", "liked"]),
            (1, 20, 881250949000, ["seen"]),
        ]


def test_sequences_get_increasing_times_that_keep_each_users_order(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "sequences.parquet"
    pa.parquet.write_table(pa.table({"item_ids": [[5, 4, 3, 2], [], [9]]}), path)
    events = list(load(path, config({"actions": [{"action": "seen"}]})).events())
    assert [(e.user_id, e.item_id) for e in events] == [(1, 5), (1, 4), (3, 9), (1, 3), (1, 2)]
    assert [e.timestamp_ms for e in events] == [SYNTHETIC_EPOCH_MS + 1000 * i for i in range(5)]


def test_ml_100k_whole(assets: pathlib.Path) -> None:
    settings = load_config(CONFIGS / "ml-100k.yaml")
    dataset = load(assets / "data" / "ml-100k" / "u.data", settings)
    events = list(dataset.events())
    assert dataset.skipped == {}
    assert collections.Counter(map(tuple, (e.actions for e in events))) == {
        ("rated", "liked"): 55_375,
        ("rated",): 44_625,
    }
    assert len({e.user_id for e in events}) == 943
    assert len({e.event_id for e in events}) == 100_000
    assert all(a.timestamp_ms <= b.timestamp_ms for a, b in itertools.pairwise(events))


def test_ml_1m_whole(assets: pathlib.Path) -> None:
    data = assets / "data" / "ml-1m"
    settings = config({"actions": [{"action": "seen"}]})
    assert len(load(data / "sequences_rawids_stable.parquet", settings)) == 1_000_209
    assert sum(len(load(data / f"tail20_{part}.tsv", settings)) for part in ("dev", "test")) == 202_451


def test_deskdrop_whole(assets: pathlib.Path) -> None:
    settings = load_config(CONFIGS / "deskdrop.yaml")
    dataset = load(assets / "data" / "deskdrop" / "users_interactions.csv", settings)
    events = list(dataset.events())
    assert dataset.skipped == {}
    assert collections.Counter(a for e in events for a in e.actions) == {
        "VIEW": 61_086,
        "LIKE": 5_745,
        "BOOKMARK": 2_463,
        "COMMENT_CREATED": 1_611,
        "FOLLOW": 1_407,
    }
    assert all(len(e.actions) == 1 for e in events)
    assert len({e.user_id for e in events}) == 1_895
    assert len({e.item_id for e in events}) == 2_987
    assert min(e.item_id for e in events if isinstance(e.item_id, int)) < -(2**62)
    schema = EventSchema(settings.events)
    assert all(schema.validate(e.to_json()) == e for e in events[::1000])


OURS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "serve.yaml")  # which is Serve's own
RUNS = [path for path in OURS if "\nepochs:" in path.read_text()]  # of epochs, not on a stream


@pytest.mark.parametrize("path", sorted(set(OURS) - set(RUNS)), ids=lambda path: path.stem)
def test_every_configuration_of_the_project_is_valid(path: pathlib.Path) -> None:
    assert load_config(path).storage.name == path.stem


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_configuration_of_a_run_of_epochs_is_valid(path: pathlib.Path) -> None:
    assert load_run(path).model.dim % load_run(path).model.heads == 0


def test_the_synthetic_stream_is_the_same_for_the_same_seed_however_much_is_read() -> None:
    settings = SyntheticConfig(users=20, items=30)
    whole = list(itertools.islice(SyntheticStream(settings, 1000), 2000))
    assert whole[:700] == list(itertools.islice(SyntheticStream(settings, 1000), 700))
    assert whole != list(itertools.islice(SyntheticStream(settings.model_copy(update={"seed": 1})), 2000))
    assert whole[0].timestamp_ms >= 1000
    assert all(a.timestamp_ms <= b.timestamp_ms for a, b in itertools.pairwise(whole))


def test_a_synthetic_event_tells_its_items_cluster_as_the_feature_that_the_config_names() -> None:
    told = SyntheticStream(SyntheticConfig(category="genre"))
    untold = SyntheticStream(SyntheticConfig())
    for event, same in zip(itertools.islice(told, 300), untold, strict=False):
        assert event.item_features == {"genre": told.cluster_of(event.item_id)}
        assert event.model_copy(update={"item_features": {}}) == same
    with pytest.raises(ConfigError, match=r"synthetic\.category names genre"):
        parse({"storage": "s", "events": {"actions": ["a"]}, "replay": {"synthetic": {"category": "genre"}}})


def test_in_the_synthetic_stream_new_items_come_and_recent_clicks_foretell_clicks() -> None:
    settings = SyntheticConfig(users=100, items=200, clusters=10, births=0.02)
    stream = SyntheticStream(settings)
    events = list(itertools.islice(stream, 20_000))
    assert stream.items > 200 + 0.9 * 0.02 * len(events)
    assert {int(e.item_id) for e in events[-2000:]} - {int(e.item_id) for e in events[:-2000]}
    recent: dict[Any, collections.deque[int]] = collections.defaultdict(
        lambda: collections.deque(maxlen=INTERESTS)
    )
    told: dict[bool, list[bool]] = {True: [], False: []}
    for event in events:
        cluster, clicked = stream.cluster_of(int(event.item_id)), "click" in event.actions
        told[cluster in recent[event.user_id]].append(clicked)
        if clicked:
            recent[event.user_id].append(cluster)
    after_a_click, otherwise = (sum(told[known]) / len(told[known]) for known in (True, False))
    assert after_a_click > otherwise + 0.2
    assert all("click" in e.actions for e in events if "like" in e.actions)


def test_a_world_smaller_than_its_clusters_shows_items_that_exist() -> None:
    stream = SyntheticStream(SyntheticConfig(users=1, items=1, clusters=50, births=0))
    assert {e.item_id for e in itertools.islice(stream, 600)} == {0}
