"""`Client` and `AsyncClient`: the HTTP API from Python, with the answers as the models of `grstream.api`.

    with Client("http://127.0.0.1:8000", api_key=key) as client:
        placed = client.actions([{"user_id": 1, "item_id": 2, "actions": ["click"], "timestamp_ms": now}])
        best = client.recommend(1, k=10, token=placed.results[-1].token)

Both have the same methods. What is not answered is an `ApiError`; a request that never got there, or whose
answer was lost, is an error of httpx. Answers of a newer server may have fields that are not known here.
Needs httpx (`pip install 'grstream[client]'`).
"""

import asyncio
import dataclasses
import functools
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import httpx
import pydantic

from grstream.api import (
    ActionsAnswer,
    Appended,
    BatchAnswer,
    ErrorAnswer,
    ForgetAnswer,
    HistoryAnswer,
    ModelAnswer,
    Problem,
    RankAnswer,
    ReadyAnswer,
    RecommendAnswer,
    RetrieveAnswer,
)
from grstream.keys import Id

P = ParamSpec("P")
A = TypeVar("A", bound=pydantic.BaseModel)

Json = Mapping[str, Any]


class ApiError(Exception):
    """A request that was refused: its HTTP status and, as `problem`, why."""

    def __init__(self, status: int, problem: Problem) -> None:
        where = f" ({problem.field})" if problem.field else ""
        super().__init__(f"{status} {problem.type}{where}: {problem.message}")
        self.status = status
        self.problem = problem


class Refused(ApiError):
    """The request is wrong, or larger than allowed: 400, 404, 405, 408, 413, 422."""


class Unauthorized(ApiError):
    """401: no API key, or not one of the server's."""


class NotYetVisible(ApiError):
    """409: the history did not include in time what `token` or `min_offset` named."""


class Busy(ApiError):
    """429: as many requests of this API key as may be are being answered."""


class Unavailable(ApiError):
    """503: a part of the server is away, or full."""

    @property
    def acknowledged(self) -> list[Appended | None] | None:
        """Of a failed `actions`: where each event stands, None where that is not known."""
        return self.problem.acknowledged


class ServerError(ApiError):
    """Any other failure of the server's."""


_ERRORS: dict[int, type[ApiError]] = {401: Unauthorized, 409: NotYetVisible, 429: Busy, 503: Unavailable}


@dataclasses.dataclass(frozen=True)
class Call(Generic[A]):
    """A request, and what its answer is."""

    method: str
    path: str
    answer: type[A]
    body: Json | None = None
    query: Mapping[str, str | int | bool] = dataclasses.field(default_factory=dict)
    repeatable: bool = True  # sent twice it does no more than sent once


@dataclasses.dataclass(frozen=True)
class Retry:
    """How long to go on where the server says to come again; 429 and 503 alone."""

    attempts: int = 4  # in all
    total_s: float = 10.0  # waited between them

    def wait_s(
        self, call: Call, error: ApiError, retry_after: str | None, attempt: int, waited_s: float
    ) -> float:
        """How long to wait before the next attempt; raises `error` where there is to be none."""
        # Of a 503 nobody knows what the server had done; a 429 is refused before anything is.
        again = isinstance(error, Busy) or (isinstance(error, Unavailable) and call.repeatable)
        try:
            wait_s = max(0.0, float(retry_after or ""))
        except ValueError:
            raise error from None
        if not again or attempt >= self.attempts or waited_s + wait_s > self.total_s:
            raise error
        return wait_s


# -- the calls ---------------------------------------------------------------------------------------------


def rank(
    user_id: Id,
    candidates: Sequence[Id | Json],
    *,
    context: Mapping[str, Id] | None = None,
    at_ms: int | None = None,
    history: Sequence[Json] | None = None,
    min_offset: int | None = None,
    token: str | None = None,
    explain: bool = False,
) -> Call[RankAnswer]:
    """Probabilities of each action for candidates: ids, or objects with item_id and item_features."""
    asked = _asked(user_id, context, at_ms, history, min_offset, token, explain)
    return Call("POST", "/v1/rank", RankAnswer, asked | {"candidates": list(candidates)})


def retrieve(
    user_id: Id,
    *,
    k: int | None = None,
    exclude: Sequence[Id] = (),
    exclude_history: bool = False,
    allow: Sequence[Id] | None = None,
    context: Mapping[str, Id] | None = None,
    at_ms: int | None = None,
    history: Sequence[Json] | None = None,
    min_offset: int | None = None,
    token: str | None = None,
    explain: bool = False,
) -> Call[RetrieveAnswer]:
    """The k items nearest to a user."""
    asked = _asked(user_id, context, at_ms, history, min_offset, token, explain)
    return Call("POST", "/v1/retrieve", RetrieveAnswer, asked | _filters(k, exclude, exclude_history, allow))


def recommend(
    user_id: Id,
    *,
    k: int | None = None,
    exclude: Sequence[Id] = (),
    exclude_history: bool = False,
    allow: Sequence[Id] | None = None,
    context: Mapping[str, Id] | None = None,
    at_ms: int | None = None,
    history: Sequence[Json] | None = None,
    min_offset: int | None = None,
    token: str | None = None,
    explain: bool = False,
) -> Call[RecommendAnswer]:
    """The k best items for a user, by the weighted sum of their actions' probabilities."""
    asked = _asked(user_id, context, at_ms, history, min_offset, token, explain)
    return Call(
        "POST", "/v1/recommend", RecommendAnswer, asked | _filters(k, exclude, exclude_history, allow)
    )


def batch(calls: Sequence[Call[A]]) -> Call[BatchAnswer[A]]:
    """Calls of one kind (`rank`, `retrieve` or `recommend` of this module) as one request."""
    kinds = {(call.path, call.answer) for call in calls}
    if len(kinds) != 1:
        raise ValueError(f"a batch is of calls of one kind, one or more; got {len(kinds)} kinds")
    [(path, answer)] = kinds
    return Call(
        "POST",
        path.replace("/v1/", "/v1/batch/"),
        BatchAnswer[answer],  # type: ignore[valid-type]
        {"requests": [call.body for call in calls]},
    )


def actions(events: Sequence[Json]) -> Call[ActionsAnswer]:
    """Append events to the log; sent again after a 503 only where each has an event_id."""
    return Call(
        "POST",
        "/v1/actions",
        ActionsAnswer,
        {"events": list(events)},
        repeatable=all(event.get("event_id") is not None for event in events),
    )


def history(user_id: Id, *, min_offset: int | None = None, token: str | None = None) -> Call[HistoryAnswer]:
    """The events that a user's next scores are computed from."""
    query: dict[str, str | int | bool] = {}
    if min_offset is not None:
        query["min_offset"] = min_offset
    if token is not None:
        query["token"] = token
    return Call("GET", f"/v1/users/{_spelt(user_id)}/history", HistoryAnswer, query=query)


def forget(user_id: Id) -> Call[ForgetAnswer]:
    """Forget a user: a tombstone in the log."""
    return Call("DELETE", f"/v1/users/{_spelt(user_id)}", ForgetAnswer)


def model() -> Call[ModelAnswer]:
    """The weights version that is served, and what it has learned from."""
    return Call("GET", "/v1/model", ModelAnswer)


def ready() -> Call[ReadyAnswer]:
    """Whether the server can answer; Unavailable, tried again, until it can."""
    return Call("GET", "/readyz", ReadyAnswer)


# -- the clients -------------------------------------------------------------------------------------------


def _sync(build: Callable[P, Call[A]]) -> Callable[Concatenate["Client", P], A]:
    @functools.wraps(build)
    def method(self: "Client", *args: P.args, **kwargs: P.kwargs) -> A:
        return self.send(build(*args, **kwargs))

    return method


def _async(build: Callable[P, Call[A]]) -> Callable[Concatenate["AsyncClient", P], Awaitable[A]]:
    @functools.wraps(build)
    async def method(self: "AsyncClient", *args: P.args, **kwargs: P.kwargs) -> A:
        return await self.send(build(*args, **kwargs))

    return method


class Client:
    """Blocking; thread-safe. `http`, where given, is used instead of an own one, and left open."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        timeout_s: float = 10.0,
        retry: Retry = Retry(),
        http: httpx.Client | None = None,
    ) -> None:
        self._own = http is None
        self._http = http or httpx.Client(base_url=base_url, timeout=timeout_s)
        self._headers = _headers(api_key)
        self._retry = retry

    def send(self, call: Call[A]) -> A:
        """Answer a call. Raises ApiError."""
        attempt, waited_s = 1, 0.0
        while True:
            answer = self._http.request(
                call.method, call.path, json=call.body, params=dict(call.query), headers=self._headers
            )
            if answer.is_success:
                return _read(call, answer)
            retry_after = answer.headers.get("Retry-After")
            wait_s = self._retry.wait_s(call, _error(answer), retry_after, attempt, waited_s)
            time.sleep(wait_s)
            attempt, waited_s = attempt + 1, waited_s + wait_s

    rank = _sync(rank)
    retrieve = _sync(retrieve)
    recommend = _sync(recommend)
    actions = _sync(actions)
    history = _sync(history)
    forget = _sync(forget)
    model = _sync(model)
    ready = _sync(ready)

    def batch(self, calls: Sequence[Call[A]]) -> BatchAnswer[A]:
        """Many calls of one kind as one request; each element is an answer or an error."""
        return self.send(batch(calls))

    def close(self) -> None:
        if self._own:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """The same for asyncio."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        timeout_s: float = 10.0,
        retry: Retry = Retry(),
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._own = http is None
        self._http = http or httpx.AsyncClient(base_url=base_url, timeout=timeout_s)
        self._headers = _headers(api_key)
        self._retry = retry

    async def send(self, call: Call[A]) -> A:
        """Answer a call. Raises ApiError."""
        attempt, waited_s = 1, 0.0
        while True:
            answer = await self._http.request(
                call.method, call.path, json=call.body, params=dict(call.query), headers=self._headers
            )
            if answer.is_success:
                return _read(call, answer)
            retry_after = answer.headers.get("Retry-After")
            wait_s = self._retry.wait_s(call, _error(answer), retry_after, attempt, waited_s)
            await asyncio.sleep(wait_s)
            attempt, waited_s = attempt + 1, waited_s + wait_s

    rank = _async(rank)
    retrieve = _async(retrieve)
    recommend = _async(recommend)
    actions = _async(actions)
    history = _async(history)
    forget = _async(forget)
    model = _async(model)
    ready = _async(ready)

    async def batch(self, calls: Sequence[Call[A]]) -> BatchAnswer[A]:
        """Many calls of one kind as one request; each element is an answer or an error."""
        return await self.send(batch(calls))

    async def close(self) -> None:
        if self._own:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _asked(
    user_id: Id,
    context: Mapping[str, Id] | None,
    at_ms: int | None,
    history: Sequence[Json] | None,
    min_offset: int | None,
    token: str | None,
    explain: bool,
) -> dict[str, Any]:
    given = {
        "user_id": user_id,
        "context": None if context is None else dict(context),
        "at_ms": at_ms,
        "history": None if history is None else list(history),
        "min_offset": min_offset,
        "token": token,
        "explain": explain or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _filters(
    k: int | None, exclude: Sequence[Id], exclude_history: bool, allow: Sequence[Id] | None
) -> dict[str, Any]:
    given = {
        "k": k,
        "exclude": list(exclude) or None,
        "exclude_history": exclude_history or None,
        "allow": None if allow is None else list(allow),
    }
    return {name: value for name, value in given.items() if value is not None}


def _spelt(user_id: Id) -> str:
    spelt = urllib.parse.quote(str(user_id), safe="")
    return spelt.replace(".", "%2E") if spelt in (".", "..") else spelt  # which a path would lose


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _read(call: Call[A], answer: httpx.Response) -> A:
    return call.answer.model_validate_json(answer.content, extra="ignore")


def _error(answer: httpx.Response) -> ApiError:
    try:
        problem = ErrorAnswer.model_validate_json(answer.content, extra="ignore").error
    except pydantic.ValidationError:  # of a proxy between
        problem = Problem(type="http", message=answer.text[:500] or answer.reason_phrase)
    kind = _ERRORS.get(answer.status_code, Refused if answer.status_code < 500 else ServerError)
    return kind(answer.status_code, problem)
