"""The HTTP face: requests judged and turned into keys, answers turned back into ids.

It knows nothing of Ray: everything behind it is a `Backend`, so that every bad request is tested without a
cluster. A request that cannot be answered gets a typed JSON error (serve/errors.py).
"""

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import fastapi
import numpy as np
import pydantic
from fastapi.responses import Response

from grstream.config import Config
from grstream.events import ActionEvent, EventSchema, InvalidEvent
from grstream.histories import History
from grstream.keys import (
    ABSENT,
    Id,
    Keys,
    Namespace,
    canonical_id,
    feature_namespace,
    ints_of_keys,
    key_of,
    keys_of_ints,
    keys_of_strings,
)
from grstream.scores import EngineNotReady, NonFiniteScores, Ranked, Retrieved, WrongFeatures
from grstream.weights import Manifest
from serve import errors
from serve.errors import Invalid, Refusal, Unavailable
from serve.schemas import (
    ActionsAnswer,
    ActionsRequest,
    Appended,
    Candidate,
    ErrorAnswer,
    ForgetAnswer,
    Found,
    HistoryAnswer,
    HistoryEvent,
    ModelAnswer,
    Position,
    RankAnswer,
    RankRequest,
    ReadyAnswer,
    RetrieveAnswer,
    RetrieveRequest,
    Scored,
    action_names,
)

DEFAULT_K = 100


@dataclasses.dataclass(frozen=True)
class UserHistory:
    """A user's history as a shard holds it, and how far the shard had read when it was taken."""

    history: History
    partition: int
    position: int


class Backend(Protocol):
    """What stands behind the gateway. Methods raise Unavailable where a part of it is away."""

    async def history(self, user: Id) -> UserHistory: ...

    async def rank(self, user: Id, history: History, items: Keys, features: Keys, at_ms: int) -> Ranked: ...

    async def retrieve(
        self, user: Id, history: History, k: int, context: Keys, at_ms: int, exclude: Keys
    ) -> Retrieved: ...

    async def append(self, events: Sequence[ActionEvent]) -> list[Appended]: ...

    async def forget(self, user: Id) -> Appended: ...

    async def manifest(self) -> Manifest: ...

    async def readiness(self) -> ReadyAnswer: ...


def create_app(config: Config, backend: Backend) -> fastapi.FastAPI:
    """The FastAPI application of a gateway."""
    app = fastapi.FastAPI(
        title="grstream",
        version=importlib.metadata.version("grstream"),
        description="A generative recommender that learns from a live stream while it serves.",
        responses={
            status: {"model": ErrorAnswer, "description": what}
            for status, what in {
                400: "the body is not JSON",
                413: "more than the configured limit",
                422: "a field is wrong; it is named",
                503: "a part is away, or its queue full; with Retry-After",
            }.items()
        },
    )
    errors.install(app)
    gateway = _Gateway(config, backend)
    app.post("/v1/rank", response_model=RankAnswer)(gateway.rank)
    app.post("/v1/retrieve", response_model=RetrieveAnswer)(gateway.retrieve)
    app.post("/v1/actions", response_model=ActionsAnswer)(gateway.actions)
    app.get("/v1/users/{user_id:path}/history", response_model=HistoryAnswer)(gateway.user_history)
    app.delete("/v1/users/{user_id:path}", response_model=ForgetAnswer, status_code=202)(gateway.forget)
    app.get("/v1/model", response_model=ModelAnswer)(gateway.model)
    app.get("/healthz")(gateway.healthz)
    app.get("/readyz", response_model=ReadyAnswer)(gateway.readyz)
    return app


class _Gateway:
    def __init__(self, config: Config, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self._schema = EventSchema(config.events)
        self._namespaces = [feature_namespace(name) for name in config.events.features]

    async def rank(self, request: RankRequest) -> Response:
        """Score candidates for a user: the probability of each action, were the item shown now."""
        _limit("candidates", len(request.candidates), self._config.serve.max_candidates)
        at_ms = self._time("at_ms", request.at_ms)
        ids = [c.item_id for c in request.candidates]
        _no_duplicates("candidates", ids)
        features = self._feature_keys(request.context, request.candidates)
        async with self._patience():
            held = await self._backend.history(request.user_id)
            items = _keys(Namespace.ITEM, ids)
            ranked = await self._backend.rank(request.user_id, held.history, items, features, at_ms)
        shown = _as_given(request.ids_as_strings)
        rows = zip(ids, ranked.probabilities.tolist(), ranked.known.tolist(), strict=True)
        return _json(
            RankAnswer(
                user_id=shown(request.user_id),
                version=ranked.version,
                history_length=len(held.history.items),
                position=Position(partition=held.partition, offset=held.position),
                results=[
                    Scored(item_id=shown(i), scores=dict(zip(ranked.actions, p, strict=True)), known=k)
                    for i, p, k in rows
                ],
            )
        )

    async def retrieve(self, request: RetrieveRequest) -> Response:
        """The k items nearest to a user, among all that the weights know."""
        k = min(DEFAULT_K, self._config.serve.max_k) if request.k is None else request.k
        _limit("k", k, self._config.serve.max_k)
        _limit("exclude", len(request.exclude), self._config.serve.max_candidates)
        at_ms = self._time("at_ms", request.at_ms)
        context = self._context_keys(request.context)
        exclude = _keys(Namespace.ITEM, request.exclude)
        async with self._patience():
            held = await self._backend.history(request.user_id)
            if request.exclude_history:
                exclude = np.concatenate([exclude, held.history.items])
            found = await self._backend.retrieve(request.user_id, held.history, k, context, at_ms, exclude)
        shown = _as_given(request.ids_as_strings)
        return _json(
            RetrieveAnswer(
                user_id=shown(request.user_id),
                version=found.version,
                history_length=len(held.history.items),
                position=Position(partition=held.partition, offset=held.position),
                results=[
                    Found(item_id=shown(i), score=s)
                    for i, s in zip(_ids(found.items, found.names), found.scores.tolist(), strict=True)
                ],
            )
        )

    async def actions(self, request: ActionsRequest) -> Response:
        """Append events to the log. All are judged before any is sent; each answer is an acknowledgement."""
        _limit("events", len(request.events), self._config.serve.max_events)
        now = _now_ms()
        events = []
        for i, event in enumerate(request.events):
            try:
                events.append(self._schema.validate(event, record_time_ms=now))
            except InvalidEvent as error:
                field = f"events.{i}" + (f".{error.field}" if error.field else "")
                raise Invalid(error.reason, field) from error
        return _json(ActionsAnswer(results=await self._backend.append(events)))

    async def user_history(self, user_id: str, ids_as_strings: bool = False) -> Response:
        """The events that the next scores of a user will be computed from."""
        user = _user(user_id)
        async with self._patience():
            held = await self._backend.history(user)
        history, shown = held.history, _as_given(ids_as_strings)
        columns = (_ids(history.items, history.item_names), history.actions.tolist(), history.times.tolist())
        return _json(
            HistoryAnswer(
                user_id=shown(user),
                history_length=len(history.items),
                epoch=history.epoch,
                position=Position(partition=held.partition, offset=held.position),
                events=[
                    HistoryEvent(
                        item_id=shown(i), actions=action_names(a, self._config.events), timestamp_ms=t
                    )
                    for i, a, t in zip(*columns, strict=True)
                ],
            )
        )

    async def forget(self, user_id: str, ids_as_strings: bool = False) -> Response:
        """Forget a user: a tombstone in the log, which everything that holds histories carries out."""
        user = _user(user_id)
        placed = await self._backend.forget(user)
        shown = _as_given(ids_as_strings)
        answer = ForgetAnswer(user_id=shown(user), partition=placed.partition, offset=placed.offset)
        return _json(answer, status=202)

    async def model(self) -> Response:
        """The weights version being served, and what of the stream it has learned from."""
        async with self._patience():
            manifest = await self._backend.manifest()
        return _json(
            ModelAnswer(
                version=manifest.number,
                step=manifest.step,
                created_ms=manifest.created_ms,
                age_ms=max(0, _now_ms() - manifest.created_ms),
                newest_event_ms=manifest.newest_event_ms,
                positions=manifest.positions,
                actions=manifest.recipe.actions,
            )
        )

    async def healthz(self) -> dict[str, str]:
        """200 as long as this gateway runs."""
        return {"status": "ok"}

    async def readyz(self) -> Response:
        """200 once weights are loaded and histories have caught up with the log; until then 503."""
        async with self._patience():
            answer = await self._backend.readiness()
        if not answer.ready:
            raise Unavailable("not_ready", answer.reason or "starting")
        return _json(answer)

    @contextlib.asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        """Turns what may go wrong behind the gateway into an answer, and waits for it only so long."""
        limit_ms = self._config.serve.request_timeout_ms
        try:
            async with asyncio.timeout(limit_ms / 1000):
                yield
        except TimeoutError as error:
            raise Unavailable("timeout", f"no answer within {limit_ms} ms") from error
        except EngineNotReady as error:
            raise Unavailable("not_ready", str(error)) from error
        except (WrongFeatures, NonFiniteScores) as error:
            raise Refusal(500, "unusable_weights", str(error)) from error

    def _time(self, field: str, given: int | None) -> int:
        now = _now_ms()
        limit = self._config.events.max_future_ms
        if given is not None and given > now + limit:
            raise Invalid(f"{given - now} ms ahead of the clock; at most {limit} is allowed", field)
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


def _limit(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise Refusal(413, "too_many", f"{field}: {count}, more than the configured limit of {limit}", field)


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


def _ids(keys: Keys, names: dict[int, str]) -> list[Id]:
    """Ids of item keys: those of strings are in `names`."""
    ints = ints_of_keys(Namespace.ITEM, keys).tolist()
    return [names.get(key, value) for key, value in zip(keys.tolist(), ints, strict=True)]


def _as_given(as_strings: bool) -> Any:
    return str if as_strings else (lambda value: value)


def _user(user_id: str) -> Id:
    """The user that a path names."""
    try:
        return canonical_id(user_id)
    except ValueError as error:
        raise Invalid(str(error), "user_id") from error


def _json(answer: pydantic.BaseModel, status: int = 200) -> Response:
    """Serialised once: FastAPI would validate and copy the model again."""
    return Response(answer.model_dump_json(), status, media_type="application/json")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
