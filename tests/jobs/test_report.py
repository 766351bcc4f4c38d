"""The page of a run: figures that are those of the log, and plots that hold what they say."""

import pathlib
import re
import sys
import time

import numpy as np
import pytest

from grstream import config as configs
from grstream import monitor
from grstream.journal import Journal, Mark
from grstream.monitor import DIRECTORY
from grstream.quality import ALL
from grstream.quality_log import QualityLog, Row, read
from jobs import plots, report
from jobs.entries import Entries
from tests.grstream.streams import make_config
from tests.grstream.test_train import batches, run

NOW = time.time_ns() // 1_000_000
FIRST, SECOND, THIRD = (f"170000000000{i}-0000000{i}" for i in range(3))


@pytest.fixture
def config(tmp_path: pathlib.Path) -> configs.Config:
    return make_config(tmp_path, "127.0.0.1:9", "shop & co", quality={"every_s": 0.001})


def moment(step: int, lag: int = 0) -> list[Row]:
    settled = {
        "trained": 10 * step,
        "duplicate": 3,
        "dead_letter": 2,
        "tombstone": 1,
        "control": 0,
        "lost": 70,
    }
    return [
        Row("ne", 1 - step / 100, "24h", ALL, "click", events=10 * step),
        Row("gauc", 0.5 + step / 100, "24h", ALL, "click", events=8 * step),
        Row("events", 10 * step, "24h", ALL, events=10 * step),
        Row("gauc_share", 1, "24h", ALL, events=10 * step),
        Row("hr@10", 0.25, "24h", ALL, events=64),
        Row("missed", 4321, "24h"),
        *(Row(f"settled/{name}", count) for name, count in settled.items()),
        *(Row(name, step) for name in ("trained_events", "step", "version", "gate_open", "vocabulary_keys")),
        *(Row("lag", lag + p, partition=p) for p in range(2)),
        Row("freshness_s", 7200, partition=0),
    ]


@pytest.fixture
def three_runs(config: configs.Config) -> configs.Config:
    """A run, one that died before it saved, and one that went on from the first's second step."""
    journals, log = config.storage / "metrics", config.storage / DIRECTORY
    for run_, resumed, steps in (
        (FIRST, None, (1, 2, 3)),
        (SECOND, Mark(FIRST, 2), (77,)),
        (THIRD, Mark(FIRST, 2), (3, 4)),
    ):
        Journal(journals, run_, resumed).close()
        entries = QualityLog(log, run_, 90)
        for number, step in enumerate(steps, start=1):
            at_ms = NOW - 1000 * (100 - 10 * int(run_[12])) + number
            entries.append(Mark(run_, number), 1_700_000_000_000 + 3_600_000 * step, moment(step, 40), at_ms)
        entries.close()
    return config


def text(page: str) -> str:
    page = re.sub(r"<(svg|style).*?</\1>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_the_page_says_what_the_log_says(three_runs: configs.Config) -> None:
    said = text(report.report(three_runs))
    assert "24h click 40 0.9600 — 0.5400 32 100% — 0.2500 —" in said
    assert "24h like 40 — — — — 100% — 0.2500 —" in said
    assert "1h click — — — — — — — — —" in said
    for row in ("trained 40 ", "duplicate 3 ", "dead letter 2 ", "lost 70 ", "missed by 24h 4,321 "):
        assert row in said
    assert "lag, offsets 81" in said
    assert "freshness of the stalest partition 2.0 h" in said
    assert "grstream · shop &amp; co" in said


def test_what_a_crash_undid_is_in_no_figure_of_quality(three_runs: configs.Config) -> None:
    said = text(report.report(three_runs))
    assert "undone: none went on from it" in said
    assert "went on from after 2 turns of 3" in said
    assert "the newest" in said
    assert "0.2300" not in said  # the entropy of the run that died
    every = Entries.of(read(three_runs.storage / DIRECTORY))
    lasting = every.lasting([Mark(THIRD, 10**9), Mark(FIRST, 2)])
    assert sorted(lasting.where(figure="ne").value.tolist()) == pytest.approx([0.96, 0.97, 0.98, 0.99])


def test_the_page_is_one_file_with_its_plots(three_runs: configs.Config, tmp_path: pathlib.Path) -> None:
    config = tmp_path / "shop.yaml"
    config.write_text(
        f"storage: {three_runs.storage}\nevents: {{actions: [click, like]}}\nkafka: {{topic: shop}}\n"
    )
    out = tmp_path / "page.html"
    assert report.main(["--config", str(config), "--out", str(out)]) == 0
    page = out.read_text()
    assert page.count("<svg") == page.count("</svg>") == 4  # two windows, by history, the stream
    outside = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#)([^"')\s>]+)""", page))
    assert outside <= {"http://www.w3.org/1999/xlink"}


def test_a_run_of_the_trainer_becomes_a_page(config: configs.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grstream.trainer.PROGRESS_S", 0)
    stream = batches(30)
    trainer = run(config, stream)
    said = text(report.report(config))
    [ne] = [
        f.value
        for f in trainer._learner.quality.figures()
        if (f.window, f.slice, f.action, f.name) == ("24h", ALL, "like", "ne")
    ]
    assert f"24h like {sum(b.new_events for b in stream)} {ne:.4f} " in said
    assert "lag, offsets unknown" in said


def test_only_what_is_asked_for_is_in_it(three_runs: configs.Config) -> None:
    assert FIRST in Entries.of(read(three_runs.storage / DIRECTORY)).words("run")
    after = NOW - 85_000  # the second run
    assert Entries.of(read(three_runs.storage / DIRECTORY, after)).words("run") == {THIRD}
    assert report._since("2d") == pytest.approx(report._since("48h"), abs=50)
    assert report._since("2026-01-01T00:00:00+00:00") == 1_767_225_600_000
    with pytest.raises(FileNotFoundError, match="no entry since"):
        report.report(three_runs, "2100-01-01")


@pytest.mark.parametrize(
    ("since", "storage", "problem"),
    [("yesterday", "there", "expected 12h, 7d or an ISO date"), ("7d", "nowhere", "nothing was trained")],
)
def test_what_cannot_be_shown_is_said(
    three_runs: configs.Config,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    since: str,
    storage: str,
    problem: str,
) -> None:
    config = tmp_path / "shop.yaml"
    there = three_runs.storage if storage == "there" else tmp_path / storage
    config.write_text(f"storage: {there}\nevents: {{actions: [click]}}\n")
    assert report.main(["--config", str(config), "--since", since]) == 2
    assert problem in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(
    three_runs: configs.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "jobs.plots")
    monkeypatch.delattr("jobs.plots")
    with pytest.raises(configs.ConfigError, match=r"grstream\[plots\]"):
        report.report(three_runs)


# -- lines --------------------------------------------------------------------------------------------------


def entries(tmp_path: pathlib.Path, moments: list[tuple[int, int, list[Row]]]) -> Entries:
    """Of (wall clock, event time, rows) each."""
    log = QualityLog(tmp_path / "log", FIRST, 90)
    for at_ms, event_ms, rows in moments:
        log.append(Mark(FIRST, 1), event_ms, rows, NOW + at_ms)
    log.close()
    return Entries.of(read(tmp_path / "log"))


def test_a_line_is_broken_where_event_time_goes_back(tmp_path: pathlib.Path) -> None:
    times = [10, 20, 30, 5, 15]
    of = entries(tmp_path, [(i, t, [Row("ne", t / 10, "1h", ALL, "a")]) for i, t in enumerate(times)])
    _, ms, values = plots._line("", of)
    assert ms.tolist() == [10, 20, 30, 5, 5, 15]
    assert values.tolist()[:3] == [1, 2, 3]
    assert np.isnan(values[3])
    assert values.tolist()[4:] == [0.5, 1.5]


def test_a_line_is_broken_where_another_run_begins(three_runs: configs.Config) -> None:
    every = Entries.of(read(three_runs.storage / DIRECTORY))
    _, _, values = plots._wall_line("", every.where(figure="step"))
    assert [v if v == v else None for v in values.tolist()] == [1, 2, 3, None, 77, None, 3, 4]


def test_many_partitions_are_their_greatest_and_their_median(tmp_path: pathlib.Path) -> None:
    count = plots.PARTITIONS + 3
    moments = [(i, 0, [Row("lag", (p + i) ** 2, partition=p) for p in range(count)]) for i in range(3)]
    (greatest, at, most), (_, _, middle) = plots._by_partition(entries(tmp_path, moments))
    assert greatest == "greatest of 11 partitions"
    assert (at - NOW).tolist() == [0, 1, 2]
    assert most.tolist() == [100, 121, 144]
    assert middle.tolist() == [25, 36, 49]


def test_speed_is_between_entries_and_none_at_a_restart(tmp_path: pathlib.Path) -> None:
    counts = [0, 500, 2500, 1000, 1100]
    moments = [(i * 2000, 0, [Row("trained_events", c)]) for i, c in enumerate(counts)]
    at, speed = plots._speed(entries(tmp_path, moments))
    assert (at - NOW).tolist() == [2000, 4000, 6000, 8000]
    assert speed.tolist()[:2] == [250, 1000]
    assert np.isnan(speed[2])
    assert speed[3] == 50


def test_seconds_are_told_in_a_unit_that_suits_them() -> None:
    def scaled(seconds: float) -> tuple[float, str]:
        [(_, _, values)], unit = plots._scaled([("", np.array([0]), np.array([seconds]))])
        return float(values[0]), unit

    assert scaled(0.5) == (500, "ms")
    assert scaled(90) == (90, "seconds")
    assert scaled(7200) == (2, "hours")
    assert scaled(86_400 * 30) == (30, "days")


@pytest.fixture(autouse=True)
def _no_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def __init__(self, config: configs.KafkaConfig) -> None: ...
        def now(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(monitor, "LogEnds", Silent)
