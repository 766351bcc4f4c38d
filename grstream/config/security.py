"""How a client and the Kafka brokers prove to each other who they are."""

import pathlib
from typing import Annotated, Literal, Self

import pydantic

from grstream.config.section import Section

Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]
HttpsUrl = Annotated[str, pydantic.StringConstraints(pattern=r"^https://[^\s/?#@]+(/[^\s?#]*)?(\?[^\s#]*)?$")]


class OAuthConfig(Section):
    """Where a client gets its tokens: OAuth 2.0, client credentials (RFC 6749, section 4.4)."""

    token_url: HttpsUrl = pydantic.Field(description="https:// URL of the token endpoint")
    client_id: str = pydantic.Field(min_length=1, description="who asks for a token")
    client_secret_file: pathlib.Path | None = pydantic.Field(
        None,
        description="file that holds the client's secret, read anew for each token. The environment's "
        "GRSTREAM_KAFKA_OAUTH_SECRET takes its place",
    )
    scope: str | None = pydantic.Field(
        None, min_length=1, description="scopes asked for, separated by spaces; default: the endpoint's"
    )
    extensions: dict[str, str] = pydantic.Field(
        {}, description="SASL extensions sent beside the token, such as logicalCluster"
    )
    ca_file: pathlib.Path | None = pydantic.Field(
        None, description="PEM file of the authorities that vouch for the endpoint; default: the system's"
    )
    timeout_ms: int = pydantic.Field(
        5_000, ge=1, description="milliseconds for the endpoint to answer; beyond, there is no connection"
    )


class KafkaSecurityConfig(Section):
    """What Kafka clients show brokers and ask of them. Secrets are named here, never written."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = pydantic.Field(
        "PLAINTEXT",
        description="of the brokers' listener: SSL encrypts, SASL says who the client is; SASL_PLAINTEXT "
        "sends that over the network as it is",
    )
    ca_file: pathlib.Path | None = pydantic.Field(
        None, description="PEM file of the authorities that vouch for brokers; default: the system's"
    )
    cert_file: pathlib.Path | None = pydantic.Field(
        None, description="PEM file of the client's own certificate and its chain, where brokers ask for one"
    )
    key_file: pathlib.Path | None = pydantic.Field(
        None, description="PEM file of that certificate's key; default: in cert_file"
    )
    key_password_file: pathlib.Path | None = pydantic.Field(
        None, description="file that holds the key's password; default: the key has none"
    )
    check_hostname: bool = pydantic.Field(
        True, description="a broker's certificate must name the host that is connected to"
    )
    mechanism: Mechanism | None = pydantic.Field(None, description="of SASL; required for SASL protocols")
    username: str | None = pydantic.Field(None, min_length=1, description="of PLAIN and SCRAM")
    password_file: pathlib.Path | None = pydantic.Field(
        None,
        description="file that holds the password, read anew for each connection, so that it may change. The "
        "environment's GRSTREAM_KAFKA_PASSWORD takes its place",
    )
    oauth: OAuthConfig | None = pydantic.Field(
        None, description="where tokens come from; required for OAUTHBEARER"
    )

    def absolute(self) -> Self:
        """The same with the paths of its files absolute."""
        oauth = self.oauth and self.oauth.model_copy(update=_absolute(self.oauth))
        return self.model_copy(update={**_absolute(self), "oauth": oauth})

    @property
    def tls(self) -> bool:
        return self.protocol in ("SSL", "SASL_SSL")

    @property
    def sasl(self) -> bool:
        return self.protocol in ("SASL_PLAINTEXT", "SASL_SSL")

    @pydantic.model_validator(mode="after")
    def _fields_of_tls(self) -> Self:
        if not self.tls:
            given = [f for f in ("ca_file", "cert_file", "key_file", "key_password_file") if getattr(self, f)]
            given += [] if self.check_hostname else ["check_hostname"]
            if given:
                raise ValueError(
                    f"{', '.join(given)} belong to protocol: SSL or SASL_SSL, and it is {self.protocol}"
                )
        if self.key_file and not self.cert_file:
            raise ValueError("key_file is the key of a certificate: give its cert_file, too")
        if self.key_password_file and not self.cert_file:
            raise ValueError("key_password_file opens the key of a certificate: give its cert_file, too")
        return self

    @pydantic.model_validator(mode="after")
    def _fields_of_sasl(self) -> Self:
        named = {"username": self.username, "password_file": self.password_file}
        if not self.sasl:
            given = [f for f in ("mechanism", *named, "oauth") if getattr(self, f) is not None]
            if given:
                raise ValueError(
                    f"{', '.join(given)} belong to protocol: SASL_SSL or SASL_PLAINTEXT, and it is "
                    f"{self.protocol}"
                )
        elif self.mechanism is None:
            raise ValueError(
                f"protocol: {self.protocol} needs a mechanism: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or "
                "OAUTHBEARER"
            )
        elif self.mechanism == "OAUTHBEARER":
            if self.oauth is None:
                raise ValueError("mechanism: OAUTHBEARER needs oauth, with token_url and client_id")
            given = [field for field, value in named.items() if value is not None]
            if given:
                raise ValueError(
                    f"{', '.join(given)} belong to PLAIN and SCRAM; OAUTHBEARER has oauth.client_id and "
                    "oauth.client_secret_file"
                )
        else:
            if self.username is None:
                raise ValueError(f"mechanism: {self.mechanism} needs a username")
            if self.oauth is not None:
                raise ValueError(f"oauth belongs to mechanism: OAUTHBEARER, and it is {self.mechanism}")
        return self


def _absolute(section: Section) -> dict[str, pathlib.Path]:
    return {field: value.absolute() for field, value in section if isinstance(value, pathlib.Path)}
