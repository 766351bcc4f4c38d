"""What Kafka's security needs is asked for, and no secret is written or shown."""

import pathlib
from typing import Any

import pytest

from grstream.config import (
    KAFKA_PASSWORD_VARIABLE,
    ConfigError,
    KafkaSecurityConfig,
    kafka_password,
    load,
    parse,
)

SCRAM = {"protocol": "SASL_SSL", "mechanism": "SCRAM-SHA-512", "username": "ann", "password_file": "p"}
OAUTH = {"token_url": "https://auth.example/token", "client_id": "c", "client_secret_file": "s"}


@pytest.mark.parametrize(
    ("security", "told"),
    [
        ({"protocol": "TLS"}, r"kafka\.security\.protocol: Input should be 'PLAINTEXT', 'SSL'"),
        ({"protocol": "SASL_SSL"}, "SASL_SSL needs a mechanism: PLAIN, SCRAM-SHA-256"),
        ({**SCRAM, "username": None}, "SCRAM-SHA-512 needs a username"),
        ({**SCRAM, "oauth": OAUTH}, "oauth belongs to mechanism: OAUTHBEARER, and it is SCRAM-SHA-512"),
        ({"protocol": "SASL_SSL", "mechanism": "OAUTHBEARER"}, "OAUTHBEARER needs oauth, with token_url"),
        (
            {**SCRAM, "mechanism": "OAUTHBEARER", "oauth": OAUTH},
            r"username, password_file belong to PLAIN and SCRAM; OAUTHBEARER has oauth\.client_id",
        ),
        ({"mechanism": "PLAIN", "username": "ann"}, "mechanism, username belong to protocol: SASL_SSL or"),
        ({"protocol": "SSL", "password_file": "p"}, "password_file belong to protocol: SASL_SSL"),
        ({"ca_file": "ca.pem"}, "ca_file belong to protocol: SSL or SASL_SSL, and it is PLAINTEXT"),
        ({"check_hostname": False}, "check_hostname belong to protocol: SSL"),
        ({"protocol": "SSL", "key_file": "k"}, "give its cert_file"),
        ({"protocol": "SSL", "key_password_file": "k"}, "give its cert_file"),
        (
            {
                "protocol": "SASL_SSL",
                "mechanism": "OAUTHBEARER",
                "oauth": {**OAUTH, "token_url": "http://a/t"},
            },
            r"security\.oauth\.token_url: String should match pattern '\^https",
        ),
        ({**SCRAM, "password": "hunter2"}, r"kafka\.security\.password"),
    ],
)
def test_what_is_missing_or_too_much_is_named(security: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as failed:
        parse({"storage": "x", "events": {"actions": ["click"]}, "kafka": {"security": security}})
    assert "hunter2" not in str(failed.value)
    assert "hunter2" not in str(failed.value.__cause__), "a traceback shows the cause, too"


@pytest.mark.parametrize(
    "security",
    [
        {},
        {"protocol": "SSL"},
        {"protocol": "SSL", "ca_file": "ca", "cert_file": "c", "key_file": "k", "key_password_file": "p"},
        SCRAM,
        {**SCRAM, "password_file": None},
        {**SCRAM, "protocol": "SASL_PLAINTEXT", "mechanism": "PLAIN"},
        {"protocol": "SASL_SSL", "mechanism": "OAUTHBEARER", "oauth": OAUTH},
    ],
)
def test_what_is_whole_is_accepted(security: dict[str, Any]) -> None:
    KafkaSecurityConfig.model_validate(security)


def test_files_are_found_from_where_the_configuration_was_loaded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(
        "{storage: s, events: {actions: [a]}, kafka: {security: {protocol: SASL_SSL, ca_file: /ca.pem, "
        "mechanism: OAUTHBEARER, oauth: {token_url: 'https://a/t', client_id: c, client_secret_file: s}}}}"
    )
    security = load("x.yaml").kafka.security
    assert security.ca_file == pathlib.Path("/ca.pem")
    assert security.oauth is not None
    assert security.oauth.client_secret_file == tmp_path / "s"


def test_a_password_is_read_anew_and_the_environments_comes_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KAFKA_PASSWORD_VARIABLE, raising=False)
    path = tmp_path / "password"
    config = KafkaSecurityConfig.model_validate({**SCRAM, "password_file": path})
    for password in (" first ", "second"):
        path.write_text(f"{password}\n")
        assert kafka_password(config).get_secret_value() == password
    monkeypatch.setenv(KAFKA_PASSWORD_VARIABLE, "third")
    assert kafka_password(config).get_secret_value() == "third"
    assert "third" not in repr(kafka_password(config))
    monkeypatch.setenv(KAFKA_PASSWORD_VARIABLE, "")
    with pytest.raises(ConfigError, match="GRSTREAM_KAFKA_PASSWORD is empty"):
        kafka_password(config)


@pytest.mark.parametrize(("content", "told"), [(b"\n", "is empty"), (b"\xff\xfe", "it is not UTF-8")])
def test_a_file_without_a_password_is_named(
    content: bytes, told: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KAFKA_PASSWORD_VARIABLE, raising=False)
    path = tmp_path / "password"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"password_file, {path}.* {told}"):
        kafka_password(KafkaSecurityConfig.model_validate({**SCRAM, "password_file": path}))
