"""A backend without Ray, which scores an item by its id, and what gateways over it are configured with."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from grstream.api import Appended, ReadyAnswer
from grstream.config import ModelConfig, parse
from grstream.events import ActionEvent
from grstream.histories import History
from grstream.keys import ABSENT, Id, Keys, Namespace, ints_of_keys, key_of
from grstream.scores import Ask, Encoded, Rank, Ranked, Recommend, Recommended, Retrieve, Retrieved, Reuse
from grstream.weights import Manifest, Recipe
from serve.gateway import UserHistory

A = TypeVar("A", bound=Ask)

CONFIG = parse(
    {
        "storage": "unused",
        "events": {
            "actions": ["click", "like"],
            "context": ["place"],
            "item_features": ["genre"],
            "max_future_ms": 1000,
        },
        "serve": {"max_candidates": 100, "max_events": 5, "max_k": 50, "request_timeout_ms": 200},
    }
)


def history(events: Sequence[tuple[Id, int, int]] = ()) -> History:
    return History(
        items=np.array([key_of(Namespace.ITEM, e[0]) for e in events], np.int64),
        actions=np.array([e[1] for e in events], np.int32),
        times=np.array([e[2] for e in events], np.int64),
        features=np.full((len(events), 2), ABSENT, np.int64),
        epoch=0,
        appended=len(events),
        item_names={key_of(Namespace.ITEM, e[0]): e[0] for e in events if isinstance(e[0], str)},
    )


class FakeBackend:
    """Scores a candidate by its id; keeps what it was asked."""

    def __init__(self) -> None:
        self.histories: dict[Id, History] = {"eve": history([(5, 1, 10), ("a/b", 2, 20), (-3, 3, 30)])}
        self.sent: list[ActionEvent] = []
        self.forgotten: list[Id] = []
        self.features: Keys | None = None
        self.at_ms = -1
        self.brought: bool | None = None
        self.user: int | None = None
        self.weights: tuple[tuple[str, float], ...] = ()
        self.exclude: Keys | None = None
        self.context: Keys | None = None
        self.allow: Keys | None = None
        self.min_offset: int | None = None
        self.stale = False
        self.asked: list[History] = []  # what scores were asked for
        self.actions: tuple[str, ...] = ("click", "like")
        self.broken: Callable[[], Any] | None = None

    async def partition(self, user: Id) -> int:
        return 3

    async def history(self, user: Id, min_offset: int | None) -> UserHistory:
        if self.broken:
            await self.broken()
        self.min_offset = min_offset
        return UserHistory(self.histories.get(user, history()), 3, 77, self.stale)

    async def rank(self, user: Id, ask: Rank) -> Ranked:
        items = self._asked(ask).items
        self.features = ask.features
        ids = ints_of_keys(Namespace.ITEM, items)
        columns = [ids / 1000, 1 - ids / 1000, ids * 0 + 0.25][: len(self.actions)]
        scores = np.stack(columns, axis=1).astype(np.float32)
        encoded = Encoded(tokens=3, cached=1, waited_ms=0.5, took_ms=2.0)
        return Ranked(scores, ids < 10, 4, Reuse.MISS, self.actions, encoded)

    def _asked(self, ask: A) -> A:
        self.asked.append(ask.history)
        self.at_ms, self.brought, self.user = ask.at_ms, ask.brought, ask.user
        return ask

    async def retrieve(self, user: Id, ask: Retrieve) -> Retrieved:
        self._asked(ask)
        self.exclude, self.context, self.allow, k = ask.exclude, ask.context, ask.allow, ask.k
        items = np.array([key_of(Namespace.ITEM, i) for i in ("a/b", 2**60)][:k])
        names = {key_of(Namespace.ITEM, "a/b"): "a/b"}
        return Retrieved(items, names, np.array([2.0, 1.0], np.float32)[:k], version=4, reuse=Reuse.HIT)

    async def recommend(self, user: Id, ask: Recommend) -> Recommended:
        found, self.weights, k = await self.retrieve(user, ask), ask.weights, ask.k
        probabilities = np.array([[0.5, 0.75], [0.25, 0.125]], np.float32)[:k]
        return Recommended(
            found.items,
            found.names,
            probabilities,
            probabilities.sum(axis=1),
            actions=("click", "like"),
            version=4,
            reuse=Reuse.EXTEND,
        )

    async def append(self, events: Sequence[ActionEvent]) -> list[Appended]:
        if self.broken:
            await self.broken()
        self.sent += events
        return [Appended(partition=1, offset=i) for i in range(len(events))]

    async def forget(self, user: Id) -> Appended:
        if self.broken:
            await self.broken()
        self.forgotten.append(user)
        return Appended(partition=2, offset=9)

    async def manifest(self) -> Manifest:
        if self.broken:
            await self.broken()
        recipe = Recipe(model=ModelConfig(), actions=["click", "like"], features=[], vocabulary_seed=0)
        return Manifest(
            number=4,
            step=9,
            created_ms=time.time_ns() // 1_000_000 - 5000,
            positions={0: [(0, 10)], 1: [(0, 3), (5, 6)]},
            newest_event_ms=123,
            recipe=recipe,
            files={},
        )

    async def readiness(self) -> ReadyAnswer:
        if self.broken:
            return ReadyAnswer(
                ready=False, reason="no weights version is loaded yet", version=None, shards=[]
            )
        return ReadyAnswer(ready=True, version=4, shards=[])
