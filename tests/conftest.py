"""What every suite shares: where large test assets are, and how long each suite took."""

import collections
import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

import hypothesis
import pytest

# On a busy machine one example's time says nothing about the code.
hypothesis.settings.register_profile("grstream", deadline=None)
hypothesis.settings.load_profile("grstream")

ROOT = pathlib.Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--apache-kafka", action="store_true", help="start Apache Kafka from the test assets")


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """Data sets, Kafka's jars and CRDs, which are no part of the project; skips where they are absent."""
    named = os.environ.get("GRSTREAM_TEST_ASSETS")
    path = pathlib.Path(named) if named else ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"no test assets at {path}: set GRSTREAM_TEST_ASSETS")
    return path


class BrokerProcess(Protocol):
    """Starts `grstream broker` on a directory as a child process; ends it on leaving the context."""

    def __call__(
        self, directory: pathlib.Path, port: int = 0
    ) -> contextlib.AbstractContextManager[tuple[subprocess.Popen[str], str]]: ...


@pytest.fixture(scope="session")
def broker_process() -> BrokerProcess:
    """`with broker_process(directory) as (process, bootstrap)`: for tests that kill a broker."""

    def start(
        directory: pathlib.Path, port: int = 0
    ) -> contextlib.AbstractContextManager[tuple[subprocess.Popen[str], str]]:
        command = [
            sys.executable,
            "-m",
            "grstream.cli",
            "broker",
            "--dir",
            str(directory),
            "--port",
            str(port),
        ]
        return _running(command)

    return start


@pytest.fixture(scope="session")
def any_broker_process(request: pytest.FixtureRequest, broker_process: BrokerProcess) -> BrokerProcess:
    """As `broker_process`, Apache Kafka if that is asked for."""
    if not request.config.getoption("--apache-kafka"):
        return broker_process
    start = request.getfixturevalue("assets") / "kafka" / "start"
    if not start.exists():
        pytest.skip(f"no Apache Kafka at {start}")

    def apache(
        directory: pathlib.Path, port: int = 0
    ) -> contextlib.AbstractContextManager[tuple[subprocess.Popen[str], str]]:
        command = [str(start), "--dir", str(directory), "--port", str(port or _two_free_ports())]
        # Tests give records times of years ago, which the broker would delete at its next look, 5 minutes on.
        return _running([*command, "--set", "log.retention.ms=-1"])

    return apache


@pytest.fixture(scope="session")
def kafka_bootstrap(
    any_broker_process: BrokerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The broker of the tests marked kafka: the one that is named, else Apache's if asked for, else ours."""
    named = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
    if named:
        yield named
        return
    with any_broker_process(tmp_path_factory.mktemp("kafka")) as (_, bootstrap):
        yield bootstrap


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A broker as a child process, from its `ready` line on, and its address."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            ready = re.match(r"ready (?:PLAINTEXT=)?(\S+)", line)
            assert ready, f"{command} did not start; it said {line!r}"
            yield process, ready[1]
        finally:
            process.terminate()


def _two_free_ports() -> int:
    """The first of two neighbouring free ports: Apache Kafka's broker and its controller."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError):
                second.bind(("127.0.0.1", port + 1))
                return port
    raise RuntimeError("no two neighbouring free ports in 100 tries")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seconds: dict[str, float] = collections.defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.location[0]] += report.duration
    terminalreporter.section("seconds by suite")
    for suite, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{spent:8.1f}  {suite}")
