"""One secured broker for the suite."""

from collections.abc import Iterator

import pytest

from tests.security.secured_kafka import SecuredKafka, running


@pytest.fixture(scope="session")
def secured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecuredKafka]:
    if not request.config.getoption("--apache-kafka"):
        pytest.skip("only Apache Kafka authenticates and encrypts: --apache-kafka")
    start = request.getfixturevalue("assets") / "kafka" / "start"
    if not start.exists():
        pytest.skip(f"no Apache Kafka at {start}")
    with running(start, tmp_path_factory.mktemp("secured")) as kafka:
        yield kafka
