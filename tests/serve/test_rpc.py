"""`Rank` over gRPC answers what HTTP answers."""

import asyncio
import contextlib
import json
import pathlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pydantic
import pytest
from fastapi.testclient import TestClient

from grstream.api import token_of
from grstream.tail import TailBehind
from serve import rank_pb2
from serve.errors import Unavailable
from serve.gateway import create_app
from serve.middleware import Keyring
from serve.rpc import SERVICE, Ranking, _host, add_ranking
from tests.serve.fake import CONFIG, FakeBackend

KEY = "k" * 16
KEYS = Keyring({"test": pydantic.SecretStr(KEY)})
Call = Callable[..., Any]
REQUEST = rank_pb2.RankRequest(
    user_id="eve",
    candidates=[
        rank_pb2.Candidate(item_id="20"),
        rank_pb2.Candidate(item_id="3", item_features={"genre": "noir"}),
    ],
    context={"place": "9"},
    at_ms=55,
    explain=True,
)
SAME = {
    "user_id": "eve",
    "candidates": [20, {"item_id": 3, "item_features": {"genre": "noir"}}],
    "context": {"place": 9},
    "at_ms": 55,
    "explain": True,
}


class Servicer:
    def __init__(self, ranking: Ranking) -> None:
        self._ranking = ranking

    async def Rank(self, asked: rank_pb2.RankRequest, context: Any) -> rank_pb2.RankAnswer:
        return await self._ranking.rank(asked, context)


@contextlib.asynccontextmanager
async def calling(backend: FakeBackend, keys: Keyring = KEYS) -> AsyncIterator[Call]:
    """A client's call of `Rank` on a server of this process."""
    server = grpc.aio.server()
    add_ranking(Servicer(Ranking(CONFIG, backend, keys)), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel.unary_unary(
                f"/{SERVICE}/Rank",
                request_serializer=rank_pb2.RankRequest.SerializeToString,
                response_deserializer=rank_pb2.RankAnswer.FromString,
            )
    finally:
        await server.stop(None)


def called(
    backend: FakeBackend, request: rank_pb2.RankRequest, key: str | None = KEY, keys: Keyring = KEYS
) -> rank_pb2.RankAnswer:
    async def run() -> rank_pb2.RankAnswer:
        metadata = [("x-request-id", "one")] + ([("authorization", f"Bearer {key}")] if key else [])
        async with calling(backend, keys) as rank:
            return await rank(request, metadata=metadata)

    return asyncio.run(run())


def test_the_answer_is_that_of_http() -> None:
    over_grpc, over_http = FakeBackend(), FakeBackend()
    answer = called(over_grpc, REQUEST)
    same = TestClient(create_app(CONFIG, over_http)).post("/v1/rank", json=SAME).json()
    assert over_grpc.features is not None
    assert over_http.features is not None
    assert over_grpc.features.tolist() == over_http.features.tolist()
    assert over_grpc.at_ms == over_http.at_ms == 55
    assert (answer.user_id, answer.version, answer.history_length) == ("eve", 4, 3)
    assert {"partition": answer.position.partition, "offset": answer.position.offset} == same["position"]
    for field in ("reuse", "epoch", "events", "tokens", "cached_tokens"):
        assert getattr(answer.explain, field) == same["explain"][field]
    assert [r.item_id for r in answer.results] == ["20", "3"]
    for row, expected in zip(answer.results, same["results"], strict=True):
        assert dict(zip(answer.actions, row.probabilities, strict=True)) == pytest.approx(expected["scores"])
        assert row.known == expected["known"]


def test_a_history_and_a_token_come_with_the_call() -> None:
    backend = FakeBackend()
    past = rank_pb2.PastEvent(item_id="a", actions=["like"], timestamp_ms=5, context={"place": "1"})
    brought = rank_pb2.RankRequest(
        user_id="eve", candidates=REQUEST.candidates, history=rank_pb2.History(events=[past])
    )
    answer = called(backend, brought)
    assert (answer.history_source, answer.HasField("position"), answer.history_length) == (
        "request",
        False,
        1,
    )
    assert backend.asked[-1].times.tolist() == [5]
    token = token_of(3, 8)
    called(backend, rank_pb2.RankRequest(user_id="eve", candidates=REQUEST.candidates, token=token))
    assert backend.min_offset == 8


def test_a_stale_history_is_told_of() -> None:
    backend = FakeBackend()
    assert not called(backend, REQUEST).stale
    backend.stale = True
    assert called(backend, REQUEST).stale


def away() -> Any:
    raise Unavailable("scorer_unavailable", "away")


def behind() -> Any:
    raise TailBehind("not read")


@pytest.mark.parametrize(
    ("request_", "key", "broken", "code", "kind"),
    [
        (REQUEST, None, None, grpc.StatusCode.UNAUTHENTICATED, "unauthorized"),
        (REQUEST, "x" * 16, None, grpc.StatusCode.UNAUTHENTICATED, "unauthorized"),
        (rank_pb2.RankRequest(user_id="1"), KEY, None, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request"),
        (
            rank_pb2.RankRequest(
                user_id="1", candidates=[rank_pb2.Candidate(item_id=str(i)) for i in range(101)]
            ),
            KEY,
            None,
            grpc.StatusCode.OUT_OF_RANGE,
            "too_many",
        ),
        (REQUEST, KEY, away, grpc.StatusCode.UNAVAILABLE, "scorer_unavailable"),
        (REQUEST, KEY, behind, grpc.StatusCode.FAILED_PRECONDITION, "not_yet_visible"),
    ],
)
def test_a_refusal_has_the_code_of_its_kind_and_tells_what_http_would(
    request_: rank_pb2.RankRequest, key: str | None, broken: Call | None, code: grpc.StatusCode, kind: str
) -> None:
    backend = FakeBackend()
    backend.broken = broken
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        called(backend, request_, key)
    assert caught.value.code() is code
    error = json.loads(caught.value.details() or "")["error"]
    assert (error["type"], error["request_id"]) == (kind, "one")


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.1:5", "10.0.0.1"),
        ("ipv6:[::1]:5", "::1"),
        ("ipv6:%5B::1%5D:5", "::1"),
        ("unix:", None),
    ],
)
def test_without_keys_a_caller_on_this_machine_is_known_by_its_peer(peer: str, host: str | None) -> None:
    assert _host(peer) == host
    assert called(FakeBackend(), REQUEST, None, Keyring({})).version == 4


def test_the_generated_messages_are_those_of_the_proto(tmp_path: pathlib.Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    root = pathlib.Path(rank_pb2.__file__).parent.parent
    assert (
        protoc.main(["protoc", f"-I{root}", f"--python_out={tmp_path}", str(root / "serve/rank.proto")]) == 0
    )

    def described(made: pathlib.Path) -> list[str]:
        return [line for line in made.read_text().splitlines() if line.startswith("DESCRIPTOR =")]

    assert described(tmp_path / "serve/rank_pb2.py") == described(pathlib.Path(rank_pb2.__file__))
