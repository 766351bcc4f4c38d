"""The HTTP face: what is asked, by whom and where it goes; answers turned back into ids.

It knows nothing of Ray: everything behind it is a `Backend`, so that every bad request is tested without a
cluster. A request that cannot be answered gets a typed JSON error (serve/errors.py).
"""

import asyncio
import contextlib
import dataclasses
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any, Protocol, TypeVar

import fastapi
import fastapi.security
import numpy as np
import numpy.typing as npt
import pydantic
from fastapi.responses import Response

import grstream
from grstream.api import (
    ActionsAnswer,
    Appended,
    BatchAnswer,
    BatchElement,
    ErrorAnswer,
    Explain,
    ForgetAnswer,
    HistoryAnswer,
    HistoryEvent,
    ModelAnswer,
    Position,
    RankAnswer,
    ReadyAnswer,
    RecommendAnswer,
    RetrieveAnswer,
)
from grstream.config import Config
from grstream.events import ActionEvent
from grstream.histories import History
from grstream.keys import Id, Keys, Namespace, ints_of_keys, key_of
from grstream.scores import (
    EngineNotReady,
    EngineStopped,
    NonFiniteScores,
    Rank,
    Ranked,
    Recommend,
    Recommended,
    Retrieve,
    Retrieved,
    WrongFeatures,
)
from grstream.tail import TailBehind
from grstream.weights import Manifest
from serve import errors
from serve.errors import Invalid, NotYet, Refusal, Unavailable
from serve.exposure_log import Listing
from serve.instruments import Instruments
from serve.judge import Judge, limit, now_ms, offset_of, user_of
from serve.middleware import VERSION_HEADER, Access, Admission, BoundedBody, Keyring, RequestLog
from serve.schemas import (
    ActionsRequest,
    BatchRequest,
    ForUser,
    Offset,
    RankRequest,
    RecommendRequest,
    RetrieveRequest,
    Token,
    action_names,
)

logger = logging.getLogger(__name__)

LISTS = frozenset(
    f"/v1/{batch}{what}" for batch in ("", "batch/") for what in ("rank", "retrieve", "recommend")
)

R = TypeVar("R", bound=ForUser)
A = TypeVar("A", bound=pydantic.BaseModel)
F = TypeVar("F", Retrieved, Recommended)


@dataclasses.dataclass(frozen=True)
class UserHistory:
    """A user's history as a shard holds it, and how far the shard had read when it was taken."""

    history: History
    partition: int
    position: int
    stale: bool = False  # the shard is away: it is what was last seen, and newer events may be missing


class Backend(Protocol):
    """What stands behind the gateway. Methods raise Unavailable where a part of it is away."""

    async def partition(self, user: Id) -> int:
        """The partition of the topic that the user's events are in."""
        ...

    async def history(self, user: Id, min_offset: int | None) -> UserHistory:
        """Raises TailBehind where the event at `min_offset` is not read in time."""
        ...

    async def rank(self, user: Id, ask: Rank) -> Ranked: ...

    async def retrieve(self, user: Id, ask: Retrieve) -> Retrieved: ...

    async def recommend(self, user: Id, ask: Recommend) -> Recommended: ...

    async def append(self, events: Sequence[ActionEvent]) -> list[Appended]: ...

    async def forget(self, user: Id) -> Appended: ...

    async def manifest(self) -> Manifest: ...

    async def readiness(self) -> ReadyAnswer: ...


def create_app(
    config: Config,
    backend: Backend,
    keys: Keyring | None = None,
    exposures: Callable[[Listing], None] | None = None,
    instruments: Instruments | None = None,
) -> fastapi.FastAPI:
    """The FastAPI application of a gateway.

    Without `keys` it answers clients of this machine alone. `exposures` takes every list that is answered,
    and must not wait.
    """
    keys, instruments = keys or Keyring({}), instruments or Instruments()
    bearer = fastapi.security.HTTPBearer(auto_error=False, description="or the key as X-API-Key")
    app = fastapi.FastAPI(
        title="grstream",
        version=grstream.__version__,
        description="A generative recommender that learns from a live stream while it serves.",
        responses={
            status: {"model": ErrorAnswer, "description": what} for status, what in errors.WHY_NOT.items()
        },
        dependencies=[fastapi.Security(bearer)] if keys else [],
        # Newer ones trace by themselves: paths, which name users, and what was wrong with a body, which is
        # a user's, too.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    errors.install(app)
    gateway = Gateway(config, backend, exposures, instruments)
    app.post("/v1/rank", response_model=RankAnswer)(gateway.rank)
    app.post("/v1/retrieve", response_model=RetrieveAnswer)(gateway.retrieve)
    app.post("/v1/recommend", response_model=RecommendAnswer)(gateway.recommend)
    app.post("/v1/batch/rank", response_model=BatchAnswer[RankAnswer])(gateway.batch_rank)
    app.post("/v1/batch/retrieve", response_model=BatchAnswer[RetrieveAnswer])(gateway.batch_retrieve)
    app.post("/v1/batch/recommend", response_model=BatchAnswer[RecommendAnswer])(gateway.batch_recommend)
    app.post("/v1/actions", response_model=ActionsAnswer)(gateway.actions)
    app.get("/v1/users/{user_id:path}/history", response_model=HistoryAnswer)(gateway.user_history)
    app.delete("/v1/users/{user_id:path}", response_model=ForgetAnswer, status_code=202)(gateway.forget)
    app.get("/v1/model", response_model=ModelAnswer)(gateway.model)
    app.get("/healthz")(gateway.healthz)
    app.get("/readyz", response_model=ReadyAnswer)(gateway.readyz)
    # The last one added is the outermost.
    serving = config.serve
    app.add_middleware(BoundedBody, max_bytes=serving.max_body_bytes, timeout_ms=serving.body_timeout_ms)
    app.add_middleware(Access, admission=Admission(keys, serving.max_in_flight_per_key))
    app.add_middleware(RequestLog, instruments=instruments, timed=LISTS)
    return app


@dataclasses.dataclass(frozen=True)
class _Held:
    """The history that a request is answered from; without a position where the request brought it."""

    history: History
    position: Position | None
    stale: bool = False


class Gateway:
    """The routes. `ranked`, `retrieved` and `recommended` answer one request, however it came."""

    def __init__(
        self,
        config: Config,
        backend: Backend,
        exposures: Callable[[Listing], None] | None = None,
        instruments: Instruments | None = None,
    ) -> None:
        self._config = config
        self._instruments = instruments or Instruments()
        self._exposures = exposures
        self._backend = backend
        self._judge = Judge(config)
        self._weights = tuple((action, config.serve.weight(action)) for action in config.events.actions)

    async def rank(self, request: RankRequest) -> Response:
        """Score candidates for a user: the probability of each action, were the item shown now."""
        return _json(await self.ranked(request))

    async def retrieve(self, request: RetrieveRequest) -> Response:
        """The k items nearest to a user, among all that the weights know."""
        return _json(await self.retrieved(request))

    async def recommend(self, request: RecommendRequest) -> Response:
        """The k best items for a user: those nearest, ordered by the weighted sum of their probabilities."""
        return _json(await self.recommended(request))

    async def batch_rank(self, request: BatchRequest) -> Response:
        """Many rank requests, each answered or given its own error."""
        results = await self._batch(request, RankRequest, self.ranked)
        return _json(BatchAnswer[RankAnswer](results=results))

    async def batch_retrieve(self, request: BatchRequest) -> Response:
        """Many retrieve requests, each answered or given its own error."""
        results = await self._batch(request, RetrieveRequest, self.retrieved)
        return _json(BatchAnswer[RetrieveAnswer](results=results))

    async def batch_recommend(self, request: BatchRequest) -> Response:
        """Many recommend requests, each answered or given its own error."""
        results = await self._batch(request, RecommendRequest, self.recommended)
        return _json(BatchAnswer[RecommendAnswer](results=results))

    async def ranked(self, request: RankRequest) -> RankAnswer:
        asked = self._judge.to_rank(request)
        async with self._patience():
            held = await self._held(request)
            ask = Rank(**_about(request, held, asked.at_ms), items=asked.items, features=asked.features)
            with self._instruments.stage("scorer"):
                found = await self._backend.rank(request.user_id, ask)
            self._instruments.engine(found.encoded)
        shown = _as_given(request.ids_as_strings)
        rows = zip(asked.ids, found.probabilities.tolist(), found.known.tolist(), strict=True)
        weights = np.array([self._config.serve.weight(action) for action in found.actions], np.float32)
        features = [candidate.item_features for candidate in request.candidates]
        scores = found.probabilities @ weights
        # Here and below: results are validated by one call, which is several times faster than one for each.
        results = [
            {"item_id": shown(i), "scores": dict(zip(found.actions, p, strict=True)), "known": k}
            for i, p, k in rows
        ]
        exposure_id = self._log(request, "rank", found, asked.ids, scores, features)
        fields = self._listed(request, held, found)
        return RankAnswer.model_validate({"exposure_id": exposure_id, **fields, "results": results})

    async def retrieved(self, request: RetrieveRequest) -> RetrieveAnswer:
        found, held, shown = await self._find(request, self._backend.retrieve)
        ids = _ids(found.items, found.names)
        results = [{"item_id": shown(i), "score": s} for i, s in zip(ids, found.scores.tolist(), strict=True)]
        exposure_id = self._log(request, "retrieve", found, ids, found.scores)
        fields = self._listed(request, held, found)
        return RetrieveAnswer.model_validate({"exposure_id": exposure_id, **fields, "results": results})

    async def recommended(self, request: RecommendRequest) -> RecommendAnswer:
        found, held, shown = await self._find(request, self._backend.recommend, self._weights)
        ids = _ids(found.items, found.names)
        columns = (ids, found.scores.tolist(), found.probabilities.tolist())
        results = [
            {"item_id": shown(i), "score": s, "scores": dict(zip(found.actions, p, strict=True))}
            for i, s, p in zip(*columns, strict=True)
        ]
        exposure_id = self._log(request, "recommend", found, ids, found.scores)
        fields = self._listed(request, held, found)
        return RecommendAnswer.model_validate({"exposure_id": exposure_id, **fields, "results": results})

    async def actions(self, request: ActionsRequest) -> Response:
        """Append events to the log. All are judged before any is sent; each answer is an acknowledgement."""
        events = self._judge.events(request)
        placed = await self._backend.append(events)
        self._instruments.posted(len(placed))
        return _json(ActionsAnswer(results=placed))

    async def user_history(
        self,
        user_id: str,
        ids_as_strings: bool = False,
        min_offset: Annotated[Offset | None, fastapi.Query()] = None,
        token: Annotated[Token | None, fastapi.Query()] = None,
    ) -> Response:
        """The events that the next scores of a user will be computed from."""
        user = user_of(user_id)
        if min_offset is not None and token is not None:
            raise Invalid("give one of min_offset and token", "token")
        async with self._patience():
            held = await self._read(user, min_offset, token)
        history, shown = held.history, _as_given(ids_as_strings)
        columns = (_ids(history.items, history.item_names), history.actions.tolist(), history.times.tolist())
        return _json(
            HistoryAnswer(
                user_id=shown(user),
                history_length=len(history.items),
                epoch=history.epoch,
                position=Position(partition=held.partition, offset=held.position),
                stale=held.stale,
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
        user = user_of(user_id)
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
                age_ms=max(0, now_ms() - manifest.created_ms),
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
        except TailBehind as error:
            raise NotYet(str(error)) from error
        except EngineStopped as error:
            raise Unavailable("scorer_unavailable", str(error)) from error
        except EngineNotReady as error:
            raise Unavailable("not_ready", str(error)) from error
        except (WrongFeatures, NonFiniteScores) as error:
            raise Refusal(500, "unusable_weights", str(error)) from error

    async def _find(
        self,
        request: RetrieveRequest,
        find: Callable[[Id, Any], Awaitable[F]],
        weights: tuple[tuple[str, float], ...] | None = None,
    ) -> tuple[F, _Held, Callable[[Id], Id]]:
        """What a backend's retrieve or recommend makes of a request, and the history that it was given."""
        asked = self._judge.to_find(request)
        async with self._patience():
            held = await self._held(request)
            exclude = asked.exclude
            if request.exclude_history:
                exclude = np.concatenate([exclude, held.history.items])
            about = _about(request, held, asked.at_ms)
            about |= {"k": asked.k, "context": asked.context, "exclude": exclude, "allow": asked.allow}
            ask = Retrieve(**about) if weights is None else Recommend(**about, weights=weights)
            with self._instruments.stage("scorer"):
                found = await find(request.user_id, ask)
            self._instruments.engine(found.encoded)
        return found, held, _as_given(request.ids_as_strings)

    async def _held(self, request: ForUser) -> _Held:
        """The history to answer a request from."""
        brought = self._judge.history(request)
        if brought is not None:
            return _Held(brought, None)
        held = await self._read(request.user_id, request.min_offset, request.token)
        position = Position(partition=held.partition, offset=held.position)
        return _Held(held.history, position, held.stale)

    async def _read(self, user: Id, min_offset: int | None, token: str | None) -> UserHistory:
        with self._instruments.stage("histories"):
            if token is not None:
                min_offset = offset_of(token, await self._backend.partition(user))
            held = await self._backend.history(user, min_offset)
        if held.stale:
            self._instruments.stale()
        return held

    def _listed(
        self, request: ForUser, held: _Held, found: Ranked | Retrieved | Recommended
    ) -> dict[str, Any]:
        """The fields that every list of items has."""
        events, explain = len(held.history.items), None
        if request.explain:
            explain = Explain(
                reuse=found.reuse,
                tokens=None if found.encoded is None else found.encoded.tokens,
                cached_tokens=None if found.encoded is None else found.encoded.cached,
                waited_ms=None if found.encoded is None else found.encoded.waited_ms,
                engine_ms=None if found.encoded is None else found.encoded.took_ms,
                epoch=held.history.epoch,
                events=events,
                version=found.version,
                position=held.position,
            )
        return {
            "user_id": _as_given(request.ids_as_strings)(request.user_id),
            "version": found.version,
            "arm": found.arm,
            "history_length": events,
            "history_source": "request" if held.position is None else "log",
            "position": held.position,
            "stale": held.stale,
            "explain": explain,
        }

    def _log(
        self,
        request: ForUser,
        by: str,
        found: Ranked | Retrieved | Recommended,
        ids: list[Id],
        scores: npt.NDArray[np.float32],
        item_features: Sequence[dict[str, Id]] = (),
    ) -> str | None:
        """Have a list logged, where lists are; its exposure id."""
        if self._exposures is None:
            return None
        exposure_id = uuid.uuid4().hex
        at_ms, user, context = now_ms(), request.user_id, request.context
        told = (exposure_id, by, found.version, found.arm, at_ms, user, context)
        self._exposures(Listing(*told, ids, scores, item_features))
        return exposure_id

    async def _batch(
        self, batch: BatchRequest, model: type[R], answer: Callable[[R], Awaitable[A]]
    ) -> list[BatchElement[A]]:
        """Answers to requests beside each other, in their order."""
        limit("requests", len(batch.requests), self._config.serve.max_batch)

        async def one(given: dict[str, Any]) -> A:
            try:
                request = model.model_validate(given)
            except pydantic.ValidationError as error:
                raise Invalid(*errors.invalid_fields(error)) from error
            return await answer(request)

        outcomes = await asyncio.gather(*(one(r) for r in batch.requests), return_exceptions=True)
        elements: list[BatchElement[A]] = [_element(outcome) for outcome in outcomes]
        for element in elements:
            if element.error is not None:
                self._instruments.refused(element.status, element.error.type)
        return elements


def _about(request: ForUser, held: _Held, at_ms: int) -> dict[str, Any]:
    """The fields of an `Ask`."""
    user = key_of(Namespace.USER, request.user_id)
    return {"history": held.history, "at_ms": at_ms, "user": user, "brought": held.position is None}


def _element(outcome: A | BaseException) -> BatchElement[A]:
    """What became of one request of a batch: errors are its own, bugs too."""
    if not isinstance(outcome, BaseException):
        return BatchElement(status=200, answer=outcome)
    if isinstance(outcome, Refusal):
        return BatchElement(status=outcome.status, error=outcome.problem)
    if not isinstance(outcome, Exception):
        raise outcome
    logger.error("a request of a batch", exc_info=outcome)
    return BatchElement(status=500, error=errors.bug(outcome).problem)


def _ids(keys: Keys, names: dict[int, str]) -> list[Id]:
    """Ids of item keys: those of strings are in `names`."""
    ints = ints_of_keys(Namespace.ITEM, keys).tolist()
    return [names.get(key, value) for key, value in zip(keys.tolist(), ints, strict=True)]


def _as_given(as_strings: bool) -> Callable[[Id], Id]:
    return str if as_strings else (lambda value: value)


def _json(answer: pydantic.BaseModel, status: int = 200) -> Response:
    """Serialised once: FastAPI would validate and copy the model again."""
    version = getattr(answer, "version", None)
    headers = None if version is None else {VERSION_HEADER: str(version)}
    return Response(answer.model_dump_json(), status, headers, media_type="application/json")
