"""Every way in which a request is not answered, as a status and a typed JSON body."""

from collections.abc import Sequence

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from grstream.api import Appended, ErrorAnswer, Problem
from grstream.schema import Schema

REQUEST_ID = "grstream.request_id"  # of an ASGI scope: see serve/middleware.py
REASON = "grstream.reason"  # of an ASGI scope: the type of the refusal that was answered
RETRY_AFTER_S = 1  # a dead replica is back in seconds; clients that come a second later spread by themselves
NOT_JSON = "body is not JSON"
WHY_NOT = {
    400: "the body is not JSON",
    401: "no API key, or one that is not configured",
    408: "the body took too long to arrive",
    409: "the history does not include yet what it was asked to",
    413: "more than a configured limit",
    422: "a field is wrong; it is named",
    429: "as many requests of this API key as may be are being answered; with Retry-After",
    503: "a part is away, or its queue full; with Retry-After",
}


class QueueFull(RuntimeError):
    """A replica holds as many requests as it may."""


class OtherSchema(RuntimeError):
    """A replica was started with other actions or features than whoever asks it."""


class Refusal(Exception):
    """A request that gets no answer: its HTTP status and why, with the wrong field where there is one."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        field: str | None = None,
        acknowledged: Sequence[Appended | None] | None = None,
    ) -> None:
        super().__init__(f"{kind}: {message}")
        self.status = status
        self.problem = Problem(
            type=_printable(kind),
            message=_printable(message),
            field=None if field is None else _printable(field),
            acknowledged=None if acknowledged is None else list(acknowledged),
        )


class Unavailable(Refusal):
    """503 with Retry-After: the same request may well be answered a little later."""

    def __init__(
        self, kind: str, message: str, acknowledged: Sequence[Appended | None] | None = None
    ) -> None:
        super().__init__(503, kind, message, acknowledged=acknowledged)


class Invalid(Refusal):
    """422: the body is JSON but not a valid request."""

    def __init__(self, message: str, field: str | None) -> None:
        super().__init__(422, "invalid_request", message, field)


class NotYet(Refusal):
    """409: the history does not include yet what it was asked to."""

    def __init__(self, message: str) -> None:
        super().__init__(409, "not_yet_visible", message)


class Unauthorized(Refusal):
    """401: no API key, or one that is not configured."""

    def __init__(self, message: str) -> None:
        super().__init__(401, "unauthorized", message)


class TooManyRequests(Refusal):
    """429 with Retry-After: the caller's other requests have to be answered first."""

    def __init__(self, message: str) -> None:
        super().__init__(429, "too_many_requests", message)


def require_schema(own: Schema, callers: Schema) -> None:
    """What a replica makes of a call while an application's replicas are exchanged one by one.

    Columns and bits of one schema must not be read by another. Raises OtherSchema.
    """
    if own != callers:
        raise OtherSchema(
            f"it was started with {own}, and is asked with {callers}: the application is being updated"
        )


def response(refusal: Refusal, request_id: str | None) -> Response:
    """The refusal as an answer; its body and header name the request, where it has an id."""
    headers = {}
    if refusal.status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if request_id is not None:
        headers["X-Request-Id"] = request_id
    problem = refusal.problem.model_copy(update={"request_id": request_id})
    body = ErrorAnswer(error=problem).model_dump_json(exclude_none=True)
    return Response(body, refusal.status, headers, media_type="application/json")


def answer(refusal: Refusal, scope: Scope) -> Response:
    """The refusal as the answer to a request, whose scope then tells its reason."""
    scope[REASON] = refusal.problem.type
    return response(refusal, scope.get(REQUEST_ID))


def install(app: fastapi.FastAPI) -> None:
    """Have an application answer every error in this form."""

    def answered(request: fastapi.Request, refusal: Refusal) -> Response:
        return answer(refusal, request.scope)

    async def on_refusal(request: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return answered(request, error)

    async def on_invalid(request: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answered(request, _invalid(error))

    async def on_http(request: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kinds = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}
        refusal = Refusal(error.status_code, kinds.get(error.status_code, "http"), error.detail)
        return answered(request, refusal)

    async def on_bug(request: fastapi.Request, error: Exception) -> Response:
        # Starlette logs the traceback.
        return answered(request, bug(error))

    app.add_exception_handler(Refusal, on_refusal)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)


def bug(error: BaseException) -> Refusal:
    """What a client is told of one: no more than that it is not its fault."""
    return Refusal(500, "internal", f"unexpected {type(error).__name__}; see the server's log")


def invalid_fields(error: pydantic.ValidationError | RequestValidationError) -> tuple[str, str | None]:
    """The first wrong field of a validation error: message and dotted path."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "path", "query")]
    return first["msg"].removeprefix("Value error, "), ".".join(path) or None


def _invalid(error: RequestValidationError) -> Refusal:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return Refusal(400, "not_json", f"{NOT_JSON}: {reason} at character {first['loc'][-1]}")
    if first["type"] == "missing" and first["loc"] == ("body",):
        return Refusal(400, "not_json", f"{NOT_JSON}: it is empty")
    return Invalid(*invalid_fields(error))


def _printable(text: str) -> str:
    """Text as it can be sent in UTF-8, at a length fit to read; clients' own names are quoted in it."""
    text = text if len(text) <= 500 else text[:500] + "…"
    return text.encode("utf-8", "replace").decode()
