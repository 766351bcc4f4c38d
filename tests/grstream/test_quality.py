"""Windowed figures, against slow and obvious versions of themselves."""

import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grstream import quality
from grstream.config import QualityConfig
from grstream.keys import Namespace, keys_of_ints
from grstream.learner import Learner
from grstream.metrics import Predictions, entropy, gauc, log_loss, user_aucs
from grstream.quality import ALL, LATE, PARTS, WindowedQuality, slice_names
from tests.grstream.micro_batches import micro_batch, random_batches
from tests.grstream.streams import make_config

HOUR = 3_600_000
ACTIONS = ["click", "like"]
CONFIG = QualityConfig(windows_h=[1, 24], hit_at=[1, 10], history=[1, 10])


def stream(seed: int, events: int, hours: float, users: int = 20, disorder_ms: int = 0) -> Predictions:
    """Events in time order but for some disorder, liked by a user's own rate, predicted with noise."""
    random = np.random.default_rng(seed)
    times = np.sort(random.integers(0, int(hours * HOUR), events)) + 400 * HOUR
    times -= random.integers(0, disorder_ms + 1, events)
    who = random.zipf(1.6, events) % users
    rates = random.random((users, len(ACTIONS)))[who]
    return Predictions(
        users=keys_of_ints(Namespace.USER, who),
        items=random.integers(0, 50, events),
        times=times,
        partitions=(who % 3).astype(np.int32),
        offsets=np.arange(events),
        late=random.random(events) < 0.05,
        history=random.integers(0, 14, events).astype(np.int32),
        labels=random.random(rates.shape) < rates,
        probabilities=np.clip(rates + random.normal(0, 0.2, rates.shape), 0.01, 0.99).astype(np.float32),
        ranks=np.where(random.random(events) < 0.5, random.integers(0, 30, events), -1),
    )


def steps(p: Predictions, size: int) -> list[Predictions]:
    at = np.arange(len(p))
    return [p.where(at // size == i) for i in range(-(-len(p) // size))]


def figures(windows: WindowedQuality) -> dict[tuple[str, str, str | None, str], tuple[float, int]]:
    return {(f.window, f.slice, f.action, f.name): (f.value, f.events) for f in windows.figures()}


def fed(parts: list[Predictions], config: QualityConfig = CONFIG) -> WindowedQuality:
    windows = WindowedQuality(ACTIONS, config)
    for part in parts:
        windows.update(part)
    return windows


def by_definition(
    p: Predictions, hours: float, of: Predictions | None = None
) -> dict[tuple[str, str | None, str], tuple[float, int]]:
    """From the events: the figures of the windows that end with each partition's newest part (`of` all)."""
    of = of or p
    step = math.ceil(hours * HOUR / PARTS)
    newest = np.array([of.times[of.partitions == i].max(initial=0) for i in range(3)])
    p = p.where(p.times // step > newest[p.partitions] // step - PARTS)
    slices = {
        ALL: ~p.late,
        LATE: p.late,
        "history 0": ~p.late & (p.history == 0),
        "history 1-9": ~p.late & (p.history >= 1) & (p.history < 10),
        "history 10+": ~p.late & (p.history >= 10),
    }
    out: dict[tuple[str, str | None, str], tuple[float, int]] = {}
    for name, which in slices.items():
        rows = p.where(which)
        if not len(rows):
            continue
        out[name, None, "events"] = len(rows), len(rows)
        asked = rows.ranks[rows.ranks >= 0]
        for k in (1, 10):
            if len(asked):
                out[name, None, f"hr@{k}"] = float((asked < k).mean()), len(asked)
        for a, action in enumerate(ACTIONS):
            labels, said = rows.labels[:, a], rows.probabilities[:, a]
            if 0 < labels.mean() < 1:
                ne = log_loss(said, labels).mean() / entropy(labels.mean())
                out[name, action, "ne"] = ne, len(rows)
            if labels.any():
                out[name, action, "calibration"] = said.astype(float).sum() / labels.sum(), len(rows)
            area = gauc(rows.users, labels, said)
            if name != LATE and not math.isnan(area):
                of = [rows.users == u for u in np.unique(rows.users)]
                mixed = sum(int(u.sum()) for u in of if 0 < labels[u].mean() < 1)
                out[name, action, "gauc"] = area, mixed
    return out


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 400), st.sampled_from([0.5, 3, 60]), st.integers(1, 97))
def test_figures_are_those_of_the_events_of_the_window(seed, events, hours, size) -> None:
    """However the stream is cut into steps, in whatever order times come within a window, and partitions."""
    p = stream(seed, events, hours, disorder_ms=HOUR // 4)
    ahead = np.array([0, 0, 1000])[seed % 3] * HOUR
    p = Predictions(**{**vars(p), "times": p.times + ahead * p.partitions})
    got = figures(fed(steps(p, size)))
    for window, length in (("1h", 1), ("24h", 24)):
        mine = {k[1:]: v for k, v in got.items() if k[0] == window and k[3] != "gauc_share"}
        # An event that comes when the window has moved past it is missed; the obvious version knows none.
        expected = by_definition(p, length)
        assert mine.keys() == expected.keys()
        for key, (value, count) in expected.items():
            assert mine[key] == (pytest.approx(value, rel=1e-9), count), key


def test_an_event_beyond_the_window_is_counted_as_missed() -> None:
    p = stream(0, 100, 0.5)
    windows = fed([p])
    before = figures(windows)
    old = p.where(np.arange(100) < 7)
    windows.update(Predictions(**{**vars(old), "times": old.times - 3 * HOUR}))  # of the same partitions
    after = figures(windows)
    assert windows.missed == {"1h": 7, "24h": 0}
    assert {k: v for k, v in after.items() if k[0] == "1h"} == {
        k: v for k, v in before.items() if k[0] == "1h"
    }
    assert after["24h", ALL, None, "events"][0] > before["24h", ALL, None, "events"][0]


def test_late_events_are_in_no_figure_but_their_own() -> None:
    p = stream(1, 300, 0.5)
    everything, timely = fed([p]), fed([p.where(~p.late)])
    got, expected = figures(everything), figures(timely)
    assert {k: v for k, v in got.items() if k[1] != LATE} == expected
    assert got["1h", LATE, None, "events"][0] == p.late.sum() > 0


def test_a_quiet_partition_has_the_window_of_those_that_were_read_to_their_end_too() -> None:
    p = stream(2, 600, 0.9)
    quiet = p.partitions == 1
    p = Predictions(**{**vars(p), "times": p.times - 5 * HOUR * quiet})
    windows = fed(steps(p, 30))
    newest = {i: int(p.times[p.partitions == i].max()) for i in range(3)}
    assert windows.newest == windows.ends() == newest
    assert windows.ends([0, 1]) == {**newest, 1: newest[0]}
    behind, at_end = (
        {(f.window, f.slice): f.events for f in windows.figures(read) if f.name == "events"}
        for read in ([0, 2], [0, 1, 2])
    )
    timely = ~p.late
    assert behind["1h", ALL] == behind["24h", ALL] == at_end["24h", ALL] == timely.sum()
    assert at_end["1h", ALL] == (timely & ~quiet).sum()
    of_others = {f: v for f, v in figures(fed([p.where(~quiet)])).items() if f[0] == "1h"}
    assert {
        (f.window, f.slice, f.action, f.name): (pytest.approx(f.value), f.events)
        for f in windows.figures([0, 1, 2])
        if f.window == "1h"
    } == of_others


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(0, 12))
def test_a_resumed_window_gives_the_same_figures_bit_for_bit(seed, cut) -> None:
    """And so does one that was saved on the way: saving changes nothing."""
    parts = steps(stream(seed, 600, 30, users=200), 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "GAUC_EVENTS", 64)  # so that the sample is halved and doubled on the way
        undisturbed, first, resumed = (WindowedQuality(ACTIONS, CONFIG) for _ in range(3))
        for part in parts[:cut]:
            undisturbed.update(part)
            first.update(part)
            first.state()
        resumed.load(first.state())
        for part in parts[cut:]:
            for windows in (undisturbed, first, resumed):
                windows.update(part)
        assert undisturbed.figures() == first.figures() == resumed.figures()
        assert (undisturbed.newest, undisturbed.missed) == (resumed.newest, resumed.missed)


def test_a_state_is_not_touched_by_what_comes_after() -> None:
    parts = steps(stream(3, 200, 2), 50)
    windows, resumed = fed(parts[:2]), WindowedQuality(ACTIONS, CONFIG)
    state, expected = windows.state(), windows.figures()
    for part in parts[2:]:
        windows.update(part)
    resumed.load(state)
    assert resumed.figures() == expected != windows.figures()


def test_gauc_of_a_sample_of_users_is_within_its_error() -> None:
    """Over many streams it errs by the standard error of a mean over so many users, and without bias."""
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "GAUC_EVENTS", 2_000)
        for seed in range(60):
            p = stream(seed, 10_000, 0.9, users=1)
            who = np.random.default_rng(seed).integers(0, 2_000, len(p))
            p = Predictions(**{**vars(p), "users": keys_of_ints(Namespace.USER, who + 5_000 * seed)})
            p = p.where(~p.late)
            got = figures(fed(steps(p, 500)))
            share = got["1h", ALL, None, "gauc_share"][0]
            assert share in (0.25, 0.125)
            _, aucs, weights = user_aucs(p.users, p.labels[:, 0], p.probabilities[:, 0])
            exact = np.average(aucs, weights=weights)
            error = np.sqrt(((weights * (aucs - exact)) ** 2).sum() * (1 - share) / share) / weights.sum()
            errors.append((got["1h", ALL, "click", "gauc"][0] - exact) / error)
    assert 0.7 < np.std(errors) < 1.3
    assert abs(np.mean(errors)) < 3 / math.sqrt(len(errors))


def test_the_sample_is_bounded_and_grows_again_when_the_stream_calms_down() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "GAUC_EVENTS", 300)
        busy, calm = stream(4, 5_000, 1, users=500), stream(5, 200, 6, users=500)
        windows = fed(steps(busy, 100))
        assert figures(windows)["1h", ALL, None, "gauc_share"][0] <= 1 / 8
        assert len(windows.state()["windows"]["1h"]["rows"]["users"]) <= 300
        calm = Predictions(**{**vars(calm), "times": calm.times + HOUR})
        shares, seen = set(), [busy]
        for part in steps(calm, 5):
            windows.update(part)
            seen.append(part)
            got = figures(windows)
            share = got["1h", ALL, None, "gauc_share"][0]
            shares.add(share)
            every = Predictions.concat(seen)
            sampled = every.where(every.users.view(np.uint64) < share * 2.0**64)
            expected = by_definition(sampled, 1, of=every).get((ALL, "click", "gauc"))
            mine = got.get(("1h", ALL, "click", "gauc"))
            assert mine == (expected and (pytest.approx(expected[0]), expected[1]))
        assert min(shares) <= 1 / 8 < 1 == max(shares)


def test_slices_are_named_by_their_bounds() -> None:
    assert slice_names([1, 10, 100]) == ["history 0", "history 1-9", "history 10-99", "history 100+"]
    assert slice_names([5]) == ["history 0-4", "history 5+"]


def test_windows_go_on_and_new_ones_begin_when_the_configuration_changes() -> None:
    p = stream(6, 200, 0.5)
    held = fed([p]).state()
    longer = WindowedQuality(ACTIONS, CONFIG.model_copy(update={"windows_h": [1, 48]}))
    longer.load(held)
    assert {f.window for f in longer.figures() if f.name == "events"} == {"1h"}
    other = WindowedQuality(["click"], CONFIG)
    other.load(held)
    assert not [f for f in other.figures() if f.name == "events"]


# -- in the learner -----------------------------------------------------------------------------------------


def test_an_event_counts_with_how_much_it_was_predicted_from(tmp_path: pathlib.Path) -> None:
    learner = Learner(make_config(tmp_path, "127.0.0.1:9"))
    old = [(i, 1, 1000 + i) for i in range(12)]
    batch = micro_batch(
        [(1, old, [(3, 1, 2000), (4, 0, 2001)]), (2, [], [(5, 1, 3000)]), (3, old[:9], [(6, 1, 3001)])]
    )
    said = learner.step(batch).predictions
    assert said.history.tolist() == [12, 13, 0, 9]
    got = {f.slice: f.events for f in learner.quality.figures() if f.name == "events" and f.window == "1h"}
    assert got == {ALL: 4, "history 0": 1, "history 1-9": 1, "history 10-99": 2}


def test_a_learner_resumed_has_the_figures_of_one_undisturbed(tmp_path: pathlib.Path) -> None:
    config = make_config(tmp_path, "127.0.0.1:9")
    whole, first, resumed = Learner(config), Learner(config), Learner(config)
    batches = random_batches(0, 12)
    for batch in batches[:5]:
        whole.step(batch)
        first.step(batch)
    first.state().save(tmp_path)
    resumed.load(tmp_path)
    for batch in batches[5:]:
        whole.step(batch)
        resumed.step(batch)
    assert whole.quality.figures() == resumed.quality.figures()
    assert len(whole.quality.figures()) > 10


def test_a_checkpoint_of_before_loads(tmp_path: pathlib.Path) -> None:
    config = make_config(tmp_path, "127.0.0.1:9")
    learner, resumed = Learner(config), Learner(config)
    for batch in random_batches(0, 3):
        learner.step(batch)
    state = learner.state()
    assert state.common is not None
    del state.common["quality"], state.common["metrics"]["window"]["history"]
    state.save(tmp_path)
    resumed.load(tmp_path)
    assert resumed.metrics.figures() == learner.metrics.figures()
    assert resumed.quality.newest == {}
