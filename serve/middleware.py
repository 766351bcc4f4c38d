"""What every request passes before it is judged: a request id and a line of log, an API key, a bounded body.

Pure ASGI, so that a body is bounded while it arrives, chunked or not, and a key is asked for before that.
"""

import asyncio
import collections
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping

import pydantic
from opentelemetry.trace import Span, SpanKind
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grstream import logs
from serve.errors import REASON, REQUEST_ID, Refusal, TooManyRequests, Unauthorized, answer
from serve.instruments import Instruments
from serve.tracing import parent

KEY_NAME = "grstream.key_name"  # of an ASGI scope: whose API key the request came with
VERSION_HEADER = "X-Weights-Version"
OPEN_PATHS = frozenset({"/healthz"})  # answered to whoever asks
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

access_log = logging.getLogger("serve.access")


class Keyring:
    """API keys by name, of which it holds no more than digests."""

    def __init__(self, keys: Mapping[str, pydantic.SecretStr]) -> None:
        self._digests = {name: _digest(key.get_secret_value().encode()) for name, key in keys.items()}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def name_of(self, presented: bytes) -> str | None:
        """The name of a key, None of one that is not among them; takes as long for one as for another."""
        digest, found = _digest(presented), None
        for name, held in self._digests.items():
            if hmac.compare_digest(digest, held):
                found = name
        return found


class RequestLog:
    """Gives a request its id, which its answer names, and tells of it once it is answered."""

    def __init__(self, app: ASGIApp, instruments: Instruments, timed: frozenset[str]) -> None:
        """`timed`: the routes whose time is a stage of its own."""
        self._app, self._instruments, self._timed = app, instruments, timed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        scope[REQUEST_ID] = name = request_id(scope) or uuid.uuid4().hex
        status: int | None = None
        version: int | None = None

        async def pass_on(message: Message) -> None:
            nonlocal status, version
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = {key.lower(): value for key, value in message.get("headers", ())}
                if VERSION_HEADER.lower().encode() in headers:
                    version = int(headers[VERSION_HEADER.lower().encode()])
                if b"x-request-id" not in headers:
                    message = {
                        **message,
                        "headers": [*message.get("headers", ()), (b"x-request-id", name.encode())],
                    }
            await send(message)

        with logs.request(name), self._span(scope, name) as span:
            try:
                await self._app(scope, receive, pass_on)
            except Exception:
                status, scope[REASON] = 500, "internal"  # whoever is outside answers it
                raise
            finally:
                path, reason = getattr(scope.get("route"), "path", None), scope.get(REASON)
                if reason is not None:
                    self._instruments.refused(status or 500, reason)
                elif status == 200 and path in self._timed:
                    self._instruments.took("gateway", time.perf_counter() - began)
                if span.is_recording():
                    span.update_name(f"{scope['method']} {path or 'unmatched'}")
                    told = {"http.route": path, "http.response.status_code": status}
                    told |= {"grstream.version": version, "error.type": reason}
                    span.set_attributes({key: value for key, value in told.items() if value is not None})
                write_line(
                    began,
                    request_id=name,
                    method=scope["method"],
                    path=path,
                    status=status,
                    version=version,
                    key=scope.get(KEY_NAME),
                    reason=reason,
                )

    def _span(self, scope: Scope, name: str) -> contextlib.AbstractContextManager[Span]:
        headers = {}
        for key in ("traceparent", "tracestate"):
            value = _header(scope, key.encode())
            if value is not None:
                headers[key] = value.decode("latin-1")
        attributes = {"http.request.method": scope["method"], "grstream.request_id": name}
        return self._instruments.span(scope["method"], parent(headers), SpanKind.SERVER, attributes)


def write_line(
    began: float,
    *,
    request_id: str,
    method: str,
    path: str | None,
    status: int | None,
    version: int | None,
    key: str | None,
    reason: str | None,
) -> None:
    """A line of the access log. `path` is the route, as what came may name a user.

    `began` is by `time.perf_counter`; a `status` of None: the client went away. `reason` is a refusal's type.
    """
    line = {
        "request_id": request_id,
        "method": method,
        "path": path,
        "status": status,
        "ms": round((time.perf_counter() - began) * 1000, 2),
        "version": version,
        "key": key,
        "reason": reason,
    }
    access_log.info("%s %s %s", method, path, status, extra=line)


def log_access() -> None:
    """Have this process, a gateway's, write its access log to standard error: JSON whatever else is."""
    handler = logs.to_standard_error()
    handler.setFormatter(logs.JsonFormatter())
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False


class Admission:
    """Lets in those who have a key, each so many requests at once; without keys, this machine alone."""

    def __init__(self, keys: Keyring, max_in_flight: int) -> None:
        self._keys, self._limit = keys, max_in_flight
        self._in_flight: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def admitted(self, presented: bytes | None, host: str | None) -> Iterator[str | None]:
        """While a request is answered: the name of its key, None where none is needed. Raises Refusal."""
        name = self._judge(presented, host)
        if name is None:
            yield None
            return
        self._in_flight[name] += 1
        try:
            yield name
        finally:
            self._in_flight[name] -= 1

    def _judge(self, presented: bytes | None, host: str | None) -> str | None:
        if not self._keys:
            if _remote(host):
                raise Unauthorized(
                    "no API key is configured, so only clients on this machine are answered: configure "
                    "serve.api_keys_file"
                )
            return None
        if presented is None:
            raise Unauthorized("an API key is needed, as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        name = self._keys.name_of(presented)
        if name is None:
            raise Unauthorized("the API key is not one of those that are configured")
        if self._in_flight[name] >= self._limit:
            raise TooManyRequests(f"{self._limit} requests of key {name} are being answered already")
        return name


class Access:
    """Has requests admitted, but for those that whoever asks is answered."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app, self._admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        presented = presented_key(_header(scope, b"authorization"), _header(scope, b"x-api-key"))
        with contextlib.ExitStack() as stack:
            try:
                admitted = self._admission.admitted(presented, (scope.get("client") or (None,))[0])
                scope[KEY_NAME] = stack.enter_context(admitted)
            except Refusal as refusal:
                await answer(refusal, scope)(scope, receive, send)
                return
            await self._app(scope, receive, send)


class BoundedBody:
    """Reads a request's body, at most so many bytes in at most so long, before anything else sees it."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_ms: int) -> None:
        self._app, self._max_bytes, self._timeout_ms = app, max_bytes, timeout_ms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except Refusal as refusal:
            refused = answer(refusal, scope)
            refused.headers["Connection"] = "close"  # what is still to come of the body is not read
            await refused(scope, receive, send)
            return
        if body is None:
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client went away. Raises Refusal."""
        announced = _header(scope, b"content-length") or b""
        if announced.isdigit() and len(announced) < 20:
            self._bound(int(announced))
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self._bound(size)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise Refusal(
                408, "body_timeout", f"the body did not arrive within {self._timeout_ms} ms"
            ) from error

    def _bound(self, size: int) -> None:
        if size > self._max_bytes:
            raise Refusal(
                413, "body_too_large", f"the body is of more than the configured {self._max_bytes} bytes"
            )


def request_id(scope: Scope) -> str | None:
    """The id that a request came with, unless it is not fit for a header and a log."""
    return sane_id((_header(scope, b"x-request-id") or b"").decode("latin-1"))


def sane_id(given: str) -> str | None:
    return given if _SANE_ID.fullmatch(given) else None


def presented_key(authorization: bytes | None, api_key: bytes | None) -> bytes | None:
    """The key that a request came with, in either of the two ways."""
    scheme, _, key = (authorization or b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" and key.strip() else api_key


def _remote(host: str | None) -> bool:
    """Whether a client is known to be on another machine."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return not (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key.lower() == name), None)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
