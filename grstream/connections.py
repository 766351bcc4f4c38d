"""Connections to brokers that are encrypted and authenticated as `kafka.security` says.

kafka-python 3.0 tells nobody why a broker cannot be authenticated to: it tries again until the time-out.
Here what will not pass by itself ends a client's start at once, as `Refused`. Once started, a client goes on
trying, and what it shows is read anew for each connection: files may change while it runs.
"""

import contextlib
import functools
import logging
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import kafka.errors
from kafka.net.compat import KafkaNetClient
from kafka.net.connection import KafkaConnection
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector
from kafka.protocol.sasl import SaslAuthenticateRequest, SaslBytesRequest

from grstream.config import ConfigError, KafkaSecurityConfig, kafka_key_password, kafka_password
from grstream.oauth import TokenSource
from grstream.refusals import Refused, refusal

_LOGGERS = ("kafka.net.connection", "kafka.protocol.parser")


class Credentials:
    """What a client shows and asks for, read where a connection is made."""

    def __init__(self, config: KafkaSecurityConfig) -> None:
        self._config = config
        self._tokens = TokenSource(config.oauth) if config.oauth else None

    def tls(self) -> ssl.SSLContext | None:
        """None where nothing is encrypted. Raises Refused where a file is missing or not as it should be."""
        if not self._config.tls:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self._config.ca_file:
                context.load_verify_locations(self._config.ca_file)
            else:
                context.load_default_certs()
        except (OSError, ssl.SSLError) as error:
            raise Refused(f"kafka.security.ca_file, {self._config.ca_file}: {error}") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self._config.check_hostname
        if self._config.cert_file:
            try:
                password = kafka_key_password(self._config)
                # Without any, OpenSSL would ask at the terminal.
                opened = password.get_secret_value() if password else ""
                context.load_cert_chain(self._config.cert_file, self._config.key_file, opened)
            except ConfigError as error:
                raise Refused(str(error)) from None
            except (OSError, ssl.SSLError) as error:
                raise Refused(
                    "the client's certificate cannot be loaded; check kafka.security.cert_file, key_file and "
                    f"key_password_file ({error})"
                ) from error
        return context

    def sasl(self) -> dict[str, Any]:
        """kafka-python's options; none without SASL. Raises Refused where a secret is not there."""
        if not self._config.sasl:
            return {}
        if self._tokens is not None:
            self._tokens.token()
            return {"sasl_oauth_token_provider": self._tokens}
        try:
            password = kafka_password(self._config).get_secret_value()
        except ConfigError as error:
            raise Refused(str(error)) from None
        username = self._config.username or ""
        if self._config.mechanism != "PLAIN":  # RFC 5802, section 5.1: for kafka-python its caller's task
            username = username.replace("=", "=3D").replace(",", "=2C")
        return {"sasl_plain_username": username, "sasl_plain_password": password}


@contextlib.contextmanager
def opening(config: KafkaSecurityConfig) -> Iterator[dict[str, Any]]:
    """What a client of kafka-python is to be made with inside, no secret among it.

    Raises Refused as Credentials does. A client that cannot be made leaves nothing behind; left to itself,
    kafka-python 3.0.12 leaves a thread and four descriptors each time that it finds no broker.
    """
    options: dict[str, Any] = {}
    make: Callable[..., KafkaNetClient] = KafkaNetClient
    if config.protocol != "PLAINTEXT":
        credentials = Credentials(config)
        credentials.tls()
        credentials.sasl()  # rather here than at the end of a time-out
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_NO_SECRETS)
        options = {"security_protocol": config.protocol, "sasl_mechanism": config.mechanism}
        make = functools.partial(_client, credentials, config)
    with contextlib.ExitStack() as failed:

        def made(**configs: Any) -> KafkaNetClient:
            client = make(**configs)
            failed.callback(client.close)
            return client

        yield {**options, "kafka_client": made}
        failed.pop_all()


class _Connections(KafkaConnectionManager):
    """kafka-python's connections, with credentials as of each one, and an end to what cannot succeed."""

    def __init__(
        self, credentials: Credentials, security: KafkaSecurityConfig, net: NetworkSelector, **configs: Any
    ) -> None:
        self._credentials, self._security = credentials, security
        super().__init__(net, **configs)

    def bootstrap_async(self, timeout_ms: float | None = None, refresh: bool = True) -> Any:
        self._auth_failures.clear()
        return super().bootstrap_async(timeout_ms, refresh)

    async def _connect(self, node: Any, conn: KafkaConnection, *arguments: Any, **options: Any) -> None:
        before = self._backoff.get(node.node_id)
        try:
            self.config["ssl_context"] = self._credentials.tls()
            conn.config.update(self._credentials.sasl())
        except Refused as error:
            conn.connection_lost(error)
        else:
            await super()._connect(node, conn, *arguments, **options)
        failed = conn.init_future.exception
        why = refusal(failed, self._security) if failed is not None else None
        if why is None:
            return
        if before is not None:  # kafka-python takes it back where authentication fails
            self._backoff[node.node_id] = before
        self.update_backoff(node.node_id)
        # The bootstrap ends with what it finds here. Later, requests fail, each by itself, and the next
        # connection is made with the credentials of then.
        if not self.bootstrapped:
            self._auth_failures[node.node_id] = Refused(why)

    async def _build_transport(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super()._build_transport(*arguments, **options)
        except kafka.errors.KafkaConnectionError as error:
            why = refusal(error, self._security)
            if why is None:
                raise
            raise Refused(why) from error


def _client(credentials: Credentials, security: KafkaSecurityConfig, **configs: Any) -> KafkaNetClient:
    net = NetworkSelector(**configs)
    return KafkaNetClient(net, _Connections(credentials, security, net, **configs))


class _NoSecrets(logging.Filter):
    """Asked to log everything, kafka-python logs what it sends: passwords and tokens are among that."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not isinstance(record.args, tuple) or not any(
            isinstance(value, bytes | bytearray | SaslAuthenticateRequest | SaslBytesRequest)
            for value in record.args
        )


_NO_SECRETS = _NoSecrets()
