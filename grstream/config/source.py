"""How the log becomes micro-batches."""

from typing import Annotated, Literal

import pydantic

from grstream.config.section import Name, Section


class SourceConfig(Section):
    """How the log becomes micro-batches."""

    readers: int = pydantic.Field(1, ge=1, description="read tasks; partitions are dealt out among them")
    reader_cpus: float = pydantic.Field(0.5, gt=0, description="logical CPUs each read task asks Ray for")
    reader_resources: dict[Name, Annotated[float, pydantic.Field(gt=0)]] = pydantic.Field(
        {},
        description="resources of the cluster's own that each read task asks Ray for beside them, by name: "
        "it runs on a node that has them",
    )
    flush_events: int = pydantic.Field(256, ge=1, description="new events that make a micro-batch")
    flush_ms: int = pydantic.Field(500, ge=1, description="and the longest a new event waits for one")
    ahead_bytes: int = pydantic.Field(64 << 20, ge=1 << 20, description="micro-batches readers may be ahead")
    recycle_s: float = pydantic.Field(900, gt=0, description="seconds until a Ray Data execution is renewed")
    on_gap: Literal["fail", "skip"] = pydantic.Field(
        "fail",
        description="where the log lost offsets before they were read: end with their number, or record them "
        "as lost and read on",
    )
