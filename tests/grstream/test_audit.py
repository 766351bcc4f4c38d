"""An audit finds what went wrong: it must fail for each way in which an offset can."""

import pathlib

import pytest

from grstream import config as configs
from grstream.audit import Audit, NothingToAudit, audit
from grstream.checkpoints import CheckpointStore, Record
from grstream.journal import Journal
from grstream.kafka import create_topic
from grstream.ledger import Disposition, Ledger, OffsetRange
from grstream.reader import LogReader
from grstream.until import Until
from tests.grstream.streams import Stream, make_config

pytestmark = pytest.mark.kafka

TRAINED = Disposition.TRAINED


@pytest.fixture
def config(tmp_path: pathlib.Path, kafka_bootstrap: str) -> configs.Config:
    """A topic of ten records."""
    config = make_config(tmp_path, kafka_bootstrap)
    create_topic(config.kafka, 1)
    stream = Stream(config)
    stream.send(10)
    return config


def checkpoint(
    config: configs.Config,
    ranges: list[OffsetRange],
    journaled: list[OffsetRange] | None = None,
    events: int | None = None,
    listed: int | None = None,
) -> None:
    journal = Journal(config.storage / "metrics", "run", None)
    for r in ranges if journaled is None else journaled:
        journal.settled([r])
    journal.close()
    ledger = Ledger(ranges)
    if listed is not None:
        ledger.settle(listed)
    record = Record(
        number=1,
        run="run",
        entries=journal.mark.entries,
        step=1,
        events=ledger.count(TRAINED) if events is None else events,
        newest_event_ms=0,
        created_ms=0,
    )
    CheckpointStore(config.storage / "checkpoints").write(record, ledger, lambda directory: None)


@pytest.fixture
def truth(config: configs.Config) -> list[OffsetRange]:
    """What the log says, offset by offset, as an audit of a false account finds it."""
    checkpoint(config, [OffsetRange(0, o, o + 1, Disposition.CONTROL) for o in range(10)])
    found = {offset: expected for offset, _, expected in audit(config).partitions[0].wrong}
    assert len(found) == 10
    (config.storage / "metrics" / "run.jsonl").unlink()
    (config.storage / "checkpoints").rename(config.storage / "false")
    return [OffsetRange(0, o, o + 1, found[o]) for o in range(10)]


def test_a_true_account_passes(config: configs.Config, truth: list[OffsetRange]) -> None:
    checkpoint(config, truth)
    found = audit(config)
    assert found.passed
    assert sum(found.count(d) for d in Disposition) == 10


def test_without_a_checkpoint_there_is_nothing_to_audit(config: configs.Config) -> None:
    with pytest.raises(NothingToAudit):
        audit(config)


def test_an_offset_that_nothing_settled_is_missing(config: configs.Config, truth: list[OffsetRange]) -> None:
    checkpoint(config, [r for r in truth if r.start != 4])
    assert [audit(config).partitions[0].missing, audit(config).passed] == [[4], False]


def test_an_offset_that_two_steps_settled_is_found_twice(
    config: configs.Config, truth: list[OffsetRange]
) -> None:
    checkpoint(config, truth, journaled=[*truth, truth[7]])
    assert [audit(config).partitions[0].twice, audit(config).passed] == [[7], False]


def test_an_offset_that_no_step_settled_is_found(config: configs.Config, truth: list[OffsetRange]) -> None:
    checkpoint(config, truth, journaled=truth[:-1])
    assert [audit(config).partitions[0].unjournaled, audit(config).passed] == [[9], False]


def test_a_false_disposition_is_found(config: configs.Config, truth: list[OffsetRange]) -> None:
    false = truth[3]._replace(disposition=Disposition.DUPLICATE)
    checkpoint(config, [*truth[:3], false, *truth[4:]])
    found = audit(config)
    assert found.partitions[0].wrong == [(3, Disposition.DUPLICATE, truth[3].disposition)]
    assert not found.passed


def test_a_count_of_events_that_differs_from_the_ledger_is_found(
    config: configs.Config, truth: list[OffsetRange]
) -> None:
    checkpoint(config, truth, events=99)
    assert not audit(config).passed


def test_where_a_ledger_counts_alone_its_counts_are_held_against_the_journals(
    config: configs.Config, truth: list[OffsetRange]
) -> None:
    def found(journaled: list[OffsetRange]) -> Audit:
        checkpoint(config, truth, journaled=journaled, listed=0)
        partitions = audit(config)
        (config.storage / "metrics" / "run.jsonl").unlink()
        (config.storage / "checkpoints").rename(
            config.storage / f"gone-{len(list(config.storage.iterdir()))}"
        )
        return partitions

    assert found(truth).passed
    assert sum(found(truth).count(d) for d in Disposition) == 10
    without = found(truth[:-1])
    assert (without.partitions[0].missing, without.partitions[0].uncounted) == ([9], 1)
    assert found([*truth, truth[7]]).partitions[0].twice == [7]
    false = truth[3]._replace(disposition=Disposition.DUPLICATE)
    other = found([*truth[:3], false, *truth[4:]]).partitions[0]
    assert other.uncounted == 2
    assert other.wrong == [(3, Disposition.DUPLICATE, truth[3].disposition)]


@pytest.mark.parametrize("late_labels", ["count", "train"])
def test_the_audit_knows_what_is_to_become_of_exposures_and_their_labels(
    tmp_path: pathlib.Path, kafka_bootstrap: str, late_labels: str
) -> None:
    exposures = {"window_ms": 60, "late_labels": late_labels, "max_open": 40}
    events = {"actions": ["click", "like"], "exposures": exposures}
    config = make_config(tmp_path, kafka_bootstrap, events=events)
    create_topic(config.kafka, 1)
    Stream(config, exposures=True).send(600)
    read = LogReader(config, 0, Ledger(), Until.parse("now", config)).batches()
    ranges = [r for batch in read for r in batch.ranges]
    found = Ledger(ranges)
    learned = found.count(TRAINED) + (late_labels == "train") * found.count(Disposition.CORRECTION)
    checkpoint(config, ranges, events=learned)
    assert audit(config).passed
    assert found.count(Disposition.JOINED) > 20
    assert found.count(Disposition.CORRECTION) > 20
    (config.storage / "metrics" / "run.jsonl").unlink()
    (config.storage / "checkpoints").rename(config.storage / "true")
    at = next(i for i, r in enumerate(ranges) if r.disposition == Disposition.JOINED)
    ranges[at] = ranges[at]._replace(disposition=Disposition.CORRECTION)
    checkpoint(config, ranges)
    assert (ranges[at].start, Disposition.CORRECTION, Disposition.JOINED) in audit(config).partitions[0].wrong
