"""A wrong configuration says what is wrong and where."""

import pathlib

import pytest

from grstream.config import ConfigError, load, parse

GOOD = {"storage": "var/x", "events": {"actions": ["click"]}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"trian": {}}, "trian"),
        ({"histories": {"windwo": 5}}, "histories.windwo"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate"),
        ({"model": {"dim": 10, "heads": 4}}, "multiple of heads"),
        ({"histories": {"window": 4, "chunk": 8}}, "chunk must not be larger"),
        ({"events": {"actions": []}}, "events.actions"),
        ({"events": {"actions": ["a", "a"]}}, "twice"),
        ({"events": {"actions": ["no spaces"]}}, "events.actions.0"),
        ({"events": {"actions": [f"a{i}" for i in range(32)]}}, "events.actions"),
        (
            {"events": {"actions": ["a"], "item_features": ["f25", "f490"]}},
            r"item\.f25 and item\.f490 hash alike.*rename one",
        ),
        ({"model": {"layout": "both"}}, "model.layout"),
        ({"model": {"feedforward": 64}}, "feedforward belongs to encoder: transformer"),
        ({"model": {"encoder": "transformer", "attention": "silu"}}, "attends by softmax"),
        ({"train": {"action_weights": {"nap": 1}}}, "action_weights names nap"),
        ({"train": {"stochastic_length": 1.0}}, "train.stochastic_length"),
        ({"storage": None}, "storage"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(change: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse({**GOOD, **change})


def test_a_missing_section_is_named() -> None:
    with pytest.raises(ConfigError, match="events"):
        parse({"storage": "x"})


def test_a_file_that_is_not_there_or_not_yaml_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not YAML"):
        load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"list\.yaml"):
        load(tmp_path / "list.yaml")


def test_storage_becomes_absolute_and_dead_letters_follow_the_topic(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.yaml").write_text("storage: var\nevents: {actions: [click]}\nkafka: {topic: t}\n")
    config = load(tmp_path / "x.yaml")
    assert config.storage.is_absolute()
    assert config.kafka.dead_letters == "t.dead"
