import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from grstream.config import ModelConfig, parse
from grstream.events import ActionEvent
from grstream.histories import History
from grstream.keys import ABSENT, Id, Keys, Namespace, feature_namespace, ints_of_keys, key_of
from grstream.scores import EngineNotReady, NonFiniteScores, Ranked, Retrieved, Reuse
from grstream.weights import Manifest, Recipe
from serve.errors import Unavailable
from serve.gateway import UserHistory, create_app
from serve.schemas import Appended, ReadyAnswer

CONFIG = parse(
    {
        "storage": "unused",
        "events": {
            "actions": ["click", "like"],
            "context": ["place"],
            "item_features": ["genre"],
            "max_future_ms": 1000,
        },
        "serve": {"max_candidates": 100, "max_events": 5, "max_k": 50, "request_timeout_ms": 200},
    }
)


def history(events: Sequence[tuple[Id, int, int]] = ()) -> History:
    return History(
        items=np.array([key_of(Namespace.ITEM, e[0]) for e in events], np.int64),
        actions=np.array([e[1] for e in events], np.int32),
        times=np.array([e[2] for e in events], np.int64),
        features=np.full((len(events), 2), ABSENT, np.int64),
        epoch=0,
        appended=len(events),
        item_names={key_of(Namespace.ITEM, e[0]): e[0] for e in events if isinstance(e[0], str)},
    )


class FakeBackend:
    """Scores a candidate by its id; keeps what it was asked."""

    def __init__(self) -> None:
        self.histories: dict[Id, History] = {"eve": history([(5, 1, 10), ("a/b", 2, 20), (-3, 3, 30)])}
        self.sent: list[ActionEvent] = []
        self.forgotten: list[Id] = []
        self.features: Keys | None = None
        self.at_ms = -1
        self.exclude: Keys | None = None
        self.context: Keys | None = None
        self.actions: tuple[str, ...] = ("click", "like")
        self.broken: Callable[[], Any] | None = None

    async def history(self, user: Id) -> UserHistory:
        if self.broken:
            await self.broken()
        return UserHistory(self.histories.get(user, history()), partition=3, position=77)

    async def rank(self, user: Id, history: History, items: Keys, features: Keys, at_ms: int) -> Ranked:
        self.features, self.at_ms = features, at_ms
        ids = ints_of_keys(Namespace.ITEM, items)
        columns = [ids / 1000, 1 - ids / 1000, ids * 0 + 0.25][: len(self.actions)]
        scores = np.stack(columns, axis=1).astype(np.float32)
        return Ranked(scores, ids < 10, version=4, reuse=Reuse.MISS, actions=self.actions)

    async def retrieve(
        self, user: Id, history: History, k: int, context: Keys, at_ms: int, exclude: Keys
    ) -> Retrieved:
        self.exclude, self.context, self.at_ms = exclude, context, at_ms
        items = np.array([key_of(Namespace.ITEM, i) for i in ("a/b", 2**60)][:k])
        names = {key_of(Namespace.ITEM, "a/b"): "a/b"}
        return Retrieved(items, names, np.array([2.0, 1.0], np.float32)[:k], version=4, reuse=Reuse.HIT)

    async def append(self, events: Sequence[ActionEvent]) -> list[Appended]:
        if self.broken:
            await self.broken()
        self.sent += events
        return [Appended(partition=1, offset=i) for i in range(len(events))]

    async def forget(self, user: Id) -> Appended:
        if self.broken:
            await self.broken()
        self.forgotten.append(user)
        return Appended(partition=2, offset=9)

    async def manifest(self) -> Manifest:
        if self.broken:
            await self.broken()
        recipe = Recipe(model=ModelConfig(), actions=["click", "like"], features=[], vocabulary_seed=0)
        return Manifest(
            number=4,
            step=9,
            created_ms=time.time_ns() // 1_000_000 - 5000,
            positions={0: [(0, 10)], 1: [(0, 3), (5, 6)]},
            newest_event_ms=123,
            recipe=recipe,
            files={},
        )

    async def readiness(self) -> ReadyAnswer:
        if self.broken:
            return ReadyAnswer(
                ready=False, reason="no weights version is loaded yet", version=None, shards=[]
            )
        return ReadyAnswer(ready=True, version=4, shards=[])


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def client(backend: FakeBackend) -> TestClient:
    return TestClient(create_app(CONFIG, backend), raise_server_exceptions=False)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() >= {"type", "message"}
    return body["error"]


def event(**changes: Any) -> dict[str, Any]:
    return {"user_id": 1, "item_id": 2, "actions": ["click"], "timestamp_ms": 3} | changes


FAR = 4 * 10**12
RANK, RETRIEVE, ACTIONS = "/v1/rank", "/v1/retrieve", "/v1/actions"
BAD = [  # path, body, status, type, field, a word of the message
    (RANK, "{not json", 400, "not_json", None, "JSON"),
    (RANK, "", 400, "not_json", None, "empty"),
    (RANK, "[" * 100_000, 400, "bad_request", None, "body"),
    (RANK, b'{"user_id": "\xff"}', 400, "bad_request", None, "body"),
    (RANK, [], 422, "invalid_request", None, "dictionary"),
    (RANK, {"candidates": [1]}, 422, "invalid_request", "user_id", "required"),
    (RANK, {"user_id": None, "candidates": [1]}, 422, "invalid_request", "user_id", "id"),
    (RANK, {"user_id": "", "candidates": [1]}, 422, "invalid_request", "user_id", "empty"),
    (RANK, {"user_id": 1.5, "candidates": [1]}, 422, "invalid_request", "user_id", "float"),
    (RANK, {"user_id": True, "candidates": [1]}, 422, "invalid_request", "user_id", "bool"),
    (RANK, {"user_id": 2**63, "candidates": [1]}, 422, "invalid_request", "user_id", "int64"),
    (RANK, {"user_id": "\ud800", "candidates": [1]}, 422, "invalid_request", "user_id", "surrogate"),
    (RANK, {"user_id": 1}, 422, "invalid_request", "candidates", "required"),
    (RANK, {"user_id": 1, "candidates": []}, 422, "invalid_request", "candidates", "at least 1"),
    (RANK, {"user_id": 1, "candidates": [1, 2.5]}, 422, "invalid_request", "candidates.1.item_id", "float"),
    (RANK, {"user_id": 1, "candidates": [7, 8, "7"]}, 422, "invalid_request", "candidates.2", "candidates.0"),
    (RANK, {"user_id": 1, "candidates": [*range(101)]}, 413, "too_many", "candidates", "100"),
    (RANK, {"user_id": 1, "candidates": [*range(100_000)]}, 413, "too_many", "candidates", "100000"),
    (RANK, {"user_id": 1, "candidates": [1], "at_ms": -1}, 422, "invalid_request", "at_ms", "0"),
    (RANK, {"user_id": 1, "candidates": [1], "at_ms": FAR}, 422, "invalid_request", "at_ms", "ahead"),
    (RANK, {"user_id": 1, "candidates": [1], "at_ms": "5"}, 422, "invalid_request", "at_ms", "integer"),
    (RANK, {"user_id": 1, "candidates": [1], "k": 3}, 422, "invalid_request", "k", "not permitted"),
    (
        RANK,
        {"user_id": 1, "candidates": [1], "context": {"colour": 3}},
        422,
        "invalid_request",
        "context.colour",
        "place",
    ),
    (
        RANK,
        {"user_id": 1, "candidates": [1], "context": {"\ud800": 3}},
        422,
        "invalid_request",
        None,
        "",
    ),
    (
        RANK,
        {"user_id": 1, "candidates": [3, {"item_id": 4, "item_features": {"year": 3}}]},
        422,
        "invalid_request",
        "candidates.1.item_features.year",
        "genre",
    ),
    (RETRIEVE, {"k": 5}, 422, "invalid_request", "user_id", "required"),
    (RETRIEVE, {"user_id": 1, "k": 0}, 422, "invalid_request", "k", "1"),
    (RETRIEVE, {"user_id": 1, "k": 51}, 413, "too_many", "k", "50"),
    (RETRIEVE, {"user_id": 1, "exclude": [*range(101)]}, 413, "too_many", "exclude", "100"),
    (ACTIONS, {"events": []}, 422, "invalid_request", "events", "at least 1"),
    (ACTIONS, {"events": [1]}, 422, "invalid_request", "events.0", "dictionary"),
    (ACTIONS, {"events": [event()] * 6}, 413, "too_many", "events", "5"),
    (ACTIONS, {"events": [event(), {"item_id": 2}]}, 422, "invalid_request", "events.1.user_id", "required"),
    (
        ACTIONS,
        {"events": [event(), event(actions=["buy"])]},
        422,
        "invalid_request",
        "events.1.actions",
        "click, like",
    ),
    (
        ACTIONS,
        {"events": [event(timestamp_ms=-1)]},
        422,
        "invalid_request",
        "events.0.timestamp_ms",
        "0",
    ),
    (
        ACTIONS,
        {"events": [event(timestamp_ms=FAR)]},
        422,
        "invalid_request",
        "events.0.timestamp_ms",
        "ahead",
    ),
    (ACTIONS, {"events": [event(surprise=1)]}, 422, "invalid_request", "events.0.surprise", ""),
]


@pytest.mark.parametrize(("path", "body", "status", "kind", "field", "word"), BAD)
def test_a_bad_request_is_told_which_field_is_wrong_and_why(
    client: TestClient,
    backend: FakeBackend,
    path: str,
    body: Any,
    status: int,
    kind: str,
    field: str | None,
    word: str,
) -> None:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert error["type"] == kind
    if field is not None:
        assert error["field"] == field
    assert word in error["message"]
    assert "Retry-After" not in answer.headers
    assert backend.sent == [], "nothing of a refused request may reach the log"


def test_scores_come_in_the_order_of_the_candidates_and_say_what_they_are_from(client: TestClient) -> None:
    answer = client.post(RANK, json={"user_id": "eve", "candidates": [20, {"item_id": "3"}]}).json()
    assert answer["user_id"] == "eve"
    assert answer["version"] == 4
    assert answer["history_length"] == 3
    assert answer["position"] == {"partition": 3, "offset": 77}
    assert [r["item_id"] for r in answer["results"]] == [20, 3]
    assert [r["known"] for r in answer["results"]] == [False, True]
    assert answer["results"][0]["scores"] == pytest.approx({"click": 0.02, "like": 0.98})


@pytest.mark.parametrize("actions", [("click",), ("click", "like", "buy")])
def test_scores_are_named_by_the_version_that_gave_them_whatever_is_configured(
    client: TestClient, backend: FakeBackend, actions: tuple[str, ...]
) -> None:
    backend.actions = actions
    answer = client.post(RANK, json={"user_id": 1, "candidates": [20]}).json()
    assert tuple(answer["results"][0]["scores"]) == actions


def test_a_user_nobody_has_seen_is_ranked_for_without_history(client: TestClient) -> None:
    answer = client.post(RANK, json={"user_id": 404, "candidates": [1]})
    assert answer.status_code == 200
    assert answer.json()["history_length"] == 0


def test_context_and_item_features_reach_the_scorer_in_the_columns_of_training(
    client: TestClient, backend: FakeBackend
) -> None:
    candidates = [{"item_id": 1, "item_features": {"genre": "noir"}}, 2]
    body = {"user_id": 1, "candidates": candidates, "context": {"place": 9}, "at_ms": 55}
    assert client.post(RANK, json=body).status_code == 200
    place = key_of(feature_namespace("context.place"), 9)
    genre = key_of(feature_namespace("item.genre"), "noir")
    assert backend.features is not None
    assert backend.features.tolist() == [[place, genre], [place, ABSENT]]
    assert backend.at_ms == 55
    assert client.post(RETRIEVE, json={"user_id": 1, "context": {"place": 9}, "at_ms": 66}).status_code == 200
    assert backend.context is not None
    assert backend.context.tolist() == [place]
    assert backend.at_ms == 66


def test_large_ids_survive_a_javascript_client_as_strings(client: TestClient) -> None:
    big = 2**53 + 1
    body = {"user_id": str(big), "candidates": [str(-big)], "ids_as_strings": True}
    answer = client.post(RANK, json=body).json()
    assert answer["user_id"] == str(big)
    assert answer["results"][0]["item_id"] == str(-big)
    assert client.post(RANK, json=body | {"ids_as_strings": False}).json()["user_id"] == big
    found = client.post(RETRIEVE, json={"user_id": 1, "ids_as_strings": True}).json()
    assert [r["item_id"] for r in found["results"]] == ["a/b", str(2**60)]


def test_retrieval_leaves_out_what_it_is_asked_to(client: TestClient, backend: FakeBackend) -> None:
    body = {"user_id": "eve", "k": 1, "exclude": [5, "x"], "exclude_history": True}
    answer = client.post(RETRIEVE, json=body).json()
    assert answer["results"] == [{"item_id": "a/b", "score": 2.0}]
    assert backend.exclude is not None
    excluded = [key_of(Namespace.ITEM, i) for i in (5, "x", 5, "a/b", -3)]
    assert backend.exclude.tolist() == excluded


def test_posted_events_are_acknowledged_one_by_one(client: TestClient, backend: FakeBackend) -> None:
    answer = client.post(ACTIONS, json={"events": [event(), event(user_id="x", context={"place": 3})]})
    assert answer.json() == {"results": [{"partition": 1, "offset": 0}, {"partition": 1, "offset": 1}]}
    assert [e.user_id for e in backend.sent] == [1, "x"]


def test_a_history_is_shown_with_its_ids_and_actions(client: TestClient, backend: FakeBackend) -> None:
    answer = client.get("/v1/users/eve/history").json()
    assert answer["history_length"] == 3
    assert answer["events"][1] == {"item_id": "a/b", "actions": ["like"], "timestamp_ms": 20}
    assert answer["events"][2] == {"item_id": -3, "actions": ["click", "like"], "timestamp_ms": 30}
    backend.histories["a/b"] = history([(1, 1, 1)])
    assert client.get("/v1/users/a%2Fb/history").json()["history_length"] == 1
    assert client.get("/v1/users/-7/history?ids_as_strings=true").json()["user_id"] == "-7"


def test_a_user_is_forgotten_by_its_canonical_id(client: TestClient, backend: FakeBackend) -> None:
    answer = client.delete("/v1/users/7")
    assert answer.status_code == 202
    assert answer.json() == {"user_id": 7, "partition": 2, "offset": 9}
    assert client.delete("/v1/users/a%2Fb?ids_as_strings=true").json()["user_id"] == "a/b"
    assert client.delete("/v1/users/history").status_code == 202
    assert backend.forgotten == [7, "a/b", "history"]


def test_a_user_is_not_forgotten_while_the_log_is_away(client: TestClient, backend: FakeBackend) -> None:
    backend.broken = raising(Unavailable("broker_unavailable", "away", acknowledged=[None]))
    answer = client.delete("/v1/users/7")
    assert (answer.status_code, error_of(answer)["type"]) == (503, "broker_unavailable")
    assert "Retry-After" in answer.headers


def test_the_model_says_what_it_has_learned_from(client: TestClient) -> None:
    answer = client.get("/v1/model").json()
    assert answer["version"] == 4
    assert answer["positions"] == {"0": [[0, 10]], "1": [[0, 3], [5, 6]]}
    assert answer["newest_event_ms"] == 123
    assert 5000 <= answer["age_ms"] < 60_000


def test_health_and_documentation_are_served(client: TestClient) -> None:
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").json()["ready"] is True
    assert "grstream" in client.get("/docs").text
    paths = client.get("/openapi.json").json()["paths"]
    assert paths.keys() >= {RANK, RETRIEVE, ACTIONS, "/v1/model", "/healthz", "/readyz"}


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v2/rank", 404), ("GET", RANK, 405)])
def test_a_wrong_path_or_method_is_a_typed_error_too(
    client: TestClient, method: str, path: str, status: int
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    error_of(answer)


def raising(error: BaseException) -> Callable[[], Any]:
    async def fail() -> None:
        raise error

    return fail


async def hang() -> None:

    await asyncio.sleep(30)


@pytest.mark.parametrize(
    ("broken", "status", "kind"),
    [
        (raising(Unavailable("scorer_unavailable", "died")), 503, "scorer_unavailable"),
        (raising(EngineNotReady("no weights")), 503, "not_ready"),
        (hang, 503, "timeout"),
        (raising(NonFiniteScores("nan")), 500, "unusable_weights"),
        (raising(KeyError("a bug")), 500, "internal"),
    ],
)
def test_what_fails_behind_the_gateway_is_a_typed_error_and_503_only_where_later_may_help(
    client: TestClient, backend: FakeBackend, broken: Callable[[], Any], status: int, kind: str
) -> None:
    backend.broken = broken
    answers = [
        client.post(RANK, json={"user_id": 1, "candidates": [1]}),
        client.get("/v1/users/1/history"),
        client.get("/v1/model"),
    ]
    for answer in answers:
        assert answer.status_code == status
        assert error_of(answer)["type"] == kind
        assert ("Retry-After" in answer.headers) == (status == 503)


def test_a_failed_post_says_which_events_are_in_the_log(client: TestClient, backend: FakeBackend) -> None:
    known = [Appended(partition=0, offset=8), None]
    backend.broken = raising(Unavailable("broker_unavailable", "away", acknowledged=known))
    answer = client.post(ACTIONS, json={"events": [event(), event()]})
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"
    assert error_of(answer)["acknowledged"] == [{"partition": 0, "offset": 8}, None]


def test_a_server_that_is_not_ready_says_what_it_waits_for(client: TestClient, backend: FakeBackend) -> None:
    backend.broken = raising(KeyError())
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "weights" in error_of(answer)["message"]
    assert client.get("/healthz").status_code == 200
