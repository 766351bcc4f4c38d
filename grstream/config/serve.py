"""The serving application."""

import pathlib
from typing import Annotated, Literal

import pydantic

from grstream.config.section import Name, Section


class ServeConfig(Section):
    """The serving application."""

    host: str = pydantic.Field(
        "127.0.0.1", description="address listened on; without API keys it must be a loopback one"
    )
    port: int = pydantic.Field(8000, ge=1, le=65535, description="of HTTP")
    replicas: int = pydantic.Field(1, ge=1, description="scorer replicas")
    gpu: bool = pydantic.Field(False, description="each scorer replica has a GPU of its own")
    gateways: int = pydantic.Field(2, ge=1, description="gateway replicas: one may die and service goes on")
    history_shards: int = pydantic.Field(1, ge=1, description="partitions are dealt out among them")
    when_histories_are_away: Literal["wait", "cached"] = pydantic.Field(
        "wait",
        description="while a history shard is away or catching up: refuse with a 503 until it is back, or "
        "answer from the last history that the gateway saw of the user, which says that it is stale",
    )
    histories_away_after_ms: int = pydantic.Field(
        200, ge=1, description="with cached: a shard that takes longer is away; waiting for an offset aside"
    )
    cached_histories: int = pydantic.Field(
        10_000, ge=1, description="with cached: users whose last history a gateway replica keeps"
    )
    cached_histories_bytes: int = pydantic.Field(
        64 << 20, ge=0, description="with cached: and what these may take up"
    )
    max_candidates: int = pydantic.Field(10_000, ge=1, description="per rank request")
    max_events: int = pydantic.Field(1_000, ge=1, description="per actions request")
    max_k: int = pydantic.Field(1_000, ge=1, description="items a retrieve request may ask for")
    micro_batch: int | None = pydantic.Field(
        None,
        ge=1,
        description="candidates of a request scored in one step, the paper's b_m; default: as measured",
    )
    step_ms: float = pydantic.Field(
        10,
        gt=0,
        description="how long a step of the engine may encode, and score, before others have their turn",
    )
    index: Literal["exact", "faiss"] = pydantic.Field(
        "exact",
        description="how items are retrieved; faiss: approximately (the extra `ann`), for many millions",
    )
    cache_bytes: int = pydantic.Field(1 << 30, ge=0, description="keys and values kept per scorer replica")
    page_tokens: int = pydantic.Field(32, ge=16, description="tokens of a page of the cache: a power of two")
    page_dtype: Literal["float32", "bfloat16", "int8"] = pydantic.Field(
        "float32", description="of cached keys and values: smaller ones take less room, and round"
    )
    versions: int = pydantic.Field(
        2,
        ge=1,
        description="weights versions held at once: the newest, and older ones that users are still at",
    )
    max_version_age_s: float = pydantic.Field(
        10,
        ge=0,
        description="how long a user whose history is cached may be served by a version that was followed",
    )
    poll_weights_s: float = pydantic.Field(
        0.5, gt=0, description="between looks at whether other weights are to be served"
    )
    queue: int = pydantic.Field(256, ge=1, description="requests a replica holds before it answers 503")
    request_timeout_ms: int = pydantic.Field(5_000, ge=1, description="beyond it a request gets a 503")
    read_your_writes_ms: int = pydantic.Field(
        1_000,
        ge=0,
        description="how long a request that names an offset or a token waits for it to be read before it "
        "gets a 409; request_timeout_ms ends it sooner",
    )
    recommend_weights: dict[Name, Annotated[float, pydantic.Field(allow_inf_nan=False)]] = pydantic.Field(
        {},
        description="recommendations are ordered by the sum of weight · probability over all actions; "
        "1 where not given",
    )
    max_history: int = pydantic.Field(2_000, ge=1, description="events of a history that a request brings")
    max_batch: int = pydantic.Field(64, ge=1, description="requests of a batch")
    max_body_bytes: int = pydantic.Field(2 << 20, ge=1, description="of a request; beyond, it gets a 413")
    body_timeout_ms: int = pydantic.Field(
        10_000, ge=1, description="for a request's body to arrive; beyond, it gets a 408"
    )
    api_keys_file: pathlib.Path | None = pydantic.Field(
        None,
        description="YAML, name: key of 16 characters or more; read once, where the application is built. "
        "The environment's GRSTREAM_API_KEYS (name=key,name=key) takes its place. Default: whoever reaches "
        "the port is answered, which must then be on a loopback address",
    )
    max_in_flight_per_key: int = pydantic.Field(
        256, ge=1, description="requests of one API key in a gateway replica; beyond, a 429"
    )
    exposure_topic: str | None = pydantic.Field(
        None,
        description="a topic to which every listed item goes as an impression, with version, score and rank; "
        "it may be kafka.topic, where all that is listed is shown. Default: not logged",
    )

    def weight(self, action: str) -> float:
        """Of an action's probability in the order of recommendations."""
        return self.recommend_weights.get(action, 1.0)
