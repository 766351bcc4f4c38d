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
