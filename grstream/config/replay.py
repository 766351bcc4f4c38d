"""How a data set, or the synthetic stream, becomes action events."""

from typing import Literal, Self

import pydantic

from grstream.config.section import Name, Section


class ActionRule(Section):
    """Which rows of a data set carry an action: all of them, or those whose column holds what is said."""

    action: Name = pydantic.Field(description="one of events.actions")
    column: str | None = pydantic.Field(None, description="default: every row carries the action")
    at_least: float | None = pydantic.Field(None, description="the cell as a number is this or more")
    equals: str | None = pydantic.Field(None, description="the cell as text")

    @pydantic.model_validator(mode="after")
    def _one_condition(self) -> Self:
        conditions = (self.at_least is not None) + (self.equals is not None)
        if conditions != (self.column is not None):
            raise ValueError("a rule has a column and one of at_least and equals, or none of the three")
        return self


class ColumnsConfig(Section):
    """Which columns of a data set say who acted upon what, and when."""

    user: str = pydantic.Field(description="the column of user ids")
    item: str = pydantic.Field(description="the column of item ids")
    time: str = pydantic.Field(description="the column of the events' times, in time_unit")
    time_unit: Literal["s", "ms", "iso"] = pydantic.Field("s", description="iso: ISO 8601, UTC if unsaid")
    event_id: str | None = pydantic.Field(None, description="default: file and row, by replay.event_ids")


class RecordColumnsConfig(Section):
    """What a Parquet backfill knows of the records that its events were, or would have been, in the topic."""

    record_time: str | None = pydantic.Field(
        None, description="when the log took it, in ms or a timestamp; default: the event's time"
    )
    partition: str | None = pydantic.Field(None, description="of a dump of the topic itself, with `offset`")
    offset: str | None = pydantic.Field(None, description="of a dump of the topic itself, with `partition`")
    value: str | None = pydantic.Field(
        None, description="of such a dump: the record's bytes, instead of all other columns"
    )
    key: str | None = pydantic.Field(
        None, description="of such a dump: the record's key, by which a tombstone names its user"
    )

    @pydantic.model_validator(mode="after")
    def _a_dump_has_both(self) -> Self:
        if (self.partition is None) != (self.offset is None):
            raise ValueError("partition and offset are given together, or neither")
        if (self.value is not None or self.key is not None) and self.offset is None:
            raise ValueError("value and key belong to a dump of the topic: they need partition and offset")
        return self


class SyntheticConfig(Section):
    """A world of users whose interests drift over clusters of items, to which new items come."""

    users: int = pydantic.Field(500, ge=1, description="Zipf-active")
    items: int = pydantic.Field(2_000, ge=1, description="at the start; Zipf-popular within their cluster")
    clusters: int = pydantic.Field(12, ge=2, description="of items; a user's interest is in some of them")
    drift: float = pydantic.Field(0.005, ge=0, le=1, description="chance per event that an interest changes")
    births: float = pydantic.Field(0.01, ge=0, description="new items per event")
    events_per_s: float = pydantic.Field(100, gt=0, description="of the world's own time")
    category: Name | None = pydantic.Field(None, description="the item feature that tells an item's cluster")
    seed: int = pydantic.Field(0, description="of the world: the same one is the same stream")


class ReplayConfig(Section):
    """How a data set, or the synthetic stream, becomes action events."""

    format: (
        Literal["ml-100k", "ml-1m", "ml-1m-tail", "ml-1m-sequences", "deskdrop", "csv", "parquet"] | None
    ) = pydantic.Field(None, description="default: told by the file's name")
    columns: ColumnsConfig | None = pydantic.Field(None, description="required for csv and parquet")
    records: RecordColumnsConfig = pydantic.Field(
        RecordColumnsConfig(), description="of jobs/backfill.py; a replay sends records of its own"
    )
    actions: list[ActionRule] = pydantic.Field(
        [], description="which rows carry which actions, by the columns of the data set"
    )
    context: dict[Name, str] = pydantic.Field({}, description="feature name: column")
    item_features: dict[Name, str] = pydantic.Field({}, description="feature name: column")
    event_ids: bool = pydantic.Field(True, description="an id per row: what is sent again is a duplicate")
    synthetic: SyntheticConfig = pydantic.Field(
        SyntheticConfig(), description="the synthetic stream, where that is replayed"
    )
