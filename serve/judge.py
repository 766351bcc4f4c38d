"""Requests judged against the configuration and turned into keys: what every way in shares.

Refusals name the wrong field; nothing of a refused request goes any further.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from grstream.api import place_of
from grstream.config import Config
from grstream.events import ActionEvent, EventDecoder, EventSchema, InvalidEvent
from grstream.histories import History, RollingHistories
from grstream.keys import (
    ABSENT,
    Id,
    Keys,
    Namespace,
    canonical_id,
    feature_namespace,
    key_of,
    keys_of_ints,
    keys_of_strings,
)
from serve.errors import Invalid, Refusal
from serve.schemas import ActionsRequest, Candidate, ForUser, PastEvent, RankRequest, RetrieveRequest

DEFAULT_K = 100


@dataclasses.dataclass(frozen=True)
class ToRank:
    """C candidates, F features."""

    ids: list[Id]  # (C,)
    items: Keys  # (C,)
    features: Keys  # (C, F) the request's context for each, and each one's own
    at_ms: int


@dataclasses.dataclass(frozen=True)
class ToFind:
    """What is asked of all items."""

    k: int
    context: Keys  # (contexts,) in the columns of training
    at_ms: int
    exclude: Keys
    allow: Keys | None


class Judge:
    """Of the requests of one configuration. All methods raise Refusal."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._schema = EventSchema(config.events)
        self._decoder = EventDecoder(config.events)
        self._namespaces = [feature_namespace(name) for name in config.events.features]

    def to_rank(self, request: RankRequest) -> ToRank:
        limit("candidates", len(request.candidates), self._config.serve.max_candidates)
        at_ms = self._time("at_ms", request.at_ms)
        ids = [c.item_id for c in request.candidates]
        _no_duplicates("candidates", ids)
        features = self._feature_keys(request.context, request.candidates)
        return ToRank(ids, _keys(Namespace.ITEM, ids), features, at_ms)

    def to_find(self, request: RetrieveRequest) -> ToFind:
        """`exclude_history` is left to be done once the history is there."""
        most = self._config.serve.max_candidates
        k = min(DEFAULT_K, self._config.serve.max_k) if request.k is None else request.k
        limit("k", k, self._config.serve.max_k)
        limit("exclude", len(request.exclude), most)
        limit("allow", len(request.allow or ()), most)
        return ToFind(
            k=k,
            at_ms=self._time("at_ms", request.at_ms),
            context=self._context_keys(request.context),
            exclude=_keys(Namespace.ITEM, request.exclude),
            allow=None if request.allow is None else _keys(Namespace.ITEM, request.allow),
        )

    def history(self, request: ForUser) -> History | None:
        """The history that a request brings, folded as the log's are (law 3); None: it brings none."""
        if request.history is None:
            return None
        limit("history", len(request.history), self._config.serve.max_history)
        user, now = request.user_id, now_ms()
        decoded = self._decoder.decode(
            0,
            np.arange(len(request.history)),
            [_event(user, past).to_json() for past in request.history],
            np.full(len(request.history), now, np.int64),
        )
        if decoded.rejected:
            first = decoded.rejected[0]
            path = f"history.{first.offset}" + (f".{first.field}" if first.field else "")
            raise Invalid(first.reason, path)
        histories = RollingHistories(
            self._config.histories, features=len(self._config.events.features), track_new=False
        )
        histories.append(decoded.batch)
        return histories.history(key_of(Namespace.USER, user))

    def events(self, request: ActionsRequest) -> list[ActionEvent]:
        limit("events", len(request.events), self._config.serve.max_events)
        now = now_ms()
        events = []
        for i, event in enumerate(request.events):
            try:
                events.append(self._schema.validate(event, record_time_ms=now))
            except InvalidEvent as error:
                field = f"events.{i}" + (f".{error.field}" if error.field else "")
                raise Invalid(error.reason, field) from error
        return events

    def _time(self, field: str, given: int | None) -> int:
        now = now_ms()
        ahead = self._config.events.max_future_ms
        if given is not None and given > now + ahead:
            raise Invalid(f"{given - now} ms ahead of the clock; at most {ahead} is allowed", field)
        return now if given is None else given

    def _feature_keys(self, context: dict[str, Id], candidates: Sequence[Candidate]) -> Keys:
        """(C, F): the request's context for each candidate, and each candidate's own features."""
        config = self._config.events
        out = np.full((len(candidates), len(config.features)), ABSENT, np.int64)
        out[:, : len(config.context)] = self._context_keys(context)
        for row, candidate in enumerate(candidates):
            if candidate.item_features:
                field = f"candidates.{row}.item_features"
                self._known_names(field, candidate.item_features, config.item_features)
                for column, name in enumerate(config.item_features, start=len(config.context)):
                    if name in candidate.item_features:
                        out[row, column] = key_of(self._namespaces[column], candidate.item_features[name])
        return out

    def _context_keys(self, context: dict[str, Id]) -> Keys:
        """The request's context in the columns of training: (C,)."""
        names = self._config.events.context
        self._known_names("context", context, names)
        keys = [
            key_of(namespace, context[name]) if name in context else ABSENT
            for namespace, name in zip(self._namespaces, names, strict=False)  # context comes first
        ]
        return np.array(keys, np.int64)

    def _known_names(self, field: str, given: dict[str, Id], names: list[str]) -> None:
        unknown = given.keys() - set(names)
        if unknown and self._config.events.unknown_fields == "reject":
            allowed = ", ".join(names) or "none is configured"
            raise Invalid(f"unknown feature; allowed: {allowed}", f"{field}.{min(unknown)}")


def limit(field: str, count: int, most: int) -> None:
    if count > most:
        raise Refusal(413, "too_many", f"{field}: {count}, more than the configured limit of {most}", field)


def offset_of(token: str, partition: int) -> int:
    """The offset that a token of an event in this partition, the user's, means."""
    of, offset = place_of(token)
    if of != partition:
        raise Invalid(
            f"it is of an event in partition {of}; the user's events are in partition {partition}", "token"
        )
    return offset


def user_of(user_id: str) -> Id:
    """The user that a path names."""
    try:
        return canonical_id(user_id)
    except ValueError as error:
        raise Invalid(str(error), "user_id") from error


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def _event(user: Id, past: PastEvent) -> ActionEvent:
    # Its fields have been validated one by one; the decoder judges the rest, as it does the log's.
    return ActionEvent.model_construct(
        user_id=user,
        item_id=past.item_id,
        actions=past.actions,
        timestamp_ms=past.timestamp_ms,
        context=past.context,
        item_features=past.item_features,
    )


def _no_duplicates(field: str, ids: Sequence[Id]) -> None:
    if len(set(ids)) == len(ids):
        return
    first: dict[Id, int] = {}
    for i, item in enumerate(ids):
        if item in first:
            raise Invalid(f"item {item!r} is given twice, first at {field}.{first[item]}", f"{field}.{i}")
        first[item] = i


def _keys(namespace: int, ids: Sequence[Id]) -> Keys:
    """Keys of canonical ids: (n,)."""
    out = np.empty(len(ids), np.int64)
    strings = np.array([isinstance(i, str) for i in ids], np.bool_)
    out[~strings] = keys_of_ints(namespace, np.array([i for i in ids if isinstance(i, int)], np.int64))
    out[strings] = keys_of_strings(namespace, [i for i in ids if isinstance(i, str)])
    return out
