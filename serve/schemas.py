"""What requests look like over HTTP; OpenAPI is made from these and from the answers of `grstream.api`.

Ids come as integers or strings and go back in their canonical form; with `ids_as_strings` all ids of an
answer are strings, so that those above 2^53 survive a JavaScript client. A field not listed is refused.
"""

from typing import Annotated, Any, Self

import pydantic

from grstream.api import place_of
from grstream.config import EventsConfig
from grstream.events import Features, WireId
from grstream.keys import INT64_MAX, Id

Timestamp = Annotated[int, pydantic.Field(ge=0, le=INT64_MAX, description="milliseconds since 1970")]
Offset = Annotated[
    int, pydantic.Field(ge=0, le=INT64_MAX, description="of an event that the history has to include")
]


def _token(value: str) -> str:
    place_of(value)
    return value


Token = Annotated[
    str,
    pydantic.Field(max_length=64, description="of an event that the history has to include"),
    pydantic.AfterValidator(_token),
]


class _Request(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")


# Made anew for each: pydantic copies a default deeply, which was a fifth of the time of judging a candidate.
NO_FEATURES: Any = pydantic.Field(default_factory=dict)


class PastEvent(_Request):
    """An event of a history that a request brings: an ActionEvent of the request's user."""

    item_id: WireId
    actions: list[str] = pydantic.Field(description="configured names, each once; none: only shown")
    timestamp_ms: Timestamp
    context: Features = NO_FEATURES
    item_features: Features = NO_FEATURES


class Candidate(_Request):
    """An item that may be shown, with its features."""

    item_id: WireId
    item_features: Features = NO_FEATURES


def _candidate(value: Any) -> Any:
    """A bare id stands for a candidate without features."""
    return value if isinstance(value, dict | Candidate) else {"item_id": value}


class ForUser(_Request):
    """What every request for a user's scores may say."""

    user_id: WireId
    context: Features = pydantic.Field({}, description="categorical features of the moment")
    at_ms: Timestamp | None = pydantic.Field(None, description="when they are shown; default: now")
    history: list[PastEvent] | None = pydantic.Field(
        None,
        description="what the user did, in the order of the log, instead of the history that is held; "
        "placed, if late too, and cut as that one is",
    )
    min_offset: Offset | None = None
    token: Token | None = None
    explain: bool = pydantic.Field(False, description="say how the answer came about")
    ids_as_strings: bool = False

    @pydantic.model_validator(mode="after")
    def _one_way_to_say_which_history(self) -> Self:
        if sum(given is not None for given in (self.history, self.min_offset, self.token)) > 1:
            raise ValueError("give one of history, min_offset and token")
        return self


class RankRequest(ForUser):
    """Which of these would the user act upon, shown now? An item may be given once."""

    candidates: Annotated[
        list[
            Annotated[Candidate, pydantic.BeforeValidator(_candidate, json_schema_input_type=Id | Candidate)]
        ],
        pydantic.Field(min_length=1, description="ids, or objects with item_id and item_features"),
    ]


class RetrieveRequest(ForUser):
    """Which items, of all known ones, are nearest to the user?"""

    k: int | None = pydantic.Field(None, ge=1, description="default: 100, or the configured limit if lower")
    exclude: list[WireId] = pydantic.Field([], description="items not to answer")
    exclude_history: bool = pydantic.Field(False, description="nor those in the user's history")
    allow: list[WireId] | None = pydantic.Field(None, description="no items but these; default: all")


class RecommendRequest(RetrieveRequest):
    """Which items, of those nearest to the user, would the user act upon most, by the configured weights?"""


class BatchRequest(_Request):
    """Requests of one kind, answered beside each other."""

    requests: list[dict[str, Any]] = pydantic.Field(
        min_length=1, description="each as it would be sent alone; a wrong one spoils no other"
    )


class ActionsRequest(_Request):
    """Events to be appended to the log, in this order; each is judged by the event schema."""

    events: list[dict[str, Any]] = pydantic.Field(min_length=1)


def action_names(mask: int, config: EventsConfig) -> list[str]:
    return [name for bit, name in enumerate(config.actions) if mask >> bit & 1]
