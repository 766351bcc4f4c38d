"""What a trainer tells beside its journal, and what the report makes of it when a run was killed."""

import pathlib
import time
from collections.abc import Iterator

import pytest

from grstream import config as configs
from grstream import lag as lags
from grstream import monitor, telemetry
from grstream.journal import Mark, ancestry, newest_run
from grstream.lag import LogEnds, behind
from grstream.ledger import Disposition
from grstream.monitor import Monitor
from grstream.quality_log import read
from grstream.ranks import Ranks
from grstream.telemetry import BY_PART, Kind, Metric, Part
from grstream.trainer import Trainer
from jobs.entries import Entries
from tests.exported import Exported
from tests.grstream.streams import make_config
from tests.grstream.test_train import GREETING, QuietBoard, _Killed, batches, run


class _Ends:
    """The log's end without a broker."""

    def __init__(self, ends: dict[int, int] | None) -> None:
        self.ends = ends

    def now(self) -> dict[int, int] | None:
        return self.ends

    def close(self) -> None:
        pass


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exported]:
    out = Exported()
    monkeypatch.setattr(monitor, "Exporter", lambda: out)
    monkeypatch.setattr(monitor, "LogEnds", lambda config: _Ends({0: 100}))
    return out


@pytest.fixture
def config(tmp_path: pathlib.Path) -> configs.Config:
    return make_config(
        tmp_path, "127.0.0.1:9", train={"checkpoint_every_s": 1000}, quality={"every_s": 0.001}
    )


def test_metrics_have_names_of_their_own_and_descriptions() -> None:
    every = {value for value in vars(telemetry).values() if isinstance(value, Metric)}
    assert set(telemetry.METRICS) == every
    assert len({m.name for m in telemetry.METRICS}) == len(telemetry.METRICS) > 20
    for metric in telemetry.METRICS:
        assert metric.name.startswith("grstream_")
        assert metric.description.endswith(".")
        assert bool(metric.boundaries) == (metric.kind is Kind.HISTOGRAM)
        assert metric.exported.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert all(len(values) == len(metric.labels) for values in metric.known)
        assert bool(metric.known) == (metric.kind is Kind.COUNTER and bool(metric.labels))


def test_every_end_of_an_offset_is_counted_from_the_start() -> None:
    assert {d for (d,) in telemetry.SETTLED.known} == {d.name.lower() for d in Disposition}


def test_a_run_exports_what_it_did(config: configs.Config, exported: Exported) -> None:
    stream = batches(20)
    trainer = run(config, stream)
    events = sum(b.new_events for b in stream)
    v = exported.values
    assert v["grstream_train_events",] == v["grstream_train_offsets", "trained"] == events
    assert v["grstream_train_steps",] == v["grstream_train_step_seconds",] == 20
    assert v["grstream_train_learned_seconds",] == 20
    assert v["grstream_train_tokens",] > events
    assert v["grstream_train_lag_offsets", "0"] == 100 - events
    newest = max(b.newest_event_ms for b in stream)
    assert v["grstream_train_freshness_seconds", "0"] == pytest.approx(time.time() - newest / 1000, abs=30)
    assert v["grstream_vocabulary_keys",] == len(trainer._learner.vocabulary)
    assert (v["grstream_gate_open",], v["grstream_stray_users",]) == (1, 0)
    figures = trainer._learner.quality.figures()
    for figure in figures:
        if figure.name == "ne":
            key = "grstream_quality_normalized_entropy", figure.window, figure.slice, str(figure.action)
            assert v[key] == figure.value
    assert {f.name for f in figures} >= {"ne", "gauc", "calibration", "hr@10", "events"}
    assert (
        v["grstream_quality_hit_rate", "1h", "all", "10"] >= v["grstream_quality_hit_rate", "1h", "all", "1"]
    )
    assert v["grstream_train_input_wait_seconds",] > 0
    assert v["grstream_train_executions",] == 1
    assert v["grstream_weights_published",] == v["grstream_weights_version",] > 0
    assert v["grstream_checkpoint_seconds",] == v["grstream_checkpoint_stall_seconds",] == 1
    # What has not happened is there, as 0.
    assert v["grstream_weights_publish_failures",] == v["grstream_train_offsets", "lost"] == 0
    assert {name for name, *_ in v} == {m.name for m in BY_PART[Part.TRAINER]}
    assert exported.refreshed > 0


def test_a_resumed_run_counts_from_zero_not_from_the_beginning(
    config: configs.Config, exported: Exported
) -> None:
    stream = batches(9)
    run(config, stream[:4])
    before = dict(exported.values)
    run(config, stream[4:])
    gained = (
        exported.values["grstream_train_offsets", "trained"] - before["grstream_train_offsets", "trained"]
    )
    assert gained == sum(b.new_events for b in stream[4:])


def test_a_gauge_that_is_no_more_is_not_a_number() -> None:
    out = Exported()
    out.set_all(telemetry.LAG, {(0,): 5, (1,): 6})
    out.set_all(telemetry.LAG, {(1,): 7})
    assert out.values["grstream_train_lag_offsets", "1"] == 7
    assert out.values["grstream_train_lag_offsets", "0"] != out.values["grstream_train_lag_offsets", "0"]


def test_the_log_holds_the_figures_of_the_last_moment(config: configs.Config, exported: Exported) -> None:
    stream = batches(12)
    trainer = run(config, stream)
    newest = Entries.of(read(config.storage / monitor.DIRECTORY)).newest()
    for figure in trainer._learner.quality.figures():
        words = {"window": figure.window, "slice": figure.slice, "figure": figure.name}
        if figure.action:
            words["action"] = figure.action
        found = newest.where(**words)
        assert found.value.tolist() == [figure.value]
        assert found.table["events"].to_pylist() == [figure.events]
    assert newest.where(figure="lag", partition=0).value.tolist() == [100 - sum(b.new_events for b in stream)]
    assert newest.one("trained_events") == newest.one("settled/trained") == sum(b.new_events for b in stream)
    assert newest.entries.tolist() == [12] * len(newest)


def test_entries_that_a_crash_undid_are_told_apart(
    config: configs.Config, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grstream.trainer.PROGRESS_S", 0)  # an entry a step
    monkeypatch.setattr(monitor, "PATIENCE", 0)
    stream = batches(8)
    run(config, stream[:3])
    lost = Trainer(config, Ranks(), QuietBoard(), None)
    with pytest.raises(RuntimeError, match="killed"):
        lost.run(_Killed([GREETING, *stream[3:6]]))
    run(config, stream[3:])
    journals = config.storage / "metrics"
    newest = newest_run(journals)
    assert newest
    line = list(ancestry(journals, Mark(newest, 10**9)))
    every = Entries.of(read(config.storage / monitor.DIRECTORY))
    assert len(every.words("run")) == 3
    steps = every.lasting(line).where(figure="step").value.tolist()
    assert sorted(set(steps)) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert len(set(every.where(figure="step").at) - set(every.lasting(line).at)) >= 3


def test_without_a_broker_nobody_waits_and_the_lag_is_unknown(config: configs.Config) -> None:
    began = time.monotonic()
    run(config, batches(3))
    assert time.monotonic() - began < 5
    newest = Entries.of(read(config.storage / monitor.DIRECTORY)).newest()
    assert not len(newest.where(figure="lag"))
    assert len(newest.where(figure="freshness_s"))


def test_ends_follow_the_broker(config: configs.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{0: 5, 1: 7}, None, {0: 9}])
    monkeypatch.setattr(lags, "ASK_S", 0.05)
    monkeypatch.setattr(lags.Lag, "ends", lambda self: next(answers, {0: 11}))
    ends = LogEnds(config.kafka)
    deadline = time.monotonic() + 5
    while ends.now() != {0: 11} and time.monotonic() < deadline:
        time.sleep(0.01)
    ends.close()
    assert ends.now() == {0: 11}
    assert behind({0: 5, 1: 7}, {0: 2}) == {0: 3, 1: 7}


def test_figures_are_computed_no_oftener_than_they_are_cheap(
    config: configs.Config, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While event time runs, an entry waits for a hundred times as long as the one before it took."""
    quality = config.quality.model_copy(update={"every_s": 1000.0, "windows_h": [0.0001, 1.0]})
    slow = config.model_copy(update={"quality": quality})
    monkeypatch.setattr("grstream.trainer.PROGRESS_S", 0)
    monkeypatch.setattr(monitor.QualityLog, "append", lambda *arguments: time.sleep(0.05))
    made: list[int] = []
    whole = Monitor._export_quality
    monkeypatch.setattr(Monitor, "_export_quality", lambda self, *a: (made.append(1), whole(self, *a)))
    began = time.monotonic()
    run(slow, batches(30))
    assert time.monotonic() - began < 5
    assert len(made) <= 3  # the first, at most one after it, and the last
