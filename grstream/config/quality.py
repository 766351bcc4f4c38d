"""Which figures of quality are kept."""

from typing import Annotated, Self

import pydantic

from grstream.config.section import Section


class QualityConfig(Section):
    """How well events are predicted, over sliding windows of event time and by what is known of the user."""

    windows_h: list[Annotated[float, pydantic.Field(gt=0, le=24 * 366)]] = pydantic.Field(
        [1, 24], min_length=1, max_length=8, description="hours that each sliding window is long"
    )
    hit_at: list[Annotated[int, pydantic.Field(ge=1)]] = pydantic.Field(
        [1, 10, 50], max_length=8, description="the k of hit rates: is the item among the k first retrieved"
    )
    history: list[Annotated[int, pydantic.Field(ge=1)]] = pydantic.Field(
        [1, 10, 100],
        max_length=8,
        description="where events are told apart by how many stood before them in the history that they were "
        "predicted from: below the first bound, from there to the next, and so on",
    )
    every_s: float = pydantic.Field(
        30, gt=0, description="seconds between entries of the log of quality; more often while catching up"
    )
    keep_days: float = pydantic.Field(90, gt=0, description="days that the log of quality reaches back")

    @pydantic.model_validator(mode="after")
    def _ascending(self) -> Self:
        for field in ("windows_h", "hit_at", "history"):
            values = getattr(self, field)
            if sorted(set(values)) != values:
                raise ValueError(f"{field} must be ascending, each value once")
        return self
