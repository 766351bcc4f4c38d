"""A cluster of two nodes loses one with all that runs there, gets another, and everything is as it was.

    pytest tests/faults/test_two_nodes.py -m slow

A minute or two, most of it for Ray to start; the machine's other work makes it more.
"""

import pathlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from grstream.audit import audit
from grstream.config import Config
from grstream.kafka import create_topic
from grstream.weight_store import WeightStore
from jobs.stack import free_port
from tests.conftest import BrokerProcess
from tests.faults.killing import PATIENCE_S, Runs
from tests.grstream.streams import Stream, make_config
from tests.ray_head import RayHead, RayNode

pytestmark = [pytest.mark.ray_cluster, pytest.mark.slow]

CPUS = 4  # a node; with ranks of 2.5 each node holds one of two


@pytest.fixture
def config(broker_process: BrokerProcess, tmp_path: pathlib.Path) -> Iterator[Config]:
    with broker_process(tmp_path / "broker") as (_, bootstrap):
        made = make_config(
            tmp_path / "storage",
            bootstrap,
            source={"readers": 2, "flush_ms": 100},
            train={"workers": 2, "worker_cpus": 2.5, "publish_every_s": 0.5, "checkpoint_every_s": 1},
            serve={"port": free_port(), "replicas": 2, "gateways": 2, "poll_weights_s": 0.1},
        )
        create_topic(made.kafka, 2)
        yield made


class Asking:
    """A client that ranks all the time; what it was answered, by status."""

    def __init__(self, config: Config) -> None:
        self._url = f"http://127.0.0.1:{config.serve.port}/v1/rank"
        self._quiet = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.statuses: Counter[int] = Counter()
        self.version = 0

    def __enter__(self) -> "Asking":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._quiet.set()
        self._thread.join()

    def _run(self) -> None:
        user = 0
        while not self._quiet.wait(0.05):
            user = (user + 1) % 50
            try:
                answer = httpx.post(self._url, json={"user_id": user, "candidates": [1, 2, 3]}, timeout=30)
            except httpx.TransportError:
                self.statuses[0] += 1
                continue
            self.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                self.version = answer.json()["version"]


def eventually(check: Callable[[], Any], said: Callable[[], object]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := check()):
        assert time.monotonic() < deadline, said()
        time.sleep(0.2)
    return found


def test_a_node_that_is_lost_is_replaced_and_nothing_is_lost_with_it(
    config: Config, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config.model_dump_json())
    stream, runs = Stream(config), Runs(config)
    store = WeightStore(config.storage / "weights")
    stream.send(300)
    with RayHead(tmp_path / "head", CPUS) as head:
        lost = RayNode(head, tmp_path / "lost" / "log", CPUS)
        with lost:
            head.submit("train", f"python -m jobs.train_stream --config {path}")
            # Ranks are placed before replicas could be in their way.
            eventually(lambda: runs.steps() > 0, lambda: head.logs("train"))
            head.deploy(document(config, path))
            eventually(lambda: spread(head), head.applications)
            with Asking(config) as asking:
                eventually(lambda: asking.version, lambda: asking.statuses)
                before = asking.statuses.copy()
                assert runs.count() == 1
                lost.kill_raylet()
                with RayNode(head, tmp_path / "new" / "log", CPUS):
                    eventually(lambda: runs.count() > 1 and runs.steps() > 0, lambda: head.logs("train"))
                    eventually(lambda: spread(head), head.applications)
                    stream.send(300)
                    newest = store.numbers()[-1]
                    eventually(lambda: asking.version > newest, lambda: asking.statuses)
                    after = asking.statuses - before
                    assert set(after) <= {200, 503}, after
                    assert "stopped:" in head.stop("train")
    assert audit(config).passed


def document(config: Config, path: pathlib.Path) -> dict[str, Any]:
    """A scorer on each node; the nodes share an address, so there is one proxy."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": config.serve.host, "port": config.serve.port},
        "applications": [
            {
                "name": "grstream",
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "args": {"config": str(path)},
                "deployments": [{"name": name, "max_replicas_per_node": 1} for name in ("gateway", "scorer")],
            }
        ],
    }


def spread(head: RayHead) -> bool:
    """Whether gateways and scorers run on two nodes each."""
    application = head.applications().get("grstream", {})
    if application.get("status") != "RUNNING":
        return False
    for name in ("gateway", "scorer"):
        replicas = application["deployments"][name]["replicas"]
        running = {replica["node_id"] for replica in replicas if replica["state"] == "RUNNING"}
        if len(running) < 2:
            return False
    return True
