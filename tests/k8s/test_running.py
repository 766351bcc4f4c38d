"""What the base has Ray run, taken out of its manifests and run: paths, ports and the log differ."""

import dataclasses
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml

from grstream import config as configuration
from grstream.checkpoints import CheckpointStore
from grstream.config import Config
from grstream.kafka import create_topic
from grstream.weight_store import WeightStore
from jobs.stack import free_port
from tests.conftest import BrokerProcess
from tests.k8s.manifests import Object, one, render, settings
from tests.ray_head import ROOT, RayHead

pytestmark = pytest.mark.ray_cluster

MOUNTED = "/etc/grstream/grstream.yaml"
# What a person puts into the secrets.
KEY = "a-key-of-a-client-0123456789"
SECRETS = {("grstream-api-keys", "keys"): f"shop={KEY}"}
PATIENCE_S = 300.0
CPUS = 10  # of both clusters: serving's least replicas take 6, training 3
EVENTS = 2_000


@dataclasses.dataclass
class Running:
    """The base on this machine: one Ray cluster for both, with the pods' environment."""

    config: Config
    path: pathlib.Path
    head: RayHead
    client: httpx.Client

    def as_here(self, text: str) -> str:
        assert MOUNTED in text
        return text.replace(MOUNTED, str(self.path))


def environment(objects: list[Object]) -> dict[str, str]:
    """What the containers of both heads are given."""
    given = {}
    for kind, field in (("RayService", "rayClusterConfig"), ("RayJob", "rayClusterSpec")):
        container = one(objects, kind)["spec"][field]["headGroupSpec"]["template"]["spec"]["containers"][0]
        for variable in container["env"]:
            if "value" in variable:
                given[variable["name"]] = variable["value"]
            else:
                source = variable["valueFrom"]["secretKeyRef"]
                given[variable["name"]] = SECRETS[source["name"], source["key"]]
    return given


@pytest.fixture(scope="module")
def running(broker_process: BrokerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    objects = render("base")
    home = tmp_path_factory.mktemp("base")
    port = free_port()
    with broker_process(home / "broker") as (_, bootstrap):
        given = settings(objects)
        given["storage"] = str(home / "storage")
        given["kafka"]["bootstrap_servers"] = [bootstrap]
        given["serve"]["port"] = port
        path = home / "grstream.yaml"
        path.write_text(yaml.safe_dump(given))
        config = configuration.load(path)
        create_topic(config.kafka, 2)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers={"X-API-Key": KEY})
        with client, RayHead(home, CPUS, environment(objects)) as head:
            yield Running(config, path, head, client)


def eventually(check: Callable[[], Any], said: Callable[[], Any] = lambda: "") -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := check()):
        assert time.monotonic() < deadline, said()
        time.sleep(0.5)
    return found


def test_the_serve_document_deploys_and_asks_for_keys(running: Running) -> None:
    document = yaml.safe_load(running.as_here(one(render("base"), "RayService")["spec"]["serveConfigV2"]))
    document["http_options"]["port"] = running.config.serve.port
    running.head.deploy(document)

    def deployed() -> dict[str, Any] | None:
        application: dict[str, Any] = running.head.applications().get("grstream", {})
        assert application.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"), application
        return application if application.get("status") == "RUNNING" else None

    application = eventually(deployed, running.head.applications)
    replicas = {name: len(d["replicas"]) for name, d in application["deployments"].items()}
    assert replicas == {"gateway": 2, "history-0": 1, "history-1": 1, "scorer": 2}
    assert running.client.get("/healthz").status_code == 200
    question = {"user_id": 1, "candidates": [1]}
    assert httpx.post(f"{running.client.base_url}/v1/rank", json=question, timeout=30).status_code == 401
    refused = running.client.post("/v1/rank", json=question)
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "not_ready")


def test_the_entrypoint_trains_and_what_it_publishes_ranks(running: Running) -> None:
    replay = [sys.executable, "-m", "jobs.replay", "--config", str(running.path), "--data", "synthetic"]
    subprocess.run([*replay, "--limit", str(EVENTS)], cwd=ROOT, check=True, capture_output=True)
    entrypoint = running.as_here(one(render("base"), "RayJob")["spec"]["entrypoint"])
    environment = {name: v for name, v in running.head.environment.items() if name != "RAY_ADDRESS"}
    ray = str(pathlib.Path(sys.executable).parent / "ray")
    submit = [ray, "job", "submit", "--address", running.head.url, "--no-wait", "--submission-id", "train"]
    # As KubeRay's submitter does it, through a shell.
    submitted = subprocess.run(
        f"{' '.join(submit)} -- {entrypoint}", shell=True, env=environment, capture_output=True, text=True
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    store = WeightStore(running.config.storage / "weights")

    def answered() -> dict[str, Any] | None:
        [job] = running.head.jobs()
        assert job["status"] in ("PENDING", "RUNNING"), running.head.logs("train")
        answer = running.client.post("/v1/rank", json={"user_id": 1, "candidates": [1, 2, 3]})
        if answer.status_code != 200:
            return None
        ranked: dict[str, Any] = answer.json()
        # The first version is one that has learned nothing yet.
        return ranked if store.load(ranked["version"]).manifest.step > 0 else None

    ranked = eventually(answered, lambda: running.head.logs("train"))
    assert len(ranked["results"]) == 3


def test_the_trainer_stops_with_a_checkpoint_in_the_time_that_the_pods_give_it(running: Running) -> None:
    head = running.head
    eventually(lambda: f" {EVENTS:,} events " in head.logs("train"), lambda: head.logs("train"))
    assert f"stopped: {EVENTS:,} trained" in head.stop("train")
    assert head.jobs()[0]["status"] == "STOPPED"
    assert CheckpointStore(running.config.storage / "checkpoints").numbers()
