"""The client of the serving API against a server that ends idle connections."""

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from jobs import client
from jobs.client import Client

ENDS_IDLE_S = 0.3


class _Answering(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = ENDS_IDLE_S

    def do_GET(self) -> None:
        body = b'{"port": %d}' % self.client_address[1]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def asked() -> Iterator[Client]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        made = Client("127.0.0.1", server.server_port)
        yield made
        made.close()
        server.shutdown()
        thread.join()


def test_a_busy_client_keeps_its_connection(asked: Client) -> None:
    assert asked.get("/")["port"] == asked.get("/")["port"]


def test_a_connection_that_the_server_ended_while_idle_is_not_used_again(
    asked: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "IDLE_S", ENDS_IDLE_S / 2)
    first = asked.get("/")
    time.sleep(3 * ENDS_IDLE_S)
    assert asked.get("/")["port"] != first["port"]
