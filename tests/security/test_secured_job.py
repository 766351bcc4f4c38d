"""A whole training job on Ray reads a log that is encrypted and asks for a password."""

import pathlib
from collections.abc import Iterator

import pytest
import ray

from grstream import config as configs
from grstream.audit import audit
from grstream.kafka import create_topic
from grstream.ledger import Disposition
from grstream.train import train
from grstream.until import Until
from grstream.weight_store import WeightStore
from tests.grstream.streams import Stream, make_config
from tests.security.secured_kafka import PASSWORD, SecuredKafka

pytestmark = [pytest.mark.kafka, pytest.mark.ray_cluster]


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_job_trains_on_a_secured_log_and_writes_no_secret(
    secured: SecuredKafka, cluster: None, tmp_path: pathlib.Path
) -> None:
    plain = make_config(tmp_path, "unused", source={"flush_events": 64, "flush_ms": 100})
    client = secured.config(topic=plain.kafka.topic)
    config = configs.parse(plain.model_dump() | {"kafka": client.model_dump()})
    create_topic(config.kafka, 2)
    Stream(config).send(400)
    final = train(config, Until.parse("now", config))
    assert final is not None
    assert sum(final.settled.values()) == 400
    found = audit(config)
    assert found.passed
    assert found.count(Disposition.DEAD_LETTER) > 0, "letters went to a log of their own"
    assert WeightStore(config.storage / "weights").numbers()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if PASSWORD.encode() in path.read_bytes()]
