"""The schema of an action event, and how impressions are joined."""

from typing import Literal, Self

import pydantic

from grstream.config.section import MAX_ACTIONS, Name, Section
from grstream.keys import feature_namespace


class ExposuresConfig(Section):
    """How impressions are joined with the actions that name them."""

    window_ms: int = pydantic.Field(
        600_000, ge=1, description="how long an exposure waits for labels, by the times of the log's events"
    )
    late_labels: Literal["count", "train"] = pydantic.Field(
        "count", description="what becomes of labels after that: counted, or learned from as events, too"
    )
    max_open: int = pydantic.Field(
        1_000_000, ge=1, description="events of a partition that wait for a window; beyond, it is ended early"
    )


class EventsConfig(Section):
    """The schema of an action event."""

    actions: list[Name] = pydantic.Field(
        min_length=1,
        max_length=MAX_ACTIONS,
        description="names of what users do; new ones may be added behind the others later",
    )
    context: list[Name] = pydantic.Field([], description="categorical features of the moment")
    item_features: list[Name] = pydantic.Field([], description="categorical features of the item")
    max_future_ms: int = pydantic.Field(
        300_000, ge=0, description="how far an event's time may lie beyond the record's own time"
    )
    unknown_fields: Literal["reject", "ignore"] = pydantic.Field(
        "reject", description="an event with a field that is not known is a dead letter, or read without it"
    )
    exposures: ExposuresConfig | None = pydantic.Field(
        None, description="default: not joined, and `exposure_id` is an unknown field"
    )

    @pydantic.model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        for field in ("actions", "context", "item_features"):
            names = getattr(self, field)
            if len(set(names)) != len(names):
                raise ValueError(f"{field} lists a name twice")
        return self

    @pydantic.model_validator(mode="after")
    def _features_have_keys_of_their_own(self) -> Self:
        columns: dict[int, str] = {}
        for name in self.features:
            other = columns.setdefault(feature_namespace(name), name)
            if other != name:
                raise ValueError(f"{other} and {name} hash alike and would share keys: rename one of them")
        return self

    @property
    def features(self) -> list[str]:
        """The feature columns of an event, in the order in which they are stored."""
        return [f"context.{name}" for name in self.context] + [f"item.{name}" for name in self.item_features]
