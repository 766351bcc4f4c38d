import logging
import time

import pytest

from grstream.config import ModelConfig
from grstream.scores import UnusableWeights
from grstream.weights import Beside, Manifest, Recipe, WeightsVersion
from serve.follower import WeightsFollower

RECIPE = Recipe(model=ModelConfig(), actions=["click"], features=[], vocabulary_seed=0)


def version(number: int) -> WeightsVersion:
    manifest = Manifest(
        number=number, step=0, created_ms=0, positions={}, newest_event_ms=0, recipe=RECIPE, files={}
    )
    return WeightsVersion(manifest, weights=None)  # type: ignore[arg-type]


class Source:
    """A WeightSource in memory whose storage can be away."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)
        self.rejected: list[int] = []
        self.away = False
        self.some: Beside | None = None

    def beside(self) -> Beside | None:
        return self.some

    def load(self, number: int) -> WeightsVersion:
        return version(number)

    def instead_of(self, number: int) -> WeightsVersion | None:
        if self.away:
            raise OSError("stale file handle")
        good = [n for n in self.numbers if n > number and n not in self.rejected]
        return version(max(good)) if good else None

    def reject(self, number: int) -> None:
        self.rejected.append(number)

    def wait(self, timeout_s: float) -> None:
        time.sleep(timeout_s)


class Engine:
    def __init__(self, *unusable: int) -> None:
        self.unusable = unusable
        self.manifest: Manifest | None = None
        self.beside: tuple[int, float] | None = None
        self.told: list[int | None] = []

    def serve_beside(self, held: WeightsVersion | None, share: float = 0.0) -> None:
        self.told.append(None if held is None else held.number)
        if held is not None and held.number in self.unusable:
            raise UnusableWeights(f"version {held.number} is not finite")
        self.beside = None if held is None else (held.number, share)

    def swap(self, held: WeightsVersion) -> None:
        if held.number in self.unusable:
            raise UnusableWeights(f"version {held.number} is not finite")
        self.manifest = held.manifest


def serving(engine: Engine) -> int | None:
    return engine.manifest.number if engine.manifest else None


def test_an_engine_is_given_the_newest_version_and_each_once() -> None:
    source, engine = Source(1, 2, 5), Engine()
    follower = WeightsFollower(source, engine, poll_s=1)
    assert not follower.poll()
    assert serving(engine) == 5
    engine.swap = None  # type: ignore[assignment, method-assign]
    assert not follower.poll()


def test_an_unusable_version_is_rejected_loudly_and_the_next_older_one_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, engine = Source(1, 2, 3), Engine(3)
    follower = WeightsFollower(source, engine, poll_s=1)
    with caplog.at_level(logging.ERROR):
        assert follower.poll()
    assert "version 3 is not finite; it is not served" in caplog.text
    assert (follower.refused, follower.errors) == (1, 0)
    assert not follower.poll()
    assert serving(engine) == 2
    assert not follower.poll()


def test_storage_that_is_away_for_a_while_is_followed_again_when_it_is_back() -> None:
    source, engine = Source(1), Engine()
    source.away = True
    follower = WeightsFollower(source, engine, poll_s=0.001)
    follower.start()
    time.sleep(0.05)
    assert follower.is_alive()
    assert serving(engine) is None
    assert follower.errors > 0
    source.away = False
    deadline = time.monotonic() + 10
    while serving(engine) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    follower.stop()
    assert not follower.is_alive()


def test_a_version_for_some_users_is_followed_and_one_that_is_no_good_is_tried_once() -> None:
    source, engine = Source(1, 2), Engine(3)
    follower = WeightsFollower(source, engine, poll_s=1)
    source.some = Beside(number=1, share=0.25)
    follower.follow_ab()
    assert engine.told == [], "before the first version there is nothing to be beside of"
    follower.poll()
    for _ in range(2):
        follower.follow_ab()
    assert engine.told == [1]
    assert engine.beside == (1, 0.25)
    source.some = Beside(number=1, share=0.5)
    follower.follow_ab()
    assert engine.beside == (1, 0.5)
    source.some = Beside(number=3, share=0.5)
    for _ in range(2):
        follower.follow_ab()
    assert engine.told == [1, 1, 3]
    source.some = None
    for _ in range(2):
        follower.follow_ab()
    assert engine.told == [1, 1, 3, None]
    assert engine.beside is None
