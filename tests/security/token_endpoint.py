"""An OAuth 2.0 token endpoint over HTTPS, whose signed tokens Kafka's own validator accepts."""

import base64
import contextlib
import http.server
import json
import pathlib
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.security.certificates import Signed

CLIENT, SECRET = "grstream", "s3cret/with+signs:and=more"
ISSUER, AUDIENCE = "https://tests", "kafka"
EXPIRED = "expired"  # the scope that gets a token of yesterday
LIFE_S = 300


class TokenEndpoint:
    """Answers client credentials; `asked` are the forms that came in."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.asked: list[dict[str, str]] = []
        self.answer: tuple[int, bytes] | None = None  # instead of what it would say
        self.life_s: float = LIFE_S
        self.url = ""

    def write_jwks(self, path: pathlib.Path) -> None:
        """The public key, for brokers."""
        numbers = self._key.public_key().public_numbers()
        key = {"kty": "RSA", "kid": "1", "use": "sig", "alg": "RS256"}
        path.write_text(json.dumps({"keys": [key | {"n": _number(numbers.n), "e": _number(numbers.e)}]}))

    def answered(self, authorization: str, form: dict[str, str]) -> tuple[int, bytes]:
        self.asked.append(form)
        if self.answer is not None:
            return self.answer
        pair = ":".join(urllib.parse.quote_plus(part) for part in (CLIENT, SECRET))
        if authorization != f"Basic {base64.b64encode(pair.encode()).decode()}":
            return 401, b'{"error": "invalid_client", "error_description": "the secret is wrong"}'
        if form.get("grant_type") != "client_credentials":
            return 400, b'{"error": "unsupported_grant_type"}'
        scope = form.get("scope", "actions")
        issued = int(time.time()) - (24 * 3600 if scope == EXPIRED else 0)
        token = self._signed(
            {
                **{"sub": CLIENT, "iss": ISSUER, "aud": AUDIENCE, "scope": scope},
                **{"iat": issued, "exp": issued + max(1, int(self.life_s))},
            }
        )
        return 200, json.dumps({"access_token": token, "expires_in": self.life_s}).encode()

    def _signed(self, claims: dict[str, Any]) -> str:
        parts = [_base64(json.dumps(part).encode()) for part in ({"alg": "RS256", "kid": "1"}, claims)]
        signature = self._key.sign(".".join(parts).encode(), padding.PKCS1v15(), hashes.SHA256())
        return ".".join([*parts, _base64(signature)])


@contextlib.contextmanager
def serving(certificate: Signed) -> Iterator[TokenEndpoint]:
    endpoint = TokenEndpoint()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            form = dict(urllib.parse.parse_qsl(body))
            status, answer = endpoint.answered(self.headers.get("Authorization", ""), form)
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None: ...

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert_file, certificate.key_file)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        # The handshake is left to each request's thread, where one that fails ends nothing else.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        endpoint.url = f"https://127.0.0.1:{server.server_port}/token"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield endpoint
        finally:
            server.shutdown()
            thread.join()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _number(value: int) -> str:
    return _base64(value.to_bytes((value.bit_length() + 7) // 8, "big"))
