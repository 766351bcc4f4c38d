"""Request ids, API keys and bounded bodies, over gateways without a cluster."""

import asyncio
import contextlib
import json
import logging
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import fastapi
import pydantic
import pytest
import uvicorn
from fastapi.testclient import TestClient

from grstream import config as configuration
from grstream.config import Config, ConfigError
from grstream.logs import JsonFormatter
from serve.app import Arguments, _require_loopback, build
from serve.gateway import create_app
from serve.middleware import Keyring
from tests.serve.fake import CONFIG, FakeBackend

RANK, BODY = "/v1/rank", {"user_id": "eve", "candidates": [1]}
KEYS = {"web": pydantic.SecretStr("w" * 16), "batch": pydantic.SecretStr("b" * 20)}
WEB = {"Authorization": "Bearer " + "w" * 16}


def serving(**changes: Any) -> Config:
    return CONFIG.model_copy(update={"serve": CONFIG.serve.model_copy(update=changes)})


def client_of(
    backend: FakeBackend, config: Config = CONFIG, *, keys: bool = False, host: str = "testclient"
) -> TestClient:
    app = create_app(config, backend, Keyring(KEYS if keys else {}))
    return TestClient(app, raise_server_exceptions=False, client=(host, 50000))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


# -- request ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RANK, "/nowhere", "/v1/model"])
def test_a_request_keeps_its_id_in_the_header_and_in_an_error(backend: FakeBackend, path: str) -> None:
    async def bug() -> None:
        raise KeyError

    backend.broken = bug
    answer = client_of(backend).request(
        "GET" if path == "/v1/model" else "POST", path, json=BODY, headers={"X-Request-Id": "page-1.a:b_c"}
    )
    assert answer.status_code in (404, 500)
    assert answer.headers["X-Request-Id"] == "page-1.a:b_c"
    assert answer.json()["error"]["request_id"] == "page-1.a:b_c"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "é"])
def test_an_id_that_is_not_fit_for_a_log_is_replaced(backend: FakeBackend, given: str) -> None:
    client = client_of(backend)
    made = [
        client.post(RANK, json=BODY, headers={"X-Request-Id": given.encode()}).headers["X-Request-Id"]
        for _ in range(2)
    ]
    assert given not in made
    assert made[0] != made[1]


def test_a_line_of_log_tells_what_was_answered_and_names_no_user(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    client = client_of(backend, keys=True)
    with caplog.at_level(logging.INFO, "serve.access"):
        client.post(RANK, json=BODY, headers=WEB | {"X-Request-Id": "one"})
        client.get("/v1/users/eve/history", headers=WEB)
        client.post(RANK, json=BODY)
    formatter = JsonFormatter()
    lines = [json.loads(formatter.format(r)) for r in caplog.records if r.name == "serve.access"]
    assert lines[0].pop("ms") > 0
    assert lines[0].pop("time").endswith("Z")
    assert lines[0] == {
        "level": "INFO",
        "logger": "serve.access",
        "message": "POST /v1/rank 200",
        "request_id": "one",
        "method": "POST",
        "path": RANK,
        "status": 200,
        "version": 4,
        "key": "web",
        "reason": None,
    }
    assert lines[1]["path"] == "/v1/users/{user_id:path}/history"
    assert (lines[2]["status"], lines[2]["key"], lines[2]["reason"]) == (401, None, "unauthorized")
    assert "eve" not in caplog.text
    assert "w" * 16 not in caplog.text


# -- API keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (WEB, 200),
        ({"authorization": "bearer " + "b" * 20}, 200),
        ({"X-API-Key": "b" * 20}, 200),
        ({}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Basic " + "w" * 16}, 401),
        ({"Authorization": "Bearer " + "w" * 15}, 401),
        ({"X-API-Key": "é".encode()}, 401),
    ],
)
def test_a_key_is_asked_for_where_some_are_configured(
    backend: FakeBackend, headers: dict[str, Any], status: int
) -> None:
    client = client_of(backend, keys=True, host="10.1.2.3")
    for answer in (
        client.post(RANK, json=BODY, headers=headers),
        client.get("/readyz", headers=headers),
        client.get("/openapi.json", headers=headers),
    ):
        assert answer.status_code == status
        assert ("WWW-Authenticate" in answer.headers) == (status == 401)
        assert status == 200 or answer.json()["error"]["type"] == "unauthorized"
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1", 200), ("127.9.9.9", 200), ("::1", 200), ("::ffff:127.0.0.1", 200), ("10.0.0.1", 401)],
)
def test_without_keys_this_machine_alone_is_answered(backend: FakeBackend, host: str, status: int) -> None:
    assert client_of(backend, host=host).post(RANK, json=BODY).status_code == status


def test_a_key_has_only_so_many_requests_in_flight(backend: FakeBackend) -> None:
    config = serving(max_in_flight_per_key=2, request_timeout_ms=30_000)
    client = client_of(backend, config, keys=True)
    held, release = threading.Semaphore(0), threading.Event()

    async def hold() -> None:
        held.release()
        while not release.is_set():
            await asyncio.sleep(0.001)

    backend.broken = hold
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post(RANK, json=BODY, headers=WEB)))
        for _ in range(2)
    ]
    with client:  # one event loop for all
        for thread in threads:
            thread.start()
        held.acquire()
        held.acquire()
        refused = client.post(RANK, json=BODY, headers=WEB)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "too_many_requests")
        assert refused.headers["Retry-After"]
        assert client.get("/docs", headers={"X-API-Key": "b" * 20}).status_code == 200, "another key's"
        assert client.get("/healthz").status_code == 200
        release.set()
        for thread in threads:
            thread.join()
        assert client.post(RANK, json=BODY, headers=WEB).status_code == 200
    assert [a.status_code for a in answers] == [200, 200]


def test_keys_come_from_a_file_or_the_environment_and_are_never_quoted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.yaml"
    config = serving(api_keys_file=path).serve
    monkeypatch.delenv(configuration.API_KEYS_VARIABLE, raising=False)
    assert configuration.api_keys(CONFIG.serve) == {}
    with pytest.raises(ConfigError, match="api_keys_file"):
        configuration.api_keys(config)
    path.write_text("web: wwwwwwwwwwwwwwww\nbatch: bbbbbbbbbbbbbbbbbbbb\n")
    assert configuration.api_keys(config) == KEYS
    assert "wwww" not in repr(configuration.api_keys(config))
    for text in (
        "web: secret",
        "[secret]",
        "{secret",
        "web: secretsecretsecret\nx: secretsecretsecret",
        "{}",
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            configuration.api_keys(config)
        assert "secret" not in str(caught.value)
    monkeypatch.setenv(configuration.API_KEYS_VARIABLE, f"web={'w' * 16}, batch={'b' * 20}")
    assert configuration.api_keys(config) == KEYS
    monkeypatch.setenv(configuration.API_KEYS_VARIABLE, "")
    with pytest.raises(ConfigError, match=configuration.API_KEYS_VARIABLE):
        configuration.api_keys(CONFIG.serve)


def test_an_application_that_others_could_reach_is_not_built_without_keys(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(configuration.API_KEYS_VARIABLE, raising=False)
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    for host in ("127.0.0.1", "::1", "localhost"):
        _require_loopback(serving(host=host))
    settings = {"storage": str(tmp_path), "events": {"actions": ["click"]}, "serve": {"host": "0.0.0.0"}}
    with pytest.raises(ConfigError, match="api_keys_file"):
        build(Arguments(config=settings))
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="HAProxy"):
        build(Arguments(config=settings | {"serve": {}}))
    monkeypatch.setenv(configuration.API_KEYS_VARIABLE, "web=" + "w" * 16)
    build(Arguments(config=settings))


# -- bodies ----------------------------------------------------------------------------------------------


def test_a_body_is_bounded_whether_or_not_it_says_how_long_it_is(backend: FakeBackend) -> None:
    client = client_of(backend, serving(max_body_bytes=1000))

    def chunks(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield b" " * 100

    body = json.dumps(BODY).encode()
    assert client.post(RANK, content=body + b" " * (1000 - len(body))).status_code != 413
    for content in (b" " * 1001, chunks(11), chunks(100_000)):
        answer = client.post(RANK, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "body_too_large"


@contextlib.contextmanager
def listening(app: fastapi.FastAPI) -> Iterator[tuple[str, int]]:
    """The application on a socket."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join()


def test_a_slow_client_is_not_waited_for_and_does_not_hold_up_others(backend: FakeBackend) -> None:
    app = create_app(serving(body_timeout_ms=1500), backend)
    with listening(app) as address, socket.create_connection(address) as slow:
        slow.settimeout(10)
        head = "POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        began = time.monotonic()
        slow.sendall(b"{")
        with socket.create_connection(address) as quick:
            body = json.dumps(BODY)
            quick.settimeout(10)
            quick.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            assert quick.recv(100).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began < 1.5
        answer = b""
        while part := slow.recv(10_000):  # until the server closes
            answer += part
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"body_timeout"' in answer
        assert time.monotonic() - began < 8


def test_ten_megabytes_are_refused_before_they_have_come(backend: FakeBackend) -> None:
    with listening(create_app(CONFIG, backend)) as address, socket.create_connection(address) as big:
        big.settimeout(10)
        head = "POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        big.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(10):
                big.sendall(chunk)
        with contextlib.suppress(ConnectionError):
            assert big.recv(100).startswith(b"HTTP/1.1 413")
