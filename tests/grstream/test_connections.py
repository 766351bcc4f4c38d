"""What clients are given to prove themselves by, and what of it is logged."""

import gc
import logging
import os
import pathlib
import socket
import threading
from collections.abc import Callable

import numpy as np
import pytest
from kafka.protocol.sasl import SaslAuthenticateRequest

from grstream.config import KAFKA_PASSWORD_VARIABLE, KafkaConfig, KafkaSecurityConfig
from grstream.connections import Credentials, opening
from grstream.kafka import BrokerUnavailable, consumer, partition_count, producer


@pytest.fixture(autouse=True)
def _no_password_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KAFKA_PASSWORD_VARIABLE, raising=False)


@pytest.fixture
def password_file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "password"
    path.write_text("hunter2")
    return path


def sasl(mechanism: str, username: str, password_file: pathlib.Path) -> KafkaSecurityConfig:
    return KafkaSecurityConfig.model_validate(
        {
            **{"protocol": "SASL_PLAINTEXT", "mechanism": mechanism},
            **{"username": username, "password_file": password_file},
        }
    )


def test_a_plaintext_client_is_told_nothing_of_security() -> None:
    with opening(KafkaSecurityConfig()) as given:
        assert given.keys() == {"kafka_client"}


@pytest.mark.parametrize("client", [consumer, producer, partition_count])
@pytest.mark.parametrize("secured", [False, True])
def test_a_client_that_finds_no_broker_leaves_nothing_behind(
    client: Callable, secured: bool, password_file: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "kafka")  # what is captured holds errors, and these their sockets
    security = sasl("PLAIN", "ann", password_file) if secured else KafkaSecurityConfig()
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        config = KafkaConfig(bootstrap_servers=[address], request_timeout_ms=200, security=security)
        counts, attempts = [], 6
        for _ in range(attempts):
            with pytest.raises(BrokerUnavailable):
                client(config)
            gc.collect()  # what the exception's frames held
            counts.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))
        # Each attempt would leave one or more; other tests' threads may come and go meanwhile.
        grown = np.subtract(counts[-1], counts[0])
        assert (grown < attempts - 1).all(), counts


def test_options_hold_no_secret(password_file: pathlib.Path) -> None:
    with opening(sasl("PLAIN", "ann", password_file)) as given:
        assert "hunter2" not in repr(given)
    assert given["security_protocol"] == "SASL_PLAINTEXT"
    assert given["sasl_mechanism"] == "PLAIN"


def test_credentials_are_those_of_now(password_file: pathlib.Path) -> None:
    credentials = Credentials(sasl("PLAIN", "ann", password_file))
    assert credentials.sasl()["sasl_plain_password"] == "hunter2"
    password_file.write_text("hunter3")
    assert credentials.sasl()["sasl_plain_password"] == "hunter3"


@pytest.mark.parametrize(
    ("mechanism", "sent"),
    [("PLAIN", "a,b=c"), ("SCRAM-SHA-256", "a=2Cb=3Dc"), ("SCRAM-SHA-512", "a=2Cb=3Dc")],
)
def test_scram_has_its_own_spelling_of_commas_and_equals_signs(
    mechanism: str, sent: str, password_file: pathlib.Path
) -> None:
    assert Credentials(sasl(mechanism, "a,b=c", password_file)).sasl()["sasl_plain_username"] == sent


def test_frames_and_credentials_are_not_logged_and_the_rest_is(
    password_file: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opening(sasl("PLAIN", "ann", password_file)):
        pass
    caplog.set_level(logging.DEBUG)
    connection, parser = logging.getLogger("kafka.net.connection"), logging.getLogger("kafka.protocol.parser")
    connection.debug("%s Request %d: %s", "it", 1, SaslAuthenticateRequest(b"hunter2"))
    parser.debug("%s Send: %s", "it", bytearray(b"hunter2"))
    parser.debug("%s Send: %s", "it", b"hunter2")
    connection.debug("%s: Connection made", "it")
    assert [record.getMessage() for record in caplog.records] == ["it: Connection made"]
