"""The client against the server's own application, in this process."""

import asyncio
import time
from typing import Any

import httpx
import pydantic
import pytest
from fastapi.testclient import TestClient

from grstream import client as calls
from grstream.api import RankAnswer, place_of
from grstream.client import (
    ApiError,
    AsyncClient,
    Client,
    NotYetVisible,
    Refused,
    Retry,
    ServerError,
    Unauthorized,
    Unavailable,
)
from grstream.tail import TailBehind
from serve.errors import Unavailable as Away
from serve.gateway import create_app
from serve.middleware import Keyring
from tests.serve.fake import CONFIG, FakeBackend

KEY = "k" * 16
EVENT = {"user_id": 1, "item_id": 2, "actions": ["click"], "timestamp_ms": 3}
NO_WAIT = Retry(attempts=1)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


def client_of(backend: FakeBackend, retry: Retry = NO_WAIT, api_key: str | None = KEY) -> Client:
    app = create_app(CONFIG, backend, Keyring({"test": pydantic.SecretStr(KEY)}))
    return Client(api_key=api_key, retry=retry, http=TestClient(app, raise_server_exceptions=False))


def raising(error: BaseException) -> Any:
    async def fail() -> None:
        raise error

    return fail


def test_every_call_gives_a_typed_answer(backend: FakeBackend) -> None:
    client = client_of(backend)
    assert client.ready().ready
    placed = client.actions([EVENT]).results[0]
    assert place_of(placed.token) == (placed.partition, placed.offset)
    ranked = client.rank("eve", [20, {"item_id": 3, "item_features": {"genre": "x"}}], context={"place": 1})
    assert [r.item_id for r in ranked.results] == [20, 3]
    assert ranked.results[0].scores["click"] == pytest.approx(0.02)
    past = [{"item_id": 1, "actions": ["like"], "timestamp_ms": 5}]
    assert client.rank("eve", [1], history=past, explain=True).history_source == "request"
    assert backend.asked[-1].times.tolist() == [5]
    found = client.retrieve("eve", k=1, exclude=[5], exclude_history=True, allow=["a/b"], min_offset=4)
    assert found.results[0].item_id == "a/b"
    assert backend.min_offset == 4
    assert backend.allow is not None
    assert len(backend.allow) == 1
    assert client.recommend("eve", k=2).results[1].item_id == 2**60
    assert len(client.history("eve").events) == 3
    assert client.model().version == 4
    assert client.forget("..").user_id == ".."
    assert client.forget("a/b?c").user_id == "a/b?c"


def test_a_batch_is_answered_by_element(backend: FakeBackend) -> None:
    client = client_of(backend)
    answer = client.batch([calls.rank("eve", [1]), calls.rank("eve", [1, 1])])
    assert [e.status for e in answer.results] == [200, 422]
    assert isinstance(answer.results[0].answer, RankAnswer)
    assert answer.results[1].error is not None
    assert answer.results[1].error.field == "candidates.1"
    with pytest.raises(ValueError, match="2 kinds"):
        client.batch([calls.rank(1, [1]), calls.retrieve(1)])  # type: ignore[list-item]


def test_what_is_refused_is_a_typed_error_that_names_the_request(backend: FakeBackend) -> None:
    client = client_of(backend)
    with pytest.raises(Refused, match="422 invalid_request") as caught:
        client.rank(1, [])
    assert caught.value.problem.field == "candidates"
    assert caught.value.problem.request_id
    with pytest.raises(Unauthorized):
        client_of(backend, api_key=None).model()
    backend.broken = raising(TailBehind("not read"))
    with pytest.raises(NotYetVisible):
        client.history(1, min_offset=3)
    backend.broken = raising(KeyError())
    with pytest.raises(ServerError):
        client.model()
    backend.broken = raising(Away("broker_unavailable", "away", [None]))
    with pytest.raises(Unavailable) as away:
        client.actions([EVENT])
    assert away.value.acknowledged == [None]


def flaky(backend: FakeBackend, times: int) -> list[int]:
    """Have the backend be away so many times; the list grows with each."""
    met: list[int] = []

    async def fail() -> None:
        if len(met) < times:
            met.append(1)
            raise Away("scorer_unavailable", "away")

    backend.broken = fail
    return met


def test_a_503_is_tried_again_when_the_server_says_so_and_not_for_ever(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    client = client_of(backend, Retry(attempts=3, total_s=10))
    flaky(backend, 2)
    assert client.rank("eve", [1]).version == 4
    assert slept == [1.0, 1.0]
    flaky(backend, 3)
    with pytest.raises(Unavailable):
        client.rank("eve", [1])
    impatient = client_of(backend, Retry(attempts=9, total_s=1.5))
    met = flaky(backend, 9)
    with pytest.raises(Unavailable):
        impatient.rank("eve", [1])
    assert len(met) == 2
    met = flaky(backend, 1)
    with pytest.raises(Unavailable):
        client.actions([EVENT])
    assert len(met) == 1, "events without ids could come to be twice in the log"
    flaky(backend, 1)
    assert client.actions([EVENT | {"event_id": "e"}]).results


def test_the_asynchronous_client_does_the_same(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def run() -> None:
        transport = httpx.ASGITransport(create_app(CONFIG, backend))
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
            AsyncClient(http=http) as client,
        ):
            flaky(backend, 1)
            with monkeypatch.context() as patched:
                patched.setattr(asyncio, "sleep", sleep)
                assert (await client.rank("eve", [20])).results[0].item_id == 20
            assert slept == [1.0]
            assert (await client.batch([calls.recommend("eve", k=1)])).results[0].status == 200
            with pytest.raises(ApiError):
                await client.retrieve("eve", k=0)

    asyncio.run(run())


def test_an_answer_of_a_newer_server_and_an_error_of_a_proxy_are_understood() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/readyz":
            return httpx.Response(502, text="bad gateway")
        body = {"user_id": 1, "partition": 2, "offset": 3, "news": {"a": 1}}
        return httpx.Response(202, json=body)

    http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(answer))
    client = Client(http=http)
    assert client.forget(1).offset == 3
    with pytest.raises(ServerError, match="bad gateway"):
        client.ready()
