"""What the HTTP API answers: the models that the server makes and `grstream.client` reads.

Ids are integers or strings in their canonical form; with `ids_as_strings` all of an answer are strings.
"""

import base64
import binascii
import struct
from typing import Annotated, Generic, Literal, TypeVar

import pydantic

from grstream.keys import Id
from grstream.scores import Reuse

T = TypeVar("T")

_STALE = "the history's shard is away, and it is the last one seen: events from `position` on may be missing"

Range = Annotated[list[int], pydantic.Field(min_length=2, max_length=2)]

_PLACE = struct.Struct(">iq")  # partition, offset: 12 bytes, which base64 spells without padding


class _Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


def token_of(partition: int, offset: int) -> str:
    """A place in the log as an opaque string."""
    return base64.urlsafe_b64encode(_PLACE.pack(partition, offset)).decode()


def place_of(token: str) -> tuple[int, int]:
    """Partition and offset of a token. Raises ValueError for a string that is none."""
    try:
        partition, offset = _PLACE.unpack(base64.b64decode(token, altchars=b"-_", validate=True))
    except (binascii.Error, struct.error, ValueError) as error:
        raise ValueError("it is no token that an answer to /v1/actions gave") from error
    if partition < 0 or offset < 0:
        raise ValueError("it is no token that an answer to /v1/actions gave")
    return partition, offset


class Position(_Answer):
    """How far the history shard that answered has read the user's partition."""

    partition: int
    offset: int = pydantic.Field(description="the next offset it will read: all before it are in the history")


class Scored(_Answer):
    item_id: Id
    scores: dict[str, float] = pydantic.Field(description="probability of each configured action")
    known: bool = pydantic.Field(description="false: the weights have not learned from this item")


class Explain(_Answer):
    """How an answer came about."""

    reuse: Reuse = pydantic.Field(description="what the cache of keys and values spared")
    tokens: int | None = pydantic.Field(description="of the history; null: not told")
    cached_tokens: int | None = pydantic.Field(description="of these, found in the cache")
    waited_ms: float | None = pydantic.Field(
        description="in the engine, until its first step; null: not told"
    )
    engine_ms: float | None = pydantic.Field(description="in the engine, waiting included")
    epoch: int = pydantic.Field(description="of the history: one more whenever its oldest chunk is dropped")
    events: int = pydantic.Field(description="of the history")
    version: int
    position: Position | None


class _Listed(_Answer):
    """What is told of every list of items."""

    user_id: Id
    version: int = pydantic.Field(description="the weights version that gave all of these scores")
    arm: Literal["a", "b"] | None = pydantic.Field(None, description="of an A/B test of two versions")
    history_length: int = pydantic.Field(description="events the scores have seen; 0: a cold start")
    history_source: Literal["log", "request"] = pydantic.Field(description="where the history came from")
    position: Position | None = pydantic.Field(description="null where the request brought the history")
    stale: bool = pydantic.Field(False, description=_STALE)
    exposure_id: str | None = pydantic.Field(
        None,
        description="where lists are logged: `<this>/<i>` is the exposure id of item i of the results, from "
        "0, by which a label names it",
    )
    explain: Explain | None = pydantic.Field(None, description="where it was asked for")


class RankAnswer(_Listed):
    results: list[Scored] = pydantic.Field(description="in the order of the candidates")


class Found(_Answer):
    item_id: Id
    score: float


class RetrieveAnswer(_Listed):
    results: list[Found] = pydantic.Field(description="best first")


class Recommendation(_Answer):
    item_id: Id
    score: float = pydantic.Field(description="the configured weighted sum of the probabilities")
    scores: dict[str, float] = pydantic.Field(description="probability of each configured action")


class RecommendAnswer(_Listed):
    results: list[Recommendation] = pydantic.Field(description="best first")


class Appended(_Answer):
    """Where one event stands in the log: it is durable there, and will be read in this order."""

    partition: int
    offset: int

    @pydantic.computed_field(  # type: ignore[prop-decorator]
        description="for `token` of a request whose answer has to include the event"
    )
    @property
    def token(self) -> str:
        return token_of(self.partition, self.offset)


class ActionsAnswer(_Answer):
    results: list[Appended] = pydantic.Field(description="in the order of the events")


class ForgetAnswer(_Answer):
    """Where a user's tombstone stands: a history as of a later position does not go back behind it."""

    user_id: Id
    partition: int
    offset: int


class HistoryEvent(_Answer):
    item_id: Id
    actions: list[str]
    timestamp_ms: int


class HistoryAnswer(_Answer):
    user_id: Id
    history_length: int
    epoch: int = pydantic.Field(description="one more whenever the window drops its oldest chunk")
    position: Position
    stale: bool = pydantic.Field(False, description=_STALE)
    events: list[HistoryEvent] = pydantic.Field(description="oldest first")


class ModelAnswer(_Answer):
    version: int
    step: int
    created_ms: int
    age_ms: int = pydantic.Field(description="since the version was published")
    newest_event_ms: int = pydantic.Field(description="time of the newest event it has learned from")
    positions: dict[int, list[Range]] = pydantic.Field(
        description="partition -> offsets it has learned from, as [start, stop) ranges"
    )
    actions: list[str]


class ShardState(_Answer):
    """How a history shard stands to the log."""

    connected: bool
    caught_up: bool = pydantic.Field(description="it has been at the end of the log since it started")
    positions: dict[int, int] = pydantic.Field(description="partition -> next offset it will read")
    lag: int | None = pydantic.Field(description="events it has not read yet; null: not known")
    gaps: int = pydantic.Field(description="offsets the log no longer had when they were due")


class ReadyAnswer(_Answer):
    ready: bool
    reason: str | None = pydantic.Field(None, description="what is being waited for")
    version: int | None
    shards: list[ShardState]


class Problem(_Answer):
    """Why a request was not answered."""

    type: str
    message: str
    field: str | None = pydantic.Field(None, description="dotted path of the wrong field")
    request_id: str | None = pydantic.Field(None, description="as in the header X-Request-Id, and in logs")
    acknowledged: list[Appended | None] | None = pydantic.Field(
        None,
        description="of an actions request that failed midway: which events are in the log, null: unknown",
    )


class ErrorAnswer(_Answer):
    error: Problem


class BatchElement(_Answer, Generic[T]):
    """What became of one request of a batch."""

    status: int = pydantic.Field(description="the HTTP status that it would have had alone")
    answer: T | None = None
    error: Problem | None = None


class BatchAnswer(_Answer, Generic[T]):
    results: list[BatchElement[T]] = pydantic.Field(description="in the order of the requests")
