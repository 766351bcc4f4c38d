"""Whatever is sent, the answer is one that the OpenAPI knows, and a 5xx only where later may help."""

import json
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from grstream.keys import INT64_MAX, INT64_MIN
from serve.gateway import create_app
from tests.serve.fake import CONFIG, FakeBackend

POSTS = [
    "/v1/rank",
    "/v1/retrieve",
    "/v1/recommend",
    "/v1/batch/rank",
    "/v1/batch/retrieve",
    "/v1/batch/recommend",
    "/v1/actions",
]
APP = create_app(CONFIG, FakeBackend())
CLIENT = TestClient(APP, raise_server_exceptions=False)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)


def judged(answer: Any) -> dict[str, Any]:
    """The body of an answer that is fit for a client."""
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    body = json.loads(answer.content, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    if answer.status_code >= 400:
        headers = {name.lower(): value for name, value in answer.headers.items()}
        request_id = headers["x-request-id"]
        request_id = request_id if isinstance(request_id, str) else request_id[0]
        assert body["error"]["type"]
        assert body["error"]["request_id"] == request_id
    return body


@SCHEMA.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_made_from_the_schema_breaks_the_server(case: schemathesis.Case) -> None:
    answer = case.call()
    if "json" in answer.headers.get("content-type", [""])[0]:
        judged(answer)
    checks = [response_schema_conformance, content_type_conformance]
    if answer.status_code not in (404, 405):  # of routing, before any operation
        checks.append(status_code_conformance)
    case.validate_response(answer, checks=checks)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()  # NaN and the infinities are spelt as Python does
    | st.text()
    | st.sampled_from(
        [2**53 + 1, INT64_MAX, INT64_MAX + 1, INT64_MIN, INT64_MIN - 1, 10**400, "", "0", "-0"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    *("user_id", "candidates", "context", "at_ms", "history", "min_offset", "token", "k", "exclude", "allow"),
    *("explain", "ids_as_strings", "exclude_history", "events", "requests"),
]


@pytest.mark.parametrize("path", POSTS)
@settings(max_examples=60, deadline=None)
@given(changed=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3))
def test_no_field_of_any_kind_breaks_the_server(path: str, changed: dict[str, Any]) -> None:
    good: dict[str, Any] = {"user_id": 1}
    if path.endswith("rank"):
        good["candidates"] = [1, 2]
    if path.endswith("actions"):
        good = {"events": [{"user_id": 1, "item_id": 2, "actions": [], "timestamp_ms": 3}]}
    if "batch" in path:
        good = {"requests": [good | changed]}
    content = json.dumps(good | changed)
    judged(CLIENT.post(path, content=content, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("path", POSTS)
@settings(max_examples=40, deadline=None)
@given(body=st.binary(max_size=200), kind=st.sampled_from(["application/json", "text/plain", 'a/b; c="', ""]))
def test_no_bytes_under_any_content_type_break_the_server(path: str, body: bytes, kind: str) -> None:
    answer = CLIENT.post(path, content=body, headers={"content-type": kind})
    assert 400 <= answer.status_code < 500
    judged(answer)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("body", "statuses"),
    [
        (b" " * 10_000_000, {413}),
        (b'{"user_id": "' + b"x" * 10_000_000 + b'"}', {413}),
        (b"[" * 100_000 + b"]" * 100_000, {400, 422}),
        (b'{"a":' * 100_000, {400}),
        (b'{"user_id": NaN, "candidates": [NaN]}', {400, 422}),
        (b'{"user_id": 1' + b"0" * 5000 + b', "candidates": [1]}', {400, 422}),
        (b'{"user_id": 1, "context": {"place": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}}", {400, 422}),
    ],
    ids=["blank-10MB", "string-10MB", "deep", "unclosed", "nan", "long-number", "deep-field"],
)
def test_what_is_too_large_deep_or_no_number_is_refused(path: str, body: bytes, statuses: set[int]) -> None:
    answer = CLIENT.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in statuses, answer.text
    judged(answer)


@pytest.mark.parametrize("number", [2**53, 2**53 + 1, INT64_MAX, INT64_MIN, -(2**53) - 1])
def test_ids_up_to_the_edges_of_int64_come_back_as_they_were(number: int) -> None:
    for given_as in (number, str(number)):
        body = {"user_id": given_as, "candidates": [given_as]}
        answer = judged(CLIENT.post("/v1/rank", json=body))
        assert (answer["user_id"], answer["results"][0]["item_id"]) == (number, number)
    for beyond in (INT64_MAX + 1, INT64_MIN - 1):
        answer = CLIENT.post("/v1/rank", json={"user_id": beyond, "candidates": [1]})
        assert answer.status_code == 422
        spelt = judged(CLIENT.post("/v1/rank", json={"user_id": str(beyond), "candidates": [1]}))
        assert spelt["user_id"] == str(beyond), "a string that is no int64 is a name"
