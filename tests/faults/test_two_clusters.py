"""A cluster that trains and one that serves, which share nothing but a directory and the log."""

import pathlib
import time
from collections.abc import Iterator

import httpx
import pytest

from grstream.audit import audit
from grstream.config import Config
from grstream.kafka import create_topic
from grstream.weight_store import WeightStore
from jobs.stack import free_port
from tests.conftest import BrokerProcess
from tests.grstream.streams import Stream, make_config
from tests.ray_head import RayHead

pytestmark = pytest.mark.ray_cluster

PATIENCE_S = 240.0


@pytest.fixture
def config(broker_process: BrokerProcess, tmp_path: pathlib.Path) -> Iterator[Config]:
    with broker_process(tmp_path / "broker") as (_, bootstrap):
        made = make_config(
            tmp_path / "storage",
            bootstrap,
            source={"flush_ms": 100},
            train={"publish_every_s": 0.5},
            serve={"port": free_port(), "poll_weights_s": 0.1},
        )
        create_topic(made.kafka, 2)
        yield made


def version(config: Config, above: int = 0) -> int:
    """The first version above another that a rank is answered by."""
    deadline = time.monotonic() + PATIENCE_S
    question = {"user_id": 7, "candidates": [1, 2, 3]}
    seen: object = None
    while time.monotonic() < deadline:
        try:
            answer = httpx.post(f"http://127.0.0.1:{config.serve.port}/v1/rank", json=question, timeout=30)
        except httpx.TransportError as error:
            seen = error
        else:
            seen = answer.text
            if answer.status_code == 200 and answer.json()["version"] > above:
                found: int = answer.json()["version"]
                return found
        time.sleep(0.2)
    raise AssertionError(f"no version above {above} answered; the last answer: {seen}")


@pytest.mark.slow
def test_versions_go_from_one_cluster_to_another_through_a_directory(
    config: Config, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config.model_dump_json())
    stream = Stream(config)
    stream.send(300)
    with RayHead(tmp_path / "training", 3) as training, RayHead(tmp_path / "serving", 2) as serving:
        application = {"name": "grstream", "route_prefix": "/", "import_path": "serve.app:build"}
        serving.deploy(
            {
                "http_options": {"host": config.serve.host, "port": config.serve.port},
                "applications": [{**application, "args": {"config": str(path)}}],
            }
        )
        training.submit("train", f"python -m jobs.train_stream --config {path}")
        first = version(config)
        stream.send(300)
        second, store = version(config, above=first), WeightStore(config.storage / "weights")
        while store.load(second).manifest.step == 0:  # it has learned nothing yet
            second = version(config, above=second)
        said = training.stop("train")
        version(config, above=second - 1)  # what trained has gone, what serves stays
        assert "stopped:" in said
    assert audit(config).passed
