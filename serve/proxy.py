"""What Serve's HTTP proxy must be told, so that a dead gateway is a 503 and not a bare 500.

When the gateway replica that holds a request dies, the proxy of Ray 2.60 ends the exchange without an answer,
of which its server makes a plain "500 Internal Server Error". The proxy takes middlewares from the function
named by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH; set to `serve.proxy:middlewares` for the whole cluster
before it starts, a lost answer becomes a typed 503 with Retry-After, and the proxy's own 503 gets the header.
"""

from collections.abc import Iterable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import RETRY_AFTER_S, Unavailable, response
from serve.middleware import request_id

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serve.proxy:middlewares"


def middlewares() -> list[Middleware]:
    """What the variable names."""
    return [Middleware(AnswerForTheDead)]


class AnswerForTheDead:
    """Answers a request whose gateway died, and has every 503 say when to come again.

    Serve appends the id that a request came with, fit or not, to what the gateway answered; the gateway's own
    stands.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def pass_on(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = _with_one_id(message.get("headers", ()))
                if message["status"] == 503 and all(name.lower() != b"retry-after" for name, _ in headers):
                    headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, pass_on)
        if not started:
            lost = Unavailable(
                "gateway_unavailable",
                "the gateway died while it held this request; posted events may be in the log, so send them "
                "again with the same event_id",
            )
            await response(lost, request_id(scope))(scope, receive, send)


def _with_one_id(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers with the first of the request ids among them."""
    kept, named = [], False
    for name, value in headers:
        is_id = name.lower() == b"x-request-id"
        if not (is_id and named):
            kept.append((name, value))
        named |= is_id
    return kept
