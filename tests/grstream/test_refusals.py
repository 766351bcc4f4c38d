"""Broker and client that do not accept each other say so at once; here without a broker."""

import contextlib
import pathlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import kafka.errors
import pytest

from grstream.config import KafkaConfig, KafkaSecurityConfig
from grstream.kafka import AuthenticationFailed, BrokerUnavailable, consumer, producer, reaching
from grstream.refusals import refusal
from tests.security.certificates import Authority, Signed

TIMEOUT_MS = 8_000
AT_ONCE_S = 4.0


@contextlib.contextmanager
def listening(certificate: Signed | None, ca_file: pathlib.Path | None = None) -> Iterator[str]:
    """A server that shakes hands and says nothing more; without a certificate not even that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate:
        context.load_cert_chain(certificate.cert_file, certificate.key_file)
    if ca_file:
        context.load_verify_locations(ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as held:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                held.callback(client.close)
                if not certificate:
                    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    continue
                # Kept open where the handshake fails: a reset could overtake the alert that says why.
                wrapped = context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
                held.callback(wrapped.close)
                with contextlib.suppress(OSError):
                    wrapped.do_handshake()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def client_of(address: str, **security: Any) -> KafkaConfig:
    return KafkaConfig(
        bootstrap_servers=[address],
        request_timeout_ms=TIMEOUT_MS,
        security=KafkaSecurityConfig(**{"protocol": "SSL", **security}),
    )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.mark.parametrize("client", [consumer, producer])
def test_a_broker_that_nobody_known_vouches_for_is_refused_at_once(
    client: Any, authority: Authority, tmp_path: pathlib.Path
) -> None:
    strangers = Authority(tmp_path)
    with listening(strangers.sign("broker", ["127.0.0.1"])) as address:
        began = time.monotonic()
        with pytest.raises(AuthenticationFailed, match=rf"{address}: its certificate is not trusted"):
            client(client_of(address, ca_file=authority.ca_file))
        assert time.monotonic() - began < AT_ONCE_S


def test_a_certificate_of_another_host_is_refused_at_once_unless_that_is_not_checked(
    authority: Authority,
) -> None:
    with listening(authority.sign("another", ["another.example"])) as address:
        began = time.monotonic()
        with pytest.raises(AuthenticationFailed, match=r"another host's.*kafka\.bootstrap_servers"):
            consumer(client_of(address, ca_file=authority.ca_file))
        assert time.monotonic() - began < AT_ONCE_S
        unchecked = client_of(address, ca_file=authority.ca_file, check_hostname=False)
        with pytest.raises(BrokerUnavailable) as silent:
            consumer(unchecked.model_copy(update={"request_timeout_ms": 1000}))
        assert not isinstance(silent.value, AuthenticationFailed), "the server is trusted and says nothing"


def test_a_broker_that_wants_a_certificate_says_so_at_once(authority: Authority) -> None:
    with listening(authority.sign("wanting", ["127.0.0.1"]), authority.ca_file) as address:
        began = time.monotonic()
        with pytest.raises(AuthenticationFailed, match=r"ended the TLS handshake.*cert_file"):
            consumer(client_of(address, ca_file=authority.ca_file))
        assert time.monotonic() - began < AT_ONCE_S


def test_a_listener_without_tls_is_told(authority: Authority) -> None:
    with (
        listening(None) as address,
        pytest.raises(AuthenticationFailed, match=r"does not speak TLS; check.*kafka\.security\.protocol"),
    ):
        consumer(client_of(address, ca_file=authority.ca_file))


@pytest.mark.parametrize(
    ("security", "told"),
    [
        ({"ca_file": "absent.pem"}, r"kafka\.security\.ca_file, \S*absent\.pem: .*No such file"),
        (
            {"cert_file": "absent.pem"},
            r"certificate cannot be loaded; check kafka\.security\.cert_file, key_file",
        ),
        (
            {
                **{"protocol": "SASL_SSL", "mechanism": "PLAIN", "username": "ann"},
                "password_file": "absent",
            },
            r"cannot read kafka\.security\.password_file, \S*absent: No such file",
        ),
        (
            {"protocol": "SASL_PLAINTEXT", "mechanism": "SCRAM-SHA-256", "username": "ann"},
            r"set kafka\.security\.password_file, or GRSTREAM_KAFKA_PASSWORD",
        ),
    ],
)
def test_a_file_that_is_missing_is_named_before_anything_is_sent(
    security: dict[str, Any], told: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRSTREAM_KAFKA_PASSWORD", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AuthenticationFailed, match=told):
        consumer(client_of("127.0.0.1:9", **security))


def test_a_key_is_opened_by_its_password_and_another_one_is_told(
    authority: Authority, tmp_path: pathlib.Path
) -> None:
    own = authority.sign("locked", ["client"], password="opens it")
    security = {"ca_file": authority.ca_file, "cert_file": own.cert_file, "key_file": own.key_file}
    password_file = tmp_path / "password"
    password_file.write_text("opens it\n")
    with listening(authority.sign("wanting", ["127.0.0.1"]), authority.ca_file) as address:
        opened = client_of(address, **security, key_password_file=password_file)
        with pytest.raises(BrokerUnavailable) as silent:
            consumer(opened.model_copy(update={"request_timeout_ms": 1000}))
        assert not isinstance(silent.value, AuthenticationFailed)
        password_file.write_text("does not")
        for wrong in (opened, client_of(address, **security)):
            with pytest.raises(AuthenticationFailed, match=r"cannot be loaded.*key_password_file") as failed:
                consumer(wrong)
            assert "does not" not in str(failed.value)


def test_an_outage_is_no_refusal() -> None:
    config = KafkaSecurityConfig(protocol="SSL")
    for error in (
        kafka.errors.KafkaTimeoutError("Unable to bootstrap"),
        kafka.errors.KafkaConnectionError(ConnectionResetError()),
        kafka.errors.KafkaConnectionError(ssl.SSLEOFError(8, "EOF occurred in violation of protocol")),
    ):
        assert refusal(error, config) is None
    with (
        pytest.raises(BrokerUnavailable, match="no Kafka broker answered"),
        reaching(KafkaConfig(security=config)),
    ):
        raise kafka.errors.KafkaConnectionError(ConnectionResetError())
