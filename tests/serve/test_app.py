import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
import yaml

from grstream import config as configuration
from grstream.config import Config
from grstream.kafka import create_topic
from grstream.keys import Namespace, keys_of_ints
from grstream.model import HSTU
from grstream.weight_store import WeightStore
from grstream.weights import Recipe, Weights
from serve import proxy, rank_pb2
from serve.app import WrongPackage, require_own
from serve.rpc import SERVICE
from tests.faults.killing import KillableBroker, descendants, killable

PATIENCE_S = 60.0
ACTIONS = ["click", "like"]


def test_a_package_of_the_same_name_that_is_not_the_projects_own_is_refused() -> None:
    require_own("serve")
    require_own("kernels")
    with pytest.raises(WrongPackage, match="`import yaml` finds"):
        require_own("yaml")
    with pytest.raises(WrongPackage, match="None"):
        require_own("no_such_package_at_all")


class Application:
    """The application of a config on a Ray cluster of its own, and what a test does to it."""

    def __init__(self, config: Config, broker: KillableBroker) -> None:
        self.config, self.broker = config, broker
        self.grpc_port = free_port()
        self.store = WeightStore(config.storage / "weights")
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{config.serve.port}", timeout=30)

    def publish(self, seed: int, store: WeightStore | None = None, bad: bool = False) -> int:
        """Random weights over items 0..99 as the next version."""
        torch.manual_seed(seed)
        dim = self.config.model.dim
        model = HSTU(self.config.model, actions=len(ACTIONS))
        rows = np.random.default_rng(seed).normal(size=(100, dim)).astype(np.float32)
        dense = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        if bad:
            dense["start"] = np.zeros(dim + 1, np.float32)  # not what its recipe describes
        keys = keys_of_ints(Namespace.ITEM, np.arange(100))
        weights = Weights(dense, keys, rows, np.ones(100, np.bool_), {})
        manifest = (store or self.store).publish(
            weights,
            Recipe.of(self.config),
            step=seed,
            positions={0: [(0, seed)]},
            newest_event_ms=seed,
            number=self.store.numbers()[-1] + 1 if self.store.numbers() else None,
        )
        return manifest.number

    def publish_corrupt(self, seed: int) -> None:
        """A version with a flipped bit, damaged before any reader can see it."""
        aside = self.config.storage / "aside"
        name = f"v{self.publish(seed, WeightStore(aside)):010d}"
        path = aside / name / "dense.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.rename(aside / name, self.config.storage / "weights" / name)

    def rank(self, user: int = 1, candidates: range = range(95, 105)) -> dict[str, Any]:
        answer = self.client.post("/v1/rank", json={"user_id": user, "candidates": [*candidates]})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, user: int, items: list[int]) -> list[dict[str, int]]:
        events = [
            {"user_id": user, "item_id": i, "actions": ["like"], "timestamp_ms": 1000 + i} for i in items
        ]
        answer = self.client.post("/v1/actions", json={"events": events})
        assert answer.status_code == 200, answer.text
        return answer.json()["results"]


def eventually(check: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(httpx.TransportError, AssertionError):
            found = check()
            if found:
                return found
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def application(broker_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """Broker, cluster and `serve.app:build`, ready to answer."""
    import ray
    from ray import serve

    from serve.app import Arguments, build

    home = tmp_path_factory.mktemp("application")
    with killable(broker_process, home / "broker") as broker:
        path = home / "config.yaml"
        path.write_text(yaml.safe_dump(settings(home, broker.bootstrap)))
        config = configuration.load(path)
        create_topic(config.kafka, 2)
        made = Application(config, broker)
        # Of the whole cluster: proxies read it when they start.
        os.environ[proxy.CALLBACK_VARIABLE] = proxy.CALLBACK
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            serve.start(
                http_options={"host": config.serve.host, "port": config.serve.port},
                grpc_options={
                    "port": made.grpc_port,
                    "grpc_servicer_functions": ["serve.rpc:add_ranking"],
                    "enable_reflection": False,
                },
            )
            serve.run(build(Arguments(config=str(path))))
            yield made
        finally:
            made.client.close()
            serve.shutdown()
            ray.shutdown()
            del os.environ[proxy.CALLBACK_VARIABLE]


def settings(home: pathlib.Path, bootstrap: str) -> dict[str, Any]:
    return {
        "storage": str(home / "storage"),
        "kafka": {"bootstrap_servers": [bootstrap]},
        "events": {"actions": ACTIONS},
        "model": {"layers": 1, "dim": 16},
        "serve": {"port": free_port(), "replicas": 2, "history_shards": 2, "poll_weights_s": 0.1},
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def kill(deployment: str) -> None:
    """SIGKILL one replica of a deployment."""
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    replicas = details["applications"]["default"]["deployments"][deployment]["replicas"]
    os.kill(replicas[0]["pid"], signal.SIGKILL)


@pytest.mark.ray_cluster
def test_before_the_first_version_the_server_lives_but_is_not_ready(application: Application) -> None:
    assert application.client.get("/healthz").status_code == 200
    for answer in (
        application.client.get("/readyz"),
        application.client.get("/v1/model"),
        application.client.post("/v1/rank", json={"user_id": 1, "candidates": [1]}),
    ):
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        assert answer.json()["error"]["type"] == "not_ready"
    application.publish(1)
    ready = eventually(lambda: application.client.get("/readyz").json().get("ready"))
    assert ready


@pytest.mark.ray_cluster
def test_an_action_posted_is_in_the_next_scores(application: Application) -> None:
    before = application.rank(user=7)
    assert before["history_length"] == 0
    assert [r["known"] for r in before["results"]] == [True] * 5 + [False] * 5
    placed = application.post(7, [3, 4, 5])
    assert len({p["partition"] for p in placed}) == 1
    after = eventually(lambda: (r := application.rank(user=7))["history_length"] == 3 and r)
    assert after["position"]["offset"] > placed[-1]["offset"]
    assert after["results"] != before["results"]
    history = application.client.get("/v1/users/7/history").json()
    assert [e["item_id"] for e in history["events"]] == [3, 4, 5]
    found = application.client.post("/v1/retrieve", json={"user_id": 7, "k": 3, "exclude_history": True})
    assert len(found.json()["results"]) == 3


@pytest.mark.ray_cluster
def test_grpc_gives_the_scores_of_http_and_a_refusal_comes_through_the_proxy(
    application: Application,
) -> None:
    scores = [r["scores"] for r in application.rank(user=7)["results"]]
    with grpc.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
        rank = channel.unary_unary(
            f"/{SERVICE}/Rank",
            request_serializer=rank_pb2.RankRequest.SerializeToString,
            response_deserializer=rank_pb2.RankAnswer.FromString,
        )
        candidates = [rank_pb2.Candidate(item_id=str(i)) for i in range(95, 105)]
        answer = rank(rank_pb2.RankRequest(user_id="7", candidates=candidates), timeout=30)
        for row, expected in zip(answer.results, scores, strict=True):
            assert dict(zip(answer.actions, row.probabilities, strict=True)) == pytest.approx(expected)
        with pytest.raises(grpc.RpcError) as caught:
            rank(rank_pb2.RankRequest(user_id="7"), timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert json.loads(caught.value.details())["error"]["field"] == "candidates"


@pytest.mark.ray_cluster
def test_what_bounds_a_request_does_so_behind_the_proxy(application: Application) -> None:
    answer = application.client.post("/v1/rank", content=b" " * 10_000_000, headers={"X-Request-Id": "big"})
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "body_too_large"
    assert answer.headers["X-Request-Id"] == answer.json()["error"]["request_id"]
    batch = {"requests": [{"user_id": u, "candidates": [95]} for u in range(3)] + [{"user_id": 1}]}

    def statuses() -> list[int]:
        elements = application.client.post("/v1/batch/rank", json=batch).json()["results"]
        return [e["status"] for e in elements]

    # The replicas take on the first version one after the other, each once it has measured its machine.
    eventually(lambda: statuses() == [200, 200, 200, 422])


@pytest.mark.ray_cluster
def test_a_user_that_is_forgotten_has_no_history(application: Application) -> None:
    application.post(11, [3, 4])
    eventually(lambda: application.rank(user=11)["history_length"] == 2)
    answer = application.client.delete("/v1/users/11")
    assert answer.status_code == 202
    after = eventually(lambda: (r := application.rank(user=11))["history_length"] == 0 and r)
    assert after["position"]["offset"] > answer.json()["offset"]
    assert application.client.get("/v1/users/11/history").json()["events"] == []
    application.post(11, [5])
    eventually(lambda: application.rank(user=11)["history_length"] == 1)


@pytest.mark.ray_cluster
def test_a_new_version_is_served_without_a_restart_and_a_corrupt_or_unusable_one_never(
    application: Application,
) -> None:
    held = application.client.get("/v1/model").json()["version"]
    number = application.publish(2)
    assert number > held
    eventually(lambda: application.rank(user=8)["version"] == number)
    application.publish_corrupt(3)
    application.publish(4, bad=True)
    until = time.monotonic() + 10 * application.config.serve.poll_weights_s
    while time.monotonic() < until:
        assert {application.rank(user=u)["version"] for u in range(10)} <= {held, number}
    last = application.publish(5)
    eventually(lambda: {application.rank(user=u)["version"] for u in range(20)} == {last})


class Load:
    """Requests by four clients, all the while; what they were answered."""

    def __init__(self, application: Application) -> None:
        self._application = application
        if not application.store.numbers():  # run without the tests before
            application.publish(1)
        eventually(lambda: all(application.rank(user=u) for u in range(1000, 1020)))
        self._done = threading.Event()
        self.answers: Counter[int] = Counter()
        self.refused = 0  # connections
        self.bad: list[str] = []
        self.expected = {r["item_id"]: r["scores"] for r in application.rank(user=1000)["results"]}
        self.version = application.rank(user=1000)["version"]

    def _run(self, worker: int) -> None:
        limits = httpx.Limits(max_keepalive_connections=1)
        with httpx.Client(base_url=self._application.client.base_url, timeout=30, limits=limits) as client:
            while not self._done.is_set():
                body = {"user_id": 1000 + worker, "candidates": [*range(95, 105)]}
                try:
                    answer = client.post("/v1/rank", json=body)
                except httpx.TransportError:
                    self.refused += 1
                    time.sleep(0.1)
                    continue
                self.answers[answer.status_code] += 1
                if answer.status_code == 503:
                    if "Retry-After" not in answer.headers or "error" not in answer.json():
                        self.bad.append(answer.text)
                    time.sleep(0.1)
                elif answer.status_code != 200:
                    self.bad.append(f"{answer.status_code}: {answer.text}")
                elif worker == 0 and answer.json()["version"] == self.version:
                    got = {r["item_id"]: r["scores"] for r in answer.json()["results"]}
                    if got != self.expected:
                        self.bad.append(f"scores changed: {got}")

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Some before, and some after."""
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(self._run, w) for w in range(4)]
            try:
                time.sleep(1)
                yield
                time.sleep(1)
            finally:
                self._done.set()
            for worker in workers:
                worker.result()
        assert not self.bad, self.bad[:3]
        assert self.answers.keys() <= {200, 503}


@pytest.mark.ray_cluster
@pytest.mark.parametrize("deployment", ["scorer", "gateway", "history-0"])
def test_a_replica_killed_under_load_costs_nothing_but_503s_and_comes_back(
    application: Application, deployment: str
) -> None:
    load = Load(application)
    with load.applied():
        kill(deployment)
        time.sleep(1)
        eventually(lambda: all(application.rank(user=u) for u in range(1000, 1020)))
    assert load.refused == 0
    assert load.answers[200] > load.answers[503]


@pytest.mark.ray_cluster
def test_a_proxy_killed_under_load_is_back_by_itself(application: Application) -> None:
    """Of one node's one proxy: whoever asks meanwhile finds no port, and no wrong answer."""
    load = Load(application)
    with load.applied():
        (proxy,) = descendants("ray::ProxyActor")
        os.kill(proxy, signal.SIGKILL)
        eventually(lambda: descendants("ray::ProxyActor") not in ([], [proxy]))
        eventually(lambda: all(application.rank(user=u) for u in range(1000, 1020)))
    assert load.answers[200] > load.answers[503]


AWAY = [3.0, pytest.param(60.0, marks=pytest.mark.slow)]


@pytest.mark.ray_cluster
@pytest.mark.parametrize("away_s", AWAY)
def test_while_the_weights_storage_is_gone_the_last_version_serves(
    application: Application, away_s: float
) -> None:
    weights = application.config.storage / "weights"
    load = Load(application)
    with load.applied():
        weights.rename(weights.with_name("gone"))
        time.sleep(away_s)
        assert application.rank(user=1000)["version"] == load.version
        weights.with_name("gone").rename(weights)
        number = application.publish(6)
        eventually(lambda: {application.rank(user=u)["version"] for u in range(20)} == {number})
    assert load.refused == 0
    assert load.answers.keys() == {200}


@pytest.mark.ray_cluster
@pytest.mark.parametrize("away_s", AWAY)
def test_while_kafka_is_away_scores_go_on_and_posts_are_refused(
    application: Application, away_s: float
) -> None:
    load = Load(application)
    with load.applied():
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            killed = pool.submit(application.broker.kill, away_s)
            time.sleep(min(1.0, away_s / 2))
            event = {"user_id": 77, "item_id": 3, "actions": ["like"], "timestamp_ms": 1003}
            answer = application.client.post("/v1/actions", json={"events": [event]})
            # The broker may be back before the writer gives up.
            assert answer.status_code in (200, 503), answer.text
            if away_s > 10:
                assert answer.status_code == 503
                assert answer.json()["error"]["type"] == "broker_unavailable"
            killed.result()
        eventually(lambda: application.post(77, [4]))
        eventually(lambda: application.rank(user=77)["history_length"] >= 1)
    assert load.refused == 0
    assert load.answers.keys() == {200}
