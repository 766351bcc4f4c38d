"""Histories at their edges: what a batch must be, names, memory, snapshots that cannot be used."""

import dataclasses

import numpy as np
import pytest

from grstream import snapshots
from grstream.config import HistoriesConfig
from grstream.events import EventBatch, Tombstones
from grstream.histories import OffsetOrderError, RollingHistories
from grstream.keys import ABSENT, Keys
from grstream.ledger import Disposition, OffsetRange
from grstream.microbatch import Role
from grstream.schema import Schema
from grstream.snapshots import SnapshotError

SCHEMA = Schema(("click",), ())


def batch(users, *, start=0, times=None, keys=None, features=0, names=None) -> EventBatch:
    """Events whose items are their offsets."""
    n = len(users)
    offsets = np.arange(start, start + n)
    return EventBatch(
        partition=0,
        offsets=offsets,
        users=np.array(users, np.int64),
        items=offsets.copy(),
        actions=np.ones(n, np.int32),
        times=offsets + 1000 if times is None else np.array(times, np.int64),
        features=np.zeros((n, features), np.int64),
        event_keys=np.zeros(n, np.int64) if keys is None else np.array(keys, np.int64),
        item_names=names or {},
    )


def make(**config) -> RollingHistories:
    return RollingHistories(HistoriesConfig(**config), features=0)


def test_a_window_that_rolls_within_a_micro_batch_gives_two_sequences() -> None:
    histories = make(window=4, chunk=3)
    histories.append(batch([7] * 6))
    packed = histories.pack(read_ms=5)
    assert packed.lengths.tolist() == [5, 3]
    assert packed.items.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert packed.roles.tolist() == [Role.NEW] * 5 + [Role.CONTEXT] * 2 + [Role.NEW]
    assert packed.offsets.tolist() == [0, 1, 2, 3, 4, 5]
    assert packed.ranges == (OffsetRange(0, 0, 6, Disposition.TRAINED),)
    assert (packed.newest_event_ms, packed.read_ms) == (1005, 5)
    assert histories.history(7).items.tolist() == [3, 4, 5]
    assert histories.history(7).epoch == 1


def test_a_late_event_in_front_of_a_new_one_leaves_that_one_what_it_came_upon() -> None:
    histories = make()
    histories.append(batch([7] * 4, times=[10, 20, 30, 25]))
    packed = histories.pack()
    assert packed.items.tolist() == [0, 1, 2, 0, 1, 3]
    assert packed.roles.tolist() == [Role.NEW] * 3 + [Role.CONTEXT] * 2 + [Role.NEW_LATE]
    assert histories.history(7).times.tolist() == [10, 20, 25, 30]


def test_new_events_of_a_forgotten_user_are_still_emitted_and_it_begins_again() -> None:
    histories = make()
    histories.append(batch([7, 7]), tombstones=Tombstones.of([(2, 7), (3, 8)]))
    assert len(histories.history(7).items) == 0
    with pytest.raises(OffsetOrderError, match="beyond 3"):
        histories.append(batch([7], start=3))
    histories.append(batch([7], start=4))
    packed = histories.pack()
    assert packed.items.tolist() == [0, 1, 4]
    assert packed.lengths.tolist() == [2, 1]
    assert (histories.history(7).epoch, histories.history(7).appended) == (4, 1)


def test_an_event_of_before_a_tombstone_that_is_sent_again_does_not_bring_the_user_back() -> None:
    histories = make()
    histories.append(batch([7], keys=[5]), tombstones=Tombstones.of([(1, 7)]))
    histories.append(batch([7], start=2, keys=[5]))
    assert len(histories.history(7).items) == 0


def test_names_of_one_fetch_hold_on_both_sides_of_a_tombstone() -> None:
    histories = make()
    names = {i: str(i) for i in range(10_000)}
    histories.append(batch([7] * 10_000, names=names), tombstones=Tombstones.of([(20_000, 8)]))
    assert histories.pack().item_names == names


def test_a_micro_batch_settles_what_its_reader_settled_with_the_rest() -> None:
    histories = make()
    histories.append(batch([1, 1, 2], keys=[5, 5, 0]))
    histories.settle(OffsetRange(0, 3, 4, Disposition.DEAD_LETTER))
    histories.append(batch([1, 2], start=4))
    assert histories.pending == 4
    assert histories.pack().ranges == (
        OffsetRange(0, 0, 1, Disposition.TRAINED),
        OffsetRange(0, 1, 2, Disposition.DUPLICATE),
        OffsetRange(0, 2, 3, Disposition.TRAINED),
        OffsetRange(0, 3, 4, Disposition.DEAD_LETTER),
        OffsetRange(0, 4, 6, Disposition.TRAINED),
    )
    assert histories.pending == 0
    assert histories.pack().ranges == ()


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_an_id_is_a_duplicate_up_to_the_window_and_not_beyond(size) -> None:
    keys = [1, 2, 3, 1, 4, 2]  # 1 after three offsets, 2 after four
    histories = make(duplicate_window=3)
    for start in range(0, 6, size):
        part = keys[start : start + size]
        histories.append(batch([7] * len(part), start=start, keys=part))
    assert histories.history(7).items.tolist() == [0, 1, 2, 4, 5]


def test_a_reader_that_does_not_train_has_nothing_to_pack() -> None:
    histories = RollingHistories(HistoriesConfig(), features=0, track_new=False)
    histories.append(batch([1]))
    with pytest.raises(RuntimeError, match="track_new"):
        histories.pack()


def test_events_out_of_offset_order_are_refused() -> None:
    histories = make()
    histories.append(batch([1, 2]))
    with pytest.raises(OffsetOrderError, match="beyond 1"):
        histories.append(batch([1], start=1))
    backwards = batch([1, 1], start=5)
    with pytest.raises(OffsetOrderError):
        histories.append(dataclasses.replace(backwards, offsets=backwards.offsets[::-1]))


def test_a_batch_of_another_partition_or_width_is_refused() -> None:
    with pytest.raises(ValueError, match="partition 0, got 1"):
        make().append(dataclasses.replace(batch([1]), partition=1))
    with pytest.raises(ValueError, match="expected 0 features"):
        make().append(batch([1], features=2))


def test_names_stay_with_the_items_that_histories_hold() -> None:
    histories = make(window=8, chunk=8)
    for start in range(0, 20_000, 1000):
        names = {i: str(i) for i in range(start, start + 1000)}
        histories.append(batch([1] * 1000, start=start, names=names))
        assert histories.pack().item_names == names
    held = histories.history(1)
    assert held.item_names == {i: str(i) for i in held.items.tolist()}
    assert len(histories._names._names) < 6_000


def test_memory_does_not_grow_once_the_budget_is_reached() -> None:
    histories = make(window=32, chunk=8, max_users=1000, max_events=8000, duplicate_window=1000)
    random = np.random.default_rng(0)
    sizes = []
    for start in range(0, 30_000, 250):
        users = random.zipf(1.2, 250) % 20_000
        histories.append(batch(users, start=start, keys=np.arange(start + 1, start + 251)))
        histories.pack()
        sizes.append(histories.counters().bytes)
    assert max(sizes[60:]) < 1.05 * sizes[60]
    counters = histories.counters()
    assert counters.users <= 1000
    assert counters.events <= 8000
    assert counters.evicted > 1000


def test_a_snapshot_of_another_configuration_is_refused(tmp_path) -> None:
    histories = make(window=32)
    histories.append(batch([1]))
    histories.snapshot(tmp_path / "s", 1, SCHEMA)
    with pytest.raises(SnapshotError, match=r"'window': 32.*expected.*'window': 64"):
        RollingHistories.restore(tmp_path / "s", HistoriesConfig(window=64), schema=SCHEMA)


def of_columns(users: list[int], start: int, features: Keys) -> EventBatch:
    return dataclasses.replace(batch(users, start=start), features=features)


def test_a_snapshot_restored_under_a_grown_schema_is_one_in_which_what_is_new_was_absent(tmp_path) -> None:
    old = Schema(("click", "like"), ("context.lang", "item.genre"))
    new = Schema(
        ("click", "like", "buy"), ("context.device", "context.lang", "item.brand", "item.genre", "item.size")
    )
    draw = np.random.default_rng(0)
    users, keys = draw.integers(0, 9, 300), draw.integers(1, 1 << 60, (300, 2))
    written = RollingHistories(HistoriesConfig(window=16, chunk=4), features=2)
    written.append(of_columns(users, 0, keys))
    written.snapshot(tmp_path / "old", 300, old)
    grown, at = RollingHistories.restore(tmp_path / "old", HistoriesConfig(window=16, chunk=4), schema=new)
    assert at == 300
    expected = RollingHistories(HistoriesConfig(window=16, chunk=4), features=5)
    absent = np.full(300, ABSENT)
    wide = np.stack([absent, keys[:, 0], absent, keys[:, 1], absent], axis=1)
    expected.append(of_columns(users, 0, wide))
    assert np.array_equal(grown.history(3).features, expected.history(3).features)
    for histories in (grown, expected):
        histories.append(of_columns(users, 300, np.full((300, 5), 7)))
        histories.snapshot(tmp_path / f"{histories is grown}", 600, new)
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (Schema(("like", "click"), ("item.genre",)), "does not begin with click, like"),
        (Schema(("click",), ("item.genre",)), "lacks like"),
        (Schema(("click", "like"), ()), "lacks the features item.genre"),
        (Schema(("click", "like"), ("item.kind",)), "lacks the features item.genre"),
    ],
)
def test_a_snapshot_of_other_actions_or_features_is_refused(tmp_path, schema: Schema, reason: str) -> None:
    histories = RollingHistories(HistoriesConfig(), features=1)
    histories.append(batch([1], features=1))
    histories.snapshot(tmp_path / "s", 1, Schema(("click", "like"), ("item.genre",)))
    with pytest.raises(SnapshotError, match=reason):
        RollingHistories.restore(tmp_path / "s", HistoriesConfig(), schema=schema)


def test_a_snapshot_of_before_names_were_in_it_is_refused(tmp_path) -> None:
    identity = {"format": 1, "partition": 0, "features": 0, **HistoriesConfig().model_dump()}
    snapshots.write(tmp_path / "s", {"next_offset": 1, "identity": identity, "happened": {}}, [])
    with pytest.raises(SnapshotError, match=r"'format': 1.*expected.*'format': 2.*rebuild from the log"):
        RollingHistories.restore(tmp_path / "s", HistoriesConfig(), schema=SCHEMA)


def test_a_snapshot_that_is_cut_off_or_has_a_flipped_bit_is_refused(tmp_path) -> None:
    histories = make()
    histories.append(batch(list(range(50)) * 4, names={0: "zero"}))
    path = tmp_path / "s"
    histories.snapshot(path, 200, SCHEMA)
    whole = path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SnapshotError):
            RollingHistories.restore(path, HistoriesConfig(), schema=SCHEMA)
    times = whole.index(np.arange(1000, 1200, 50).tobytes())  # of user 0
    path.write_bytes(whole[:times] + b"\x01" + whole[times + 1 :])
    with pytest.raises(SnapshotError, match="checksum"):
        RollingHistories.restore(path, HistoriesConfig(), schema=SCHEMA)
    with pytest.raises(SnapshotError, match="absent"):
        RollingHistories.restore(tmp_path / "absent", HistoriesConfig(), schema=SCHEMA)


def test_a_snapshot_is_not_taken_of_a_past_offset(tmp_path) -> None:
    histories = make()
    histories.append(batch([1, 2, 3]))
    with pytest.raises(OffsetOrderError, match="already at 2"):
        histories.snapshot(tmp_path / "s", 2, SCHEMA)
