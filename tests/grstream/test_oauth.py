"""Tokens come by the client-credentials grant and are used for most of their life; or it is told why not."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from grstream.config import KAFKA_OAUTH_SECRET_VARIABLE, OAuthConfig
from grstream.oauth import TokenSource
from grstream.refusals import Refused
from tests.security.certificates import Authority
from tests.security.token_endpoint import CLIENT, SECRET, TokenEndpoint, serving


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def endpoint(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenEndpoint]:
    monkeypatch.setenv(KAFKA_OAUTH_SECRET_VARIABLE, SECRET)
    with serving(authority.sign("endpoint", ["127.0.0.1"])) as started:
        yield started


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock's time, as its one element."""
    now = [1000.0]
    monkeypatch.setattr("grstream.oauth.time.monotonic", lambda: now[0])
    return now


def source(endpoint: TokenEndpoint, authority: Authority, **fields: Any) -> TokenSource:
    known = {"token_url": endpoint.url, "client_id": CLIENT, "ca_file": authority.ca_file}
    return TokenSource(OAuthConfig(**{**known, **fields}))


def test_a_token_is_kept_for_most_of_its_life(
    endpoint: TokenEndpoint, authority: Authority, clock: list[float]
) -> None:
    tokens = source(endpoint, authority, scope="read write", extensions={"logicalCluster": "lkc-1"})
    assert tokens.token().count(".") == 2
    clock[0] += 0.79 * endpoint.life_s
    tokens.token()
    assert endpoint.asked == [{"grant_type": "client_credentials", "scope": "read write"}]
    clock[0] += 0.02 * endpoint.life_s
    tokens.token()
    assert len(endpoint.asked) == 2
    assert tokens.extensions() == {"logicalCluster": "lkc-1"}


def test_a_token_that_does_not_say_how_long_it_lives_is_used_once(
    endpoint: TokenEndpoint, authority: Authority
) -> None:
    endpoint.answer = (200, b'{"access_token": "abc"}')
    tokens = source(endpoint, authority)
    assert tokens.token() == tokens.token() == "abc"
    assert len(endpoint.asked) == 2


def test_the_clients_secret_is_read_anew_from_its_file(
    endpoint: TokenEndpoint, authority: Authority, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KAFKA_OAUTH_SECRET_VARIABLE)
    path = tmp_path / "secret"
    path.write_text("not yet")
    tokens = source(endpoint, authority, client_secret_file=path)
    with pytest.raises(Refused, match=r"HTTP 401 \(invalid_client\); check kafka\.security\.oauth") as failed:
        tokens.token()
    assert "not yet" not in str(failed.value)
    path.write_text(f"{SECRET}\n")
    assert tokens.token()
    with pytest.raises(Refused, match=r"client_secret_file, or GRSTREAM_KAFKA_OAUTH_SECRET"):
        source(endpoint, authority).token()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (503, "try later: s3cr3t", r"HTTP 503; check"),
        (302, "", r"HTTP 302; check"),
        (400, json.dumps({"error": "invalid_scope", "error_description": "s3cr3t"}), r"\(invalid_scope\)"),
        (400, json.dumps({"error": "s3cr3t !"}), r"HTTP 400; check"),
        (200, "s3cr3t", "answered with no token"),
        (200, json.dumps({"token": "s3cr3t"}), "access_token: Field required"),
        (200, json.dumps({"access_token": "s3cr3t\u0001auth=x"}), "access_token: String should match"),
    ],
)
def test_an_answer_without_a_token_is_told_and_not_quoted(
    status: int, body: str, told: str, endpoint: TokenEndpoint, authority: Authority
) -> None:
    endpoint.answer = (status, body.encode())
    with pytest.raises(Refused, match=told) as failed:
        source(endpoint, authority).token()
    assert "s3cr3t" not in str(failed.value)


def test_an_endpoint_that_is_not_trusted_or_not_there_is_told(
    endpoint: TokenEndpoint, authority: Authority, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(Refused, match=r"is not trusted.*kafka\.security\.oauth\.ca_file"):
        source(endpoint, authority, ca_file=Authority(tmp_path).ca_file).token()
    with pytest.raises(Refused, match=r"no token within 5000 ms \(ConnectionRefusedError.*token_url"):
        source(endpoint, authority, token_url="https://127.0.0.1:9/token").token()
    with pytest.raises(Refused, match=r"kafka\.security\.oauth\.ca_file, \S+/absent: .*No such file"):
        source(endpoint, authority, ca_file=tmp_path / "absent").token()
    assert endpoint.asked == []
