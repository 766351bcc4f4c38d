"""`rank` over gRPC: messages of serve/rank.proto, judged and answered by the gateway's own code.

Serve's gRPC proxy takes calls where the cluster was started with

    grpc_options: {port: 9000, grpc_servicer_functions: ["serve.rpc:add_ranking"]}

and hands them to the gateway deployment. It listens on every address, so clients need an API key (metadata
`authorization: Bearer KEY` or `x-api-key`) unless they are on the same machine. A refusal is a status whose
details are the JSON that HTTP would have answered. Needs `pip install 'grstream[grpc]'`.
"""

import logging
import re
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import grpc
import pydantic

from grstream import logs
from grstream.api import RankAnswer
from grstream.config import Config
from serve import errors, rank_pb2
from serve.errors import Invalid, Refusal
from serve.exposure_log import Listing
from serve.gateway import Backend, Gateway
from serve.instruments import Instruments
from serve.middleware import Admission, Keyring, presented_key, sane_id, write_line
from serve.schemas import RankRequest

SERVICE = "grstream.v1.Ranking"
CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.OUT_OF_RANGE,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_PEER = re.compile(r"ipv[46]:\[?([^\]]*?)\]?:\d+")

logger = logging.getLogger(__name__)


class CallContext(Protocol):
    """What is used of a call's context, which Serve's and grpc.aio's have in common."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...

    def peer(self) -> str: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...


class RankingServicer(Protocol):
    async def Rank(self, asked: rank_pb2.RankRequest, context: Any) -> rank_pb2.RankAnswer: ...


def add_ranking(servicer: RankingServicer, server: grpc.Server) -> None:
    """Add the service to a gRPC server: what Serve's `grpc_servicer_functions` names."""
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.Rank,
        request_deserializer=rank_pb2.RankRequest.FromString,
        response_serializer=rank_pb2.RankAnswer.SerializeToString,
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Rank": handler})])


class Ranking:
    """Answers `Rank`. Its count of a key's requests in flight is apart from HTTP's."""

    def __init__(
        self,
        config: Config,
        backend: Backend,
        keys: Keyring,
        exposures: Callable[[Listing], None] | None = None,
        instruments: Instruments | None = None,
    ) -> None:
        self._instruments = instruments or Instruments()
        self._gateway = Gateway(config, backend, exposures, self._instruments)
        self._admission = Admission(keys, config.serve.max_in_flight_per_key)

    async def rank(self, asked: rank_pb2.RankRequest, context: CallContext) -> rank_pb2.RankAnswer:
        """The answer; where it is refused an empty one, with status and details set."""
        began = time.perf_counter()
        given = dict(context.invocation_metadata() or ())
        name = sane_id(_bytes(given.get("x-request-id")).decode("latin-1")) or uuid.uuid4().hex
        presented = presented_key(_bytes(given.get("authorization")), _key(given.get("x-api-key")))
        status, key, answer, reason = 200, None, None, None
        try:
            with logs.request(name), self._admission.admitted(presented, _host(context.peer())) as key:
                answer = await self._gateway.ranked(_request(asked))
        except Refusal as refusal:
            status, reason = refusal.status, refusal.problem.type
            self._instruments.refused(status, reason)
            context.set_code(CODES.get(status, grpc.StatusCode.INTERNAL))
            context.set_details(bytes(errors.response(refusal, name).body).decode())
        finally:
            write_line(
                began,
                request_id=name,
                method="gRPC",
                path=f"/{SERVICE}/Rank",
                status=status,
                version=None if answer is None else answer.version,
                key=key,
                reason=reason,
            )
        return rank_pb2.RankAnswer() if answer is None else _message(answer)


def _request(asked: rank_pb2.RankRequest) -> RankRequest:
    """The request as HTTP would have had it. Raises Invalid."""
    given: dict[str, Any] = {
        "user_id": asked.user_id,
        "candidates": [
            {"item_id": c.item_id, "item_features": dict(c.item_features)} for c in asked.candidates
        ],
        "context": dict(asked.context),
        "explain": asked.explain,
    }
    for field in ("at_ms", "min_offset", "token"):
        if asked.HasField(field):
            given[field] = getattr(asked, field)
    if asked.HasField("history"):
        given["history"] = [
            {
                "item_id": e.item_id,
                "actions": list(e.actions),
                "timestamp_ms": e.timestamp_ms,
                "context": dict(e.context),
                "item_features": dict(e.item_features),
            }
            for e in asked.history.events
        ]
    try:
        return RankRequest.model_validate(given)
    except pydantic.ValidationError as error:
        raise Invalid(*errors.invalid_fields(error)) from error


def _message(answer: RankAnswer) -> rank_pb2.RankAnswer:
    position = None
    if answer.position is not None:
        position = rank_pb2.Position(partition=answer.position.partition, offset=answer.position.offset)
    explain = None
    if answer.explain is not None:
        told = answer.explain
        explain = rank_pb2.Explain(
            reuse=told.reuse,
            epoch=told.epoch,
            events=told.events,
            tokens=told.tokens,
            cached_tokens=told.cached_tokens,
        )
    return rank_pb2.RankAnswer(
        user_id=str(answer.user_id),
        version=answer.version,
        history_length=answer.history_length,
        history_source=answer.history_source,
        position=position,
        stale=answer.stale,
        exposure_id=answer.exposure_id,
        explain=explain,
        actions=list(answer.results[0].scores),
        results=[
            rank_pb2.Scored(item_id=str(r.item_id), probabilities=r.scores.values(), known=r.known)
            for r in answer.results
        ],
    )


def _host(peer: str) -> str | None:
    """The address in what gRPC calls a client."""
    found = _PEER.fullmatch(urllib.parse.unquote(peer))
    return found[1] if found else None


def _key(value: str | bytes | None) -> bytes | None:
    return None if value is None else _bytes(value)


def _bytes(value: str | bytes | None) -> bytes:
    return value.encode() if isinstance(value, str) else value or b""
