"""`Scene`: one user, the candidates that are ranked, and the actions that are posted in between.

In the synthetic world the user comes to like a category that interested them least. On a data set the user
does what another user of different taste did. Candidates are never among the items that are posted.
"""

import dataclasses
import random
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

from grstream.config import Config
from grstream.datasets import Dataset
from grstream.keys import Id, canonical_id
from grstream.synthetic import CLICK, LIKE
from jobs.client import Client

SHOWN = 10  # candidates
POSTED = 8  # events
HISTORY = range(8, 60)  # events of a user to be shown: enough to have a taste, few enough to change it
TRIES = 60  # users looked at
NEW_ITEM = 10_000_001  # an item that no stream has


class NoScene(LookupError):
    """No user was found to show."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is ranked before and after, and what is posted."""

    user: Id
    candidates: list[dict[str, Any]]  # as /v1/rank takes them
    kinds: dict[Id, str]  # of each candidate, for a person
    favoured: set[Id]  # candidates that the posted actions speak for
    events: list[dict[str, Any]]  # as /v1/actions takes them; one acts upon NEW_ITEM
    at_ms: int  # when the candidates are ranked, before and after
    story: str


def synthetic(config: Config, client: Client) -> Scene:
    """A user of the synthetic world who turns to the category that interested them least."""
    world = config.replay.synthetic
    category = world.category or config.events.item_features[0]

    def shown(item: int) -> dict[str, Any]:
        return {"item_id": item, "item_features": {category: item % world.clusters}}

    users = random.Random(world.seed).sample(range(1, world.users + 1), min(TRIES, world.users))
    user = _with_history(client, users)
    clusters = range(min(SHOWN, world.clusters))
    candidates = [shown(world.clusters + c) for c in clusters]  # the second most popular of each
    now = time.time_ns() // 1_000_000
    answer = client.post("/v1/rank", {"user_id": user, "candidates": candidates, "at_ms": now})
    scores = scores_of(answer, CLICK)
    least = min(scores, key=lambda item: scores[item])
    target = int(least) % world.clusters
    items = [target + world.clusters * k for k in range(2, POSTED + 1)] + [NEW_ITEM]
    events = [
        {
            "user_id": user,
            "item_id": item,
            "actions": [CLICK, LIKE],
            "timestamp_ms": now + i,
            "item_features": {category: target},
        }
        for i, item in enumerate(items)
    ]
    return Scene(
        user=user,
        candidates=candidates,
        kinds={c["item_id"]: f"category {c['item_id'] % world.clusters}" for c in candidates},
        favoured={least},
        events=events,
        at_ms=now + len(events),
        story=f"user {user} clicks and likes {len(events)} other items of category {target}, one of them new",
    )


def of_dataset(client: Client, dataset: Dataset) -> Scene:
    """A user of a data set who does what the user of the most distant taste did."""
    early = dict.fromkeys(map(canonical_id, dataset.users[: len(dataset) // 10 + 1].to_pylist()))
    users = random.Random(0).sample(list(early), min(TRIES, len(early)))
    user = _with_history(client, users)
    own = history_of(client, user)["events"]
    near = _retrieved(client, user)
    other, others = None, near
    for candidate in [u for u in users if u != user][: TRIES // 4]:
        if history_of(client, candidate)["history_length"] >= POSTED:
            found = _retrieved(client, candidate)
            if other is None or len(set(found) & set(near)) < len(set(others) & set(near)):
                other, others = candidate, found
    if other is None:
        raise NoScene(f"no second user with {POSTED} events yet")
    seen = {e["item_id"] for e in own}
    copied = [e for e in history_of(client, other)["events"] if e["item_id"] not in seen][-POSTED + 1 :]
    copied.append({**copied[-1], "item_id": NEW_ITEM})
    barred = seen | {e["item_id"] for e in copied}
    theirs = [i for i in others if i not in barred and i not in near][: SHOWN // 2]
    mine = [i for i in near if i not in barred][: SHOWN - len(theirs)]
    begin = own[-1]["timestamp_ms"] + 1000  # in the time of the data set
    return Scene(
        user=user,
        candidates=[{"item_id": item} for item in mine + theirs],
        kinds={**dict.fromkeys(mine, "to the user's taste"), **dict.fromkeys(theirs, "to the other's taste")},
        favoured=set(theirs),
        events=[
            {"user_id": user, "item_id": e["item_id"], "actions": e["actions"], "timestamp_ms": begin + i}
            for i, e in enumerate(copied)
        ],
        at_ms=begin + len(copied),
        story=f"user {user} does what user {other} did last: {len(copied)} actions, one upon a new item",
    )


def _retrieved(client: Client, user: Id) -> list[Id]:
    body = {"user_id": user, "k": 3 * SHOWN, "exclude_history": True}
    return [row["item_id"] for row in client.post("/v1/retrieve", body)["results"]]


def scores_of(answer: dict[str, Any], action: str) -> dict[Id, float]:
    """Item to the probability of an action, of an answer of /v1/rank."""
    return {row["item_id"]: row["scores"][action] for row in answer["results"]}


def _with_history(client: Client, users: Sequence[Id]) -> Id:
    """The first user whose history is neither too short nor too long."""
    for user in users:
        if history_of(client, user)["history_length"] in HISTORY:
            return user
    raise NoScene(f"none of {len(users)} users has between {HISTORY[0]} and {HISTORY[-1]} events yet")


def history_of(client: Client, user: Id) -> dict[str, Any]:
    answer: dict[str, Any] = client.get(history_path(user))
    return answer


def history_path(user: Id) -> str:
    return f"/v1/users/{urllib.parse.quote(str(user), safe='')}/history"
