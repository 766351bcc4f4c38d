"""What is remembered of each user."""

from typing import Self

import pydantic

from grstream.config.section import Section


class HistoriesConfig(Section):
    """What is remembered of each user, per partition of the topic (law 3: the same in every reader)."""

    window: int = pydantic.Field(256, ge=0, description="newest events kept per user")
    chunk: int = pydantic.Field(32, ge=1, description="oldest events dropped at once when the window is full")
    lateness_ms: int = pydantic.Field(600_000, ge=0, description="a late event within this is placed by time")
    duplicate_window: int = pydantic.Field(100_000, ge=0, description="offsets within which an id is unique")
    max_users: int = pydantic.Field(1_000_000, ge=1, description="users kept per partition")
    max_events: int = pydantic.Field(32_000_000, ge=1, description="events kept per partition")

    @pydantic.model_validator(mode="after")
    def _chunk_fits(self) -> Self:
        if self.window and self.chunk > self.window:
            raise ValueError("chunk must not be larger than window")
        return self
