"""What an API is to the broker: its codecs (kafka-python's), the versions answered, and who answers."""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

from grstream.broker.groups import Caller

# Requests and responses are generated from Kafka's own schemas by kafka.protocol and have no static types.
Message = Any
Handler = Callable[[Message, Caller], Awaitable[Message]]


@dataclasses.dataclass(frozen=True)
class Served:
    """One API. All versions answered here precede Kafka's "flexible" encoding, but for ApiVersions 3."""

    request: type
    oldest: int
    newest: int
    handler: Handler
    claimed_oldest: int | None = None  # what ApiVersions says, where a client needs to hear of older ones

    @property
    def key(self) -> int:
        key: int = self.request.API_KEY  # type: ignore[attr-defined]
        return key
