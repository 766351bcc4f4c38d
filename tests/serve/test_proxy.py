from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from serve import proxy


def client(app: ASGIApp) -> TestClient:
    for middleware in reversed(proxy.middlewares()):
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return TestClient(app)


async def dies(scope: Scope, receive: Receive, send: Send) -> None:
    """What Serve's proxy does when the replica that held a request has died: it returns."""


def test_a_request_whose_gateway_died_is_told_to_come_again() -> None:
    answer = client(dies).post("/v1/actions")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"
    assert answer.json()["error"]["type"] == "gateway_unavailable"


def test_every_503_says_when_to_come_again_and_other_answers_pass_as_they_are() -> None:
    assert client(PlainTextResponse("full", 503)).get("/").headers["Retry-After"] == "1"
    own = PlainTextResponse("full", 503, {"Retry-After": "9"})
    assert client(own).get("/").headers.get_list("Retry-After") == ["9"]
    fine = client(PlainTextResponse("fine")).get("/")
    assert (fine.status_code, fine.text) == (200, "fine")
    assert "Retry-After" not in fine.headers


def test_the_callback_is_where_the_variable_says() -> None:
    module, name = proxy.CALLBACK.split(":")
    assert module == proxy.__name__
    assert getattr(proxy, name) is proxy.middlewares


def test_of_two_request_ids_the_gateways_own_stands() -> None:
    async def twice(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"x-request-id", b"own"), (b"a", b"1"), (b"a", b"2"), (b"X-Request-ID", b"serve's")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    answer = client(twice).get("/")
    assert answer.headers.get_list("X-Request-Id") == ["own"]
    assert answer.headers.get_list("a") == ["1", "2"]
    assert client(dies).get("/", headers={"X-Request-Id": "one"}).json()["error"]["request_id"] == "one"
