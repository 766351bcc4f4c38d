"""Apache Kafka with a listener for each way in which clients and brokers prove who they are."""

import contextlib
import dataclasses
import os
import pathlib
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import kafka.admin

from grstream.config import KafkaConfig
from tests.security.certificates import Authority, Signed
from tests.security.token_endpoint import AUDIENCE, CLIENT, ISSUER, SECRET, TokenEndpoint, serving

USER, PASSWORD = "grstream", "correct horse, battery=staple"
REAUTHENTICATE_MS = 4_000  # of the listener ROTATING

LISTENERS = {
    "PLAINTEXT": "PLAINTEXT",
    "CONTROLLER": "PLAINTEXT",
    "SASL_SSL": "SASL_SSL",
    "SASL_PLAINTEXT": "SASL_PLAINTEXT",
    "MUTUAL": "SSL",  # clients show a certificate, too
    "ELSEWHERE": "SSL",  # advertised at another host than its certificate names
    "ROTATING": "SASL_SSL",  # clients are asked for their password again and again
}
SCRAM = ("SCRAM-SHA-256", "SCRAM-SHA-512")
_MODULES = "org.apache.kafka.common.security"


@dataclasses.dataclass(frozen=True)
class SecuredKafka:
    """A running broker, and the files that a client of it is configured with."""

    addresses: dict[str, str]  # by listener
    authority: Authority
    strangers: Authority  # which the broker does not know
    client: Signed
    endpoint: TokenEndpoint
    password_file: pathlib.Path
    secret_file: pathlib.Path

    def config(self, listener: str = "SASL_SSL", topic: str = "actions", **security: Any) -> KafkaConfig:
        """Of a client; `security` says otherwise than what would be right, None what is left out."""
        protocol = LISTENERS[listener]
        right: dict[str, Any] = {"protocol": protocol}
        if protocol.endswith("SSL"):
            right["ca_file"] = self.authority.ca_file
        if protocol.startswith("SASL"):
            right |= {"mechanism": "SCRAM-SHA-512", "username": USER, "password_file": self.password_file}
        right |= security
        return KafkaConfig(
            bootstrap_servers=[self.addresses[listener]],
            topic=topic,
            security={field: value for field, value in right.items() if value is not None},
            request_timeout_ms=20_000,
        )

    def oauth(self, **oauth: Any) -> KafkaConfig:
        """Of a client with tokens."""
        right = {
            **{"token_url": self.endpoint.url, "client_id": CLIENT},
            **{"client_secret_file": self.secret_file, "ca_file": self.authority.ca_file},
        }
        return self.config(mechanism="OAUTHBEARER", username=None, password_file=None, oauth=right | oauth)

    def set_password(self, password: str) -> None:
        """Of SCRAM, as an administrator of the broker."""
        with kafka.admin.KafkaAdminClient(bootstrap_servers=self.addresses["PLAINTEXT"]) as admin:
            for mechanism in SCRAM:  # a broker takes one of a user at once
                credential = kafka.admin.UserScramCredentialUpsertion(USER, mechanism, password=password)
                answer = admin.alter_user_scram_credentials([credential])
                assert answer == {USER: None}, answer


@contextlib.contextmanager
def running(start: pathlib.Path, directory: pathlib.Path) -> Iterator[SecuredKafka]:
    """The broker, started by the script `start`."""
    authority, strangers = Authority(directory), Authority(directory, "strangers")
    here = authority.sign("broker", ["localhost", "127.0.0.1"])
    password_file, secret_file = directory / "password", directory / "secret"
    password_file.write_text(f"{PASSWORD}\n")
    secret_file.write_text(SECRET)
    with serving(here) as endpoint:
        secured = SecuredKafka(
            addresses=_addresses(),
            authority=authority,
            strangers=strangers,
            client=authority.sign("client", ["client"]),
            endpoint=endpoint,
            password_file=password_file,
            secret_file=secret_file,
        )
        jwks = directory / "jwks.json"
        endpoint.write_jwks(jwks)
        settings = _settings(secured, here, authority.sign("elsewhere", ["localhost"]), jwks)
        port = secured.addresses["PLAINTEXT"].rpartition(":")[2]
        command = [str(start), "--dir", str(directory / "kafka"), "--port", port]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        # Kafka reads keys from nowhere but where its JVM is told that it may.
        allowed = f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={jwks.as_uri()}"
        environment = {**os.environ, "JAVA_TOOL_OPTIONS": allowed}
        with _started(command, environment):
            secured.set_password(PASSWORD)
            yield secured


@contextlib.contextmanager
def _started(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    """From `ready` on. Kafka takes one in 64 of its random cluster ids for an option: try again."""
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            try:
                assert process.stdout is not None
                if process.stdout.readline().startswith("ready "):
                    yield
                    return
            finally:
                process.terminate()
    raise RuntimeError("Kafka did not start in 3 tries")


def _addresses() -> dict[str, str]:
    with contextlib.ExitStack() as held:
        addresses = {}
        for listener in LISTENERS:
            taken = held.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            addresses[listener] = f"127.0.0.1:{taken.getsockname()[1]}"
        return addresses


def _settings(secured: SecuredKafka, here: Signed, elsewhere: Signed, jwks: pathlib.Path) -> dict[str, str]:
    listeners = [f"{name}://{address}" for name, address in secured.addresses.items()]
    settings = {
        "listeners": ",".join(listeners),
        "advertised.listeners": ",".join(at for at in listeners if not at.startswith("CONTROLLER")),
        "listener.security.protocol.map": ",".join(f"{name}:{speaks}" for name, speaks in LISTENERS.items()),
        "controller.quorum.bootstrap.servers": secured.addresses["CONTROLLER"],
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(here.store),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(secured.authority.ca_file),
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
        "listener.name.sasl_plaintext.sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.rotating.sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.mutual.ssl.client.auth": "required",
        "listener.name.elsewhere.ssl.keystore.type": "PEM",
        "listener.name.elsewhere.ssl.keystore.location": str(elsewhere.store),
        "listener.name.rotating.scram-sha-512.connections.max.reauth.ms": str(REAUTHENTICATE_MS),
    }
    for listener in ("sasl_ssl", "sasl_plaintext", "rotating"):
        for mechanism in SCRAM:
            module = f"{_MODULES}.scram.ScramLoginModule required;"
            settings[f"listener.name.{listener}.{mechanism.lower()}.sasl.jaas.config"] = module
    plain, bearer = "listener.name.sasl_ssl.plain", "listener.name.sasl_ssl.oauthbearer"
    handler = f"{_MODULES}.oauthbearer.OAuthBearerValidatorCallbackHandler"
    return settings | {
        f"{plain}.sasl.jaas.config": f'{_MODULES}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";',
        f"{bearer}.sasl.jaas.config": f"{_MODULES}.oauthbearer.OAuthBearerLoginModule required "
        'unsecuredLoginStringClaim_sub="broker";',
        f"{bearer}.sasl.server.callback.handler.class": handler,
        f"{bearer}.sasl.oauthbearer.jwks.endpoint.url": jwks.as_uri(),
        f"{bearer}.sasl.oauthbearer.expected.issuer": ISSUER,
        f"{bearer}.sasl.oauthbearer.expected.audience": AUDIENCE,
    }
