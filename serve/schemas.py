"""What requests and answers look like over HTTP; OpenAPI is made from these.

Ids come as integers or strings and go back in their canonical form; with `ids_as_strings` all ids of an
answer are strings, so that those above 2^53 survive a JavaScript client. A field not listed is refused.
"""

from typing import Annotated, Any

import pydantic

from grstream.config import EventsConfig
from grstream.events import Features, WireId
from grstream.keys import INT64_MAX, Id

Timestamp = Annotated[int, pydantic.Field(ge=0, le=INT64_MAX, description="milliseconds since 1970")]


class _Request(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")


class _Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class Candidate(_Request):
    """An item that may be shown, with its features."""

    item_id: WireId
    item_features: Features = {}


def _candidate(value: Any) -> Any:
    """A bare id stands for a candidate without features."""
    return value if isinstance(value, dict | Candidate) else {"item_id": value}


class RankRequest(_Request):
    """Which of these would the user act upon, shown now? An item may be given once."""

    user_id: WireId
    candidates: Annotated[
        list[
            Annotated[Candidate, pydantic.BeforeValidator(_candidate, json_schema_input_type=Id | Candidate)]
        ],
        pydantic.Field(min_length=1, description="ids, or objects with item_id and item_features"),
    ]
    context: Features = pydantic.Field({}, description="categorical features of the moment")
    at_ms: Timestamp | None = pydantic.Field(None, description="when they are shown; default: now")
    ids_as_strings: bool = False


class RetrieveRequest(_Request):
    """Which items, of all known ones, are nearest to the user?"""

    user_id: WireId
    k: int | None = pydantic.Field(None, ge=1, description="default: 100, or the configured limit if lower")
    context: Features = pydantic.Field({}, description="categorical features of the moment")
    at_ms: Timestamp | None = pydantic.Field(None, description="when they are shown; default: now")
    exclude: list[WireId] = pydantic.Field([], description="items not to answer")
    exclude_history: bool = pydantic.Field(False, description="nor those in the user's history")
    ids_as_strings: bool = False


class ActionsRequest(_Request):
    """Events to be appended to the log, in this order; each is judged by the event schema."""

    events: list[dict[str, Any]] = pydantic.Field(min_length=1)


class Position(_Answer):
    """How far the history shard that answered has read the user's partition."""

    partition: int
    offset: int = pydantic.Field(description="the next offset it will read: all before it are in the history")


class Scored(_Answer):
    item_id: Id
    scores: dict[str, float] = pydantic.Field(description="probability of each configured action")
    known: bool = pydantic.Field(description="false: the weights have not learned from this item")


class RankAnswer(_Answer):
    user_id: Id
    version: int = pydantic.Field(description="the weights version that gave all of these scores")
    history_length: int = pydantic.Field(description="events the scores have seen; 0: a cold start")
    position: Position
    results: list[Scored] = pydantic.Field(description="in the order of the candidates")


class Found(_Answer):
    item_id: Id
    score: float


class RetrieveAnswer(_Answer):
    user_id: Id
    version: int
    history_length: int
    position: Position
    results: list[Found] = pydantic.Field(description="best first")


class Appended(_Answer):
    """Where one event stands in the log: it is durable there, and will be read in this order."""

    partition: int
    offset: int


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
    events: list[HistoryEvent] = pydantic.Field(description="oldest first")


class ModelAnswer(_Answer):
    version: int
    step: int
    created_ms: int
    age_ms: int = pydantic.Field(description="since the version was published")
    newest_event_ms: int = pydantic.Field(description="time of the newest event it has learned from")
    positions: dict[int, list[tuple[int, int]]] = pydantic.Field(
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
    acknowledged: list[Appended | None] | None = pydantic.Field(
        None,
        description="of an actions request that failed midway: which events are in the log, null: unknown",
    )


class ErrorAnswer(_Answer):
    error: Problem


def action_names(mask: int, config: EventsConfig) -> list[str]:
    return [name for bit, name in enumerate(config.actions) if mask >> bit & 1]
