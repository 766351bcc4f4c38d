"""`Source`: what the demo streams, under which configuration, and how a scene is made of it."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import yaml

from grstream import config as configuration
from grstream.config import Config, ConfigError
from grstream.datasets import load as load_dataset
from grstream.synthetic import CLICK
from jobs.client import Client
from jobs.demo import scene
from jobs.stack import ROOT

RECENT_EVENTS = 2000  # the curve of entropy is over so many: of 20,000 a minute would show little
DATASET_EVENTS_PER_S = 300  # a data set of 100,000 events lasts five minutes
CONFIGS = ROOT / "configs"
DESKDROP = (
    "users_interactions.csv"  # any other file is taken for MovieLens's unless a configuration says more
)


@dataclasses.dataclass(frozen=True)
class Source:
    settings: dict[str, Any]  # the configuration, as loaded from YAML
    title: str
    pace: str
    stream: list[str]  # arguments of jobs/replay.py
    action: str  # whose prediction is looked at
    scene: Callable[[Config, Client], scene.Scene]  # may raise NoScene for a while


def of_synthetic(path: pathlib.Path | None) -> Source:
    """The built-in world, at its own speed. Raises ConfigError."""
    settings, config = _load(path or CONFIGS / "demo.yaml")
    world = config.replay.synthetic
    if not world.category:
        raise ConfigError("replay.synthetic.category must be set: a scene is made of the items' categories")
    pace = f"{world.events_per_s:g} events/s"
    return Source(
        settings,
        f"{world.users:,} users, {world.items:,} items and new ones, drifting interests",
        pace,
        ["--data", "synthetic", "--speed", f"{world.events_per_s:g}"],
        CLICK,
        scene.synthetic,
    )


def of_file(data: pathlib.Path, path: pathlib.Path | None) -> Source:
    """A data set. Raises ConfigError and DatasetError."""
    known = CONFIGS / ("deskdrop.yaml" if data.name == DESKDROP else "ml-100k.yaml")
    settings, config = _load(path or known)
    dataset = load_dataset(data, config)
    settings["train"] = {
        "recent_events": RECENT_EVENTS,
        "publish_every_s": 3,
        **settings.get("train", {}),
    }
    return Source(
        settings,
        f"{dataset.name}, {len(dataset):,} events",
        f"{DATASET_EVENTS_PER_S} events/s",
        ["--data", str(data.absolute()), "--speed", str(DATASET_EVENTS_PER_S)],
        next((rule.action for rule in config.replay.actions if rule.column), config.events.actions[0]),
        lambda _, client: scene.of_dataset(client, dataset),
    )


def _load(path: pathlib.Path) -> tuple[dict[str, Any], Config]:
    config = configuration.load(path)
    return yaml.safe_load(path.read_text()), config
