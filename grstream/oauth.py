"""Tokens for SASL's OAUTHBEARER: OAuth 2.0's client-credentials grant (RFC 6749, section 4.4) over HTTPS."""

import base64
import http.client
import ssl
import threading
import time
import urllib.parse
from typing import Annotated

import pydantic
from kafka.net.sasl.oauth import AbstractTokenProvider

from grstream.config import ConfigError, OAuthConfig, kafka_oauth_secret
from grstream.refusals import Refused

# Of a token's life, after which a new one is asked for: brokers end a session with its token, and
# kafka-python authenticates anew at 0.85 to 0.95 of a session, which must find the next token.
FRESH = 0.8
ANSWER_BYTES = 1 << 20


class _Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(hide_input_in_errors=True)

    access_token: Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Za-z0-9._~+/-]+=*$")]
    expires_in: float = pydantic.Field(0, ge=0, description="seconds; not said: asked anew each time")


class TokenSource(AbstractTokenProvider):
    """The token that is good now, for any thread; asked for when it is first needed and before it expires."""

    def __init__(self, config: OAuthConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._token = ""
        self._until = 0.0  # by the monotonic clock

    def token(self) -> str:
        """Raises Refused."""
        with self._lock:
            asked = time.monotonic()
            if asked >= self._until:
                answer = self._ask()
                self._token, self._until = answer.access_token, asked + FRESH * answer.expires_in
            return self._token

    def extensions(self) -> dict[str, str]:
        return self._config.extensions

    def _ask(self) -> _Answer:
        url = self._config.token_url
        try:
            secret = kafka_oauth_secret(self._config).get_secret_value()
            status, body = self._post(secret, self._trusted())
        except ConfigError as error:
            raise Refused(str(error)) from None
        except ssl.SSLCertVerificationError as error:
            raise Refused(
                f"{url} is not trusted: {error.verify_message}; check kafka.security.oauth.ca_file"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise Refused(
                f"{url} gave no token within {self._config.timeout_ms} ms ({type(error).__name__}: {error}); "
                "check kafka.security.oauth.token_url"
            ) from error
        if status != http.HTTPStatus.OK:
            raise Refused(
                f"{url} gave client {self._config.client_id!r} no token: HTTP {status}{_code(body)}; check "
                "kafka.security.oauth: token_url, client_id, its secret and scope"
            )
        try:
            return _Answer.model_validate_json(body)
        except pydantic.ValidationError as error:
            wrong = error.errors(include_input=False)[0]
            raise Refused(
                f"{url} answered with no token: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}; check "
                "kafka.security.oauth.token_url"
            ) from None

    def _trusted(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=self._config.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise Refused(f"kafka.security.oauth.ca_file, {self._config.ca_file}: {error}") from error

    def _post(self, secret: str, trusted: ssl.SSLContext) -> tuple[int, bytes]:
        """The answer's status and body. Redirects are not followed: they would carry the secret elsewhere."""
        url = urllib.parse.urlsplit(self._config.token_url)
        form = {"grant_type": "client_credentials"}
        if self._config.scope:
            form["scope"] = self._config.scope
        pair = ":".join(urllib.parse.quote_plus(part) for part in (self._config.client_id, secret))
        connection = http.client.HTTPSConnection(
            url.hostname or "",
            url.port,
            timeout=self._config.timeout_ms / 1000,
            context=trusted,
        )
        try:
            connection.request(
                "POST",
                (url.path or "/") + (f"?{url.query}" if url.query else ""),
                urllib.parse.urlencode(form),
                {
                    "Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}",
                    "Content-Type": "application/x-www-form-urlencoded",
                    "Accept": "application/json",
                },
            )
            answer = connection.getresponse()
            return answer.status, answer.read(ANSWER_BYTES)
        finally:
            connection.close()


class _Problem(pydantic.BaseModel):
    error: Annotated[str, pydantic.StringConstraints(pattern=r"^[a-z_]{1,40}$")]


def _code(body: bytes) -> str:
    """RFC 6749's code of an error, such as invalid_client; the rest of the body may be anything."""
    try:
        return f" ({_Problem.model_validate_json(body).error})"
    except pydantic.ValidationError:
        return ""
