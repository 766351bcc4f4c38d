"""Every way in which a request is not answered, as a status and a typed JSON body."""

from collections.abc import Sequence

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from grstream.schema import Schema
from serve.schemas import Appended, ErrorAnswer, Problem

RETRY_AFTER_S = 1  # a dead replica is back in seconds; clients that come a second later spread by themselves
NOT_JSON = "body is not JSON"


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


def require_schema(own: Schema, callers: Schema) -> None:
    """What a replica makes of a call while an application's replicas are exchanged one by one.

    Columns and bits of one schema must not be read by another. Raises OtherSchema.
    """
    if own != callers:
        raise OtherSchema(
            f"it was started with {own}, and is asked with {callers}: the application is being updated"
        )


def response(refusal: Refusal) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if refusal.status == 503 else None
    body = ErrorAnswer(error=refusal.problem).model_dump_json(exclude_none=True)
    return Response(body, refusal.status, headers, media_type="application/json")


def install(app: fastapi.FastAPI) -> None:
    """Have an application answer every error in this form."""

    async def on_refusal(_: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return response(error)

    async def on_invalid(_: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return response(_invalid(error))

    async def on_http(_: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kinds = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}
        return response(Refusal(error.status_code, kinds.get(error.status_code, "http"), error.detail))

    async def on_bug(_: fastapi.Request, error: Exception) -> Response:
        # Starlette logs the traceback; the client is told no more than that it is not its fault.
        return response(Refusal(500, "internal", f"unexpected {type(error).__name__}; see the server's log"))

    app.add_exception_handler(Refusal, on_refusal)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)


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
