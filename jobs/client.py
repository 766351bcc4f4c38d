"""A small client of the serving API, over one connection. Not thread-safe."""

import http.client
import json
import time
from typing import Any

IDLE_S = 4.0  # after that a new connection: servers close idle ones, some after 5 s


class Refused(RuntimeError):
    """An answer that is no 200."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status}: {body}")
        self.status, self.body = status, body


class Client:
    """JSON in and out. A server that is not there raises OSError."""

    def __init__(self, host: str, port: int, timeout_s: float = 30) -> None:
        self.url = f"http://{host}:{port}"
        self._connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        self._answered = time.monotonic()

    def get(self, path: str) -> Any:
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any) -> Any:
        return self._ask("POST", path, json.dumps(body))

    def close(self) -> None:
        self._connection.close()

    def _ask(self, method: str, path: str, body: str | None) -> Any:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if time.monotonic() - self._answered > IDLE_S:
            self.close()  # a POST that met a connection just closed could not be sent again safely
        try:
            self._connection.request(method, path, body, headers)
            answer = self._connection.getresponse()
            status, text = answer.status, answer.read()
        except http.client.HTTPException as error:
            self.close()
            raise ConnectionError(f"{method} {self.url}{path}: {error!r}") from error
        except OSError:
            self.close()  # the next request opens another connection
            raise
        self._answered = time.monotonic()
        kind = answer.headers.get_content_type()
        decoded = json.loads(text) if kind == "application/json" else text.decode(errors="replace")
        if status != 200:
            raise Refused(status, decoded)
        return decoded
