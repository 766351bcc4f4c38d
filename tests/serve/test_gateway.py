import asyncio
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

import grstream
from grstream.api import Appended, place_of, token_of
from grstream.config import ConfigError, parse
from grstream.events import EventDecoder
from grstream.histories import RollingHistories
from grstream.keys import ABSENT, Namespace, feature_namespace, key_of
from grstream.scores import DeadlineExceeded, EngineNotReady, EngineStopped, NonFiniteScores
from grstream.tail import TailBehind
from serve.errors import Unavailable
from serve.gateway import create_app
from tests.serve.fake import CONFIG, FakeBackend, history


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
    results = answer.json()["results"]
    assert [(r["partition"], r["offset"]) for r in results] == [(1, 0), (1, 1)]
    assert [place_of(r["token"]) for r in results] == [(1, 0), (1, 1)]
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
        (raising(EngineStopped("ended")), 503, "scorer_unavailable"),
        (raising(DeadlineExceeded("late")), 503, "timeout"),
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
    acknowledged = error_of(answer)["acknowledged"]
    assert acknowledged == [{"partition": 0, "offset": 8, "token": token_of(0, 8)}, None]


def test_a_server_that_is_not_ready_says_what_it_waits_for(client: TestClient, backend: FakeBackend) -> None:
    backend.broken = raising(KeyError())
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "weights" in error_of(answer)["message"]
    assert client.get("/healthz").status_code == 200


RECOMMEND, BATCH = "/v1/recommend", "/v1/batch/"


def test_recommendations_are_ordered_by_the_weighted_sum_and_tell_each_probability(
    client: TestClient, backend: FakeBackend
) -> None:
    body = {"user_id": "eve", "k": 2, "exclude": [9], "exclude_history": True, "allow": [7, "a/b"]}
    answer = client.post(RECOMMEND, json=body | {"context": {"place": 9}, "at_ms": 66}).json()
    assert answer["results"] == [
        {"item_id": "a/b", "score": 1.25, "scores": {"click": 0.5, "like": 0.75}},
        {"item_id": 2**60, "score": 0.375, "scores": {"click": 0.25, "like": 0.125}},
    ]
    assert answer["version"] == 4
    assert backend.allow is not None
    assert backend.exclude is not None
    assert backend.allow.tolist() == [key_of(Namespace.ITEM, i) for i in (7, "a/b")]
    assert backend.exclude.tolist() == [key_of(Namespace.ITEM, i) for i in (9, 5, "a/b", -3)]
    assert backend.at_ms == 66
    assert backend.weights == (("click", 1.0), ("like", 1.0))
    assert backend.brought is False
    assert client.post(RETRIEVE, json={"user_id": "eve"}).status_code == 200
    assert backend.allow is None


def test_weights_of_actions_that_are_not_configured_are_refused() -> None:
    given = {"storage": "x", "events": {"actions": ["click", "like"]}}
    config = parse(given | {"serve": {"recommend_weights": {"like": -2.5}}})
    assert [config.serve.weight(a) for a in ("click", "like")] == [1.0, -2.5]
    with pytest.raises(ConfigError, match=r"serve.recommend_weights names buy"):
        parse(given | {"serve": {"recommend_weights": {"buy": 1}}})


past_events = st.lists(
    st.fixed_dictionaries(
        {
            "item_id": st.integers(-5, 5) | st.sampled_from(["a", "b/c"]),
            "actions": st.lists(st.sampled_from(["click", "like"]), unique=True),
            "timestamp_ms": st.integers(0, 1000),
        },
        optional={
            "context": st.fixed_dictionaries({"place": st.integers(0, 3)}),
            "item_features": st.fixed_dictionaries({"genre": st.sampled_from(["noir", "x"])}),
        },
    ),
    max_size=30,
)
TIGHT = CONFIG.model_copy(
    update={
        "histories": CONFIG.histories.model_copy(update={"window": 7, "chunk": 3, "lateness_ms": 200}),
        "serve": CONFIG.serve.model_copy(update={"max_history": 30}),
    }
)
TIGHT_BACKEND = FakeBackend()
TIGHT_CLIENT = TestClient(create_app(TIGHT, TIGHT_BACKEND), raise_server_exceptions=False)


@given(past_events)
def test_a_history_that_a_request_brings_is_what_the_log_would_have_made_of_it(events: list[Any]) -> None:
    TIGHT_BACKEND.asked.clear()
    TIGHT_BACKEND.brought = None
    client = TIGHT_CLIENT
    body = {"user_id": "eve", "history": events, "explain": True}
    answers = [
        client.post(RANK, json=body | {"candidates": [1]}),
        client.post(RETRIEVE, json=body),
        client.post(RECOMMEND, json=body),
    ]
    log = [json.dumps({"user_id": "eve", **e}).encode() for e in events]
    decoded = EventDecoder(TIGHT.events).decode(0, range(len(log)), log, [-1] * len(log))
    histories = RollingHistories(TIGHT.histories, features=2)
    histories.append(decoded.batch)
    expected = histories.history(key_of(Namespace.USER, "eve"))
    assert TIGHT_BACKEND.brought
    assert TIGHT_BACKEND.user == key_of(Namespace.USER, "eve"), "for the arm of an A/B test"
    for answer, asked in zip(answers, TIGHT_BACKEND.asked, strict=True):
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["history_length"] == len(expected.items)
        assert told["position"] is None
        assert told["history_source"] == "request"
        assert told["explain"]["position"] is None
        assert told["explain"]["epoch"] == expected.epoch
        for column in ("items", "actions", "times", "features"):
            assert np.array_equal(getattr(asked, column), getattr(expected, column)), column


@pytest.mark.parametrize(
    ("past", "field", "word"),
    [
        ({"actions": ["buy"]}, "history.1.actions", "click, like"),
        ({"timestamp_ms": FAR}, "history.1.timestamp_ms", "ahead"),
        ({"timestamp_ms": -1}, "history.1.timestamp_ms", "0"),
        ({"context": {"colour": 1}}, "history.1.context.colour", "place"),
        ({"item_id": 1.5}, "history.1.item_id", "float"),
        ({"user_id": 3}, "history.1.user_id", "not permitted"),
    ],
)
def test_a_wrong_event_of_a_history_is_named(
    client: TestClient, past: dict[str, Any], field: str, word: str
) -> None:
    good = {"item_id": 1, "actions": [], "timestamp_ms": 5}
    body = {"user_id": 1, "candidates": [1], "history": [good, good | past]}
    answer = client.post(RANK, json=body)
    assert answer.status_code == 422
    assert error_of(answer)["field"] == field
    assert word in error_of(answer)["message"]


def test_no_shard_is_asked_where_the_request_brings_the_history(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.broken = raising(Unavailable("history_shard_unavailable", "away"))
    body = {"user_id": "eve", "candidates": [1], "history": []}
    assert client.post(RANK, json=body).json()["history_length"] == 0
    assert client.post(RANK, json={"user_id": "eve", "candidates": [1]}).status_code == 503
    too_long = [{"item_id": 1, "actions": [], "timestamp_ms": 5}] * (CONFIG.serve.max_history + 1)
    answer = client.post(RANK, json=body | {"history": too_long})
    assert (answer.status_code, error_of(answer)["field"]) == (413, "history")


def test_an_answer_explains_itself_where_it_is_asked_to(client: TestClient) -> None:
    body = {"user_id": "eve", "candidates": [1]}
    assert client.post(RANK, json=body).json()["explain"] is None
    told = {"epoch": 0, "events": 3, "version": 4, "position": {"partition": 3, "offset": 77}}
    assert client.post(RANK, json=body | {"explain": True}).json()["explain"] == told | {
        "reuse": "miss",
        "tokens": 3,
        "cached_tokens": 1,
        "waited_ms": 0.5,
        "engine_ms": 2.0,
    }
    found = client.post(RETRIEVE, json={"user_id": "eve", "explain": True}).json()
    untold = dict.fromkeys(("tokens", "cached_tokens", "waited_ms", "engine_ms"))
    assert found["explain"] == told | {"reuse": "hit"} | untold


@pytest.mark.parametrize("stale", [False, True])
def test_an_answer_from_a_stale_history_says_so(
    client: TestClient, backend: FakeBackend, stale: bool
) -> None:
    backend.stale = stale
    body = {"user_id": "eve", "candidates": [1]}
    assert client.post(RANK, json=body).json()["stale"] is stale
    assert client.post(RECOMMEND, json={"user_id": "eve"}).json()["stale"] is stale
    assert client.get("/v1/users/eve/history").json()["stale"] is stale
    assert client.post(RANK, json=body | {"history": []}).json()["stale"] is False


def test_a_batch_answers_each_request_or_gives_it_its_own_error(client: TestClient) -> None:
    good, bad = {"user_id": "eve", "candidates": [20]}, {"user_id": "eve", "candidates": [1, 1]}
    answer = client.post(BATCH + "rank", json={"requests": [good, bad, {"user_id": 1}, good]})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [r["status"] for r in results] == [200, 422, 422, 200]
    alone = client.post(RANK, json=good).json()
    assert results[0] == results[3] == {"status": 200, "answer": alone, "error": None}
    assert [r["answer"] for r in results[1:3]] == [None, None]
    assert [r["error"]["field"] for r in results[1:3]] == ["candidates.1", "candidates"]
    for kind in ("retrieve", "recommend"):
        found = client.post(BATCH + kind, json={"requests": [{"user_id": "eve"}, {"user_id": 1, "k": 51}]})
        assert [r["status"] for r in found.json()["results"]] == [200, 413]
        assert (
            found.json()["results"][0]["answer"] == client.post(f"/v1/{kind}", json={"user_id": "eve"}).json()
        )
    many = client.post(BATCH + "rank", json={"requests": [good] * (CONFIG.serve.max_batch + 1)})
    assert (many.status_code, error_of(many)["field"]) == (413, "requests")


def test_requests_of_a_batch_are_answered_beside_each_other_and_a_bug_is_one_requests_own(
    client: TestClient, backend: FakeBackend
) -> None:
    waiting = 0

    async def all_there() -> None:
        nonlocal waiting
        waiting += 1
        number = waiting
        async with asyncio.timeout(0.15):
            while waiting < 3:
                await asyncio.sleep(0.001)
        if number == 2:
            raise KeyError("a bug")

    backend.broken = all_there
    good = {"user_id": "eve", "candidates": [20]}
    results = client.post(BATCH + "rank", json={"requests": [good] * 3}).json()["results"]
    assert [r["status"] for r in results] == [200, 500, 200]
    assert results[1]["error"]["type"] == "internal"


def test_an_answer_includes_what_its_request_names_or_is_a_409(
    client: TestClient, backend: FakeBackend
) -> None:
    token = token_of(3, 41)
    for path, body in [
        (RANK, {"user_id": "eve", "candidates": [1]}),
        (RETRIEVE, {"user_id": "eve"}),
        (RECOMMEND, {"user_id": "eve"}),
    ]:
        for asked, expected in [({}, None), ({"min_offset": 40}, 40), ({"token": token}, 41)]:
            assert client.post(path, json=body | asked).status_code == 200
            assert backend.min_offset == expected
        for wrong in ({"token": token_of(2, 41)}, {"token": "x" * 16}, {"token": "é"}, {"token": "a"}):
            answer = client.post(path, json=body | wrong)
            assert (answer.status_code, error_of(answer)["field"]) == (422, "token")
        assert client.post(path, json=body | {"token": token, "min_offset": 1}).status_code == 422
        assert client.post(path, json=body | {"token": token, "history": []}).status_code == 422
    shown = client.get(f"/v1/users/eve/history?token={token}")
    assert (shown.status_code, backend.min_offset) == (200, 41)
    assert client.get("/v1/users/eve/history?min_offset=7").status_code == 200
    assert backend.min_offset == 7
    assert client.get("/v1/users/eve/history?token=x").status_code == 422
    backend.broken = raising(TailBehind("partition 3 is read up to 40"))
    for answer in (
        client.post(RANK, json={"user_id": "eve", "candidates": [1], "token": token}),
        client.get(f"/v1/users/eve/history?token={token}"),
    ):
        assert (answer.status_code, error_of(answer)["type"]) == (409, "not_yet_visible")


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1))
def test_a_token_is_the_place_it_was_made_from(partition: int, offset: int) -> None:
    assert place_of(token_of(partition, offset)) == (partition, offset)


def test_an_image_has_the_project_on_its_path_and_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", missing)
    assert create_app(CONFIG, FakeBackend()).version == grstream.__version__
