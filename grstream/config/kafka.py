"""Where the log of actions is."""

from typing import Self

import pydantic

from grstream.config.section import Section
from grstream.config.security import KafkaSecurityConfig


class KafkaConfig(Section):
    """Where the log of actions is."""

    bootstrap_servers: list[str] = pydantic.Field(
        ["127.0.0.1:9092"], description="host:port of some brokers; they name the others"
    )
    topic: str = pydantic.Field("actions", description="the log of actions, key = user id")
    dead_letter_topic: str | None = pydantic.Field(None, description="default: <topic>.dead")
    dead_letter_retention_ms: int = pydantic.Field(
        604_800_000, ge=1, description="of that topic, where it is created here: how long a letter stays"
    )
    items_topic: str | None = pydantic.Field(
        None,
        description="compacted topic that announces items and withdraws them, key = item id; default: none, "
        "and items are those that the weights know",
    )
    request_timeout_ms: int = pydantic.Field(10_000, gt=0, description="give up on an unreachable broker")

    security: KafkaSecurityConfig = pydantic.Field(
        KafkaSecurityConfig(), description="encryption and authentication"
    )

    @pydantic.model_validator(mode="after")
    def _topics_differ(self) -> Self:
        if self.topic in (self.dead_letter_topic, self.items_topic):
            raise ValueError("topic is for events alone: dead_letter_topic and items_topic must be others")
        if self.items_topic == self.dead_letters:
            raise ValueError("items_topic must not be dead_letter_topic: letters are no items")
        return self

    @property
    def dead_letters(self) -> str:
        return self.dead_letter_topic or f"{self.topic}.dead"
