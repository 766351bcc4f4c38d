"""What every suite shares: where large test assets are, and how long each suite took."""

import collections
import os
import pathlib

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
