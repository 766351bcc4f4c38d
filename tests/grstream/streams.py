"""Streams of actions for tests: a configuration, and records with all that a log may hold."""

import contextlib
import json
import pathlib
import random
import uuid
from typing import Any

from grstream import config as configs
from grstream.kafka import producer
from grstream.keys import partition_key

START_MS = 1_700_000_000_000


def make_config(
    storage: pathlib.Path, bootstrap: str, topic: str | None = None, **sections: Any
) -> configs.Config:
    return configs.parse(
        {
            "storage": str(storage),
            "kafka": {"bootstrap_servers": [bootstrap], "topic": topic or f"actions-{uuid.uuid4().hex[:8]}"},
            "events": {"actions": ["click", "like"]},
            "model": {"layers": 1, "dim": 8, "heads": 1},
            **sections,
        }
    )


class Stream:
    """Sends events of 50 users with poison, tombstones and repeated ids among them.

    With exposures, of 5 users, whose labels come in time or too late.
    """

    def __init__(self, config: configs.Config, exposures: bool = False) -> None:
        self.config = config
        self._exposures = exposures
        self.sent = 0
        self._random = random.Random(0)

    def send(self, count: int) -> None:
        with contextlib.closing(producer(self.config.kafka)) as out:
            for _ in range(count):
                user, value = self.next()
                out.send(self.config.kafka.topic, value, key=partition_key(user))
            out.flush()

    def next(self) -> tuple[int, bytes | None]:
        """Another record's user and value."""
        user = self._random.randrange(5 if self._exposures else 50)
        value = self._value(user)
        self.sent += 1
        return user, value

    def send_liked(self, count: int, likes: bool) -> None:
        """Events that nearly all have an action, or none."""
        with contextlib.closing(producer(self.config.kafka)) as out:
            for i in range(count):
                event = {
                    "user_id": self._random.randrange(50),
                    "item_id": i % 100,
                    "actions": ["like"] if likes and i % 50 else [],
                    "timestamp_ms": START_MS + self.sent,
                }
                out.send(self.config.kafka.topic, json.dumps(event).encode(), key=b"user")
                self.sent += 1
            out.flush()

    def _value(self, user: int) -> bytes | None:
        kind = self._random.random()
        if kind < 0.02:
            return b"poison"
        if kind < 0.04:
            return None
        event = {
            "user_id": user,
            "item_id": self._random.randrange(200),
            "actions": ["click"] if self._random.random() < 0.5 else [],
            "timestamp_ms": START_MS + self.sent,
        }
        if kind < 0.2:
            event["event_id"] = f"{self._random.randrange(100)}"
        if self._exposures:
            event["exposure_id"] = f"{(self.sent - self._random.choice([0, 0, 0, 100])) // 25}"
        return json.dumps(event).encode()
