"""What an index answers, beside a sort of all scores in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grstream.item_index import NOWHERE, ExactIndex, FaissIndex, ItemIndex


def brute(vectors, prior, users, k, barred=None, allowed=None):
    """(B, k) places by score in float64, then by place; NOWHERE beyond the last."""
    scores = users.double().numpy() @ vectors.double().numpy().T + prior.double().numpy()
    may = np.ones(scores.shape, bool)
    if allowed is not None:
        may[:] = np.isin(np.arange(len(vectors)), allowed)
    if isinstance(barred, np.ndarray):
        may[:, barred] = False
    elif barred is not None:
        for row, own in enumerate(barred):
            may[row, own if own is not None else []] = False
    out = np.full((len(users), k), NOWHERE)
    for row in range(len(users)):
        places = np.flatnonzero(may[row])
        best = places[np.lexsort((places, -scores[row, places]))][:k]
        out[row, : len(best)] = best
    return out


@st.composite
def worlds(draw):
    """Whole numbers, so that scores are exact and many are equal."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, d, b = draw(st.integers(0, 60)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    high = draw(st.integers(1, 4))
    vectors = torch.from_numpy(random.integers(-high, high, (n, d)).astype(np.float32))
    prior = torch.from_numpy(random.integers(-2, 2, n).astype(np.float32))
    users = torch.from_numpy(random.integers(-high, high, (b, d)).astype(np.float32))
    some = st.sets(st.integers(0, max(n - 1, 0)), max_size=n).map(lambda s: np.array(sorted(s), np.int64))
    barred = draw(
        st.none()
        | some
        | some.map(lambda at: np.isin(np.arange(n), at))
        | st.lists(st.none() | some, min_size=b, max_size=b)
    )
    return vectors, prior, users, barred, draw(st.none() | some)


@given(worlds(), st.integers(1, 70), st.sampled_from([1, 2, 7, 64]))
def test_the_exact_index_is_a_sort_of_all_scores_whatever_its_blocks(world, k: int, block: int) -> None:
    vectors, prior, users, barred, allowed = world
    scores, places = ExactIndex(vectors, prior, block).search(users, k, barred, allowed)
    np.testing.assert_array_equal(places, brute(vectors, prior, users, k, barred, allowed))
    assert (np.isneginf(scores) == (places == NOWHERE)).all()
    row, column = np.nonzero(places >= 0)
    truth = (users @ vectors.T + prior).numpy()
    np.testing.assert_array_equal(scores[row, column], truth[row, places[row, column]])


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 50))
def test_no_block_size_changes_an_answer_of_real_vectors(seed: int, b: int, k: int) -> None:
    torch.manual_seed(seed)
    vectors, prior, users = torch.randn(500, 24), torch.randn(500), torch.randn(b, 24)
    vectors[100:200] = vectors[0]  # equal but for where they stand
    prior[100:200] = prior[0]
    answers = [ExactIndex(vectors, prior, block).search(users, k) for block in (1, 33, 500)]
    for scores, places in answers[1:]:
        np.testing.assert_array_equal(places, answers[0][1])
        np.testing.assert_array_equal(scores, answers[0][0])
    np.testing.assert_array_equal(answers[0][1], brute(vectors, prior, users, k))


@given(st.data())
def test_a_later_version_is_what_one_built_anew_is_and_the_former_stays(data: st.DataObject) -> None:
    n, more, block = (data.draw(st.integers(*r)) for r in ((0, 20), (0, 9), (1, 8)))
    places = np.array(
        sorted(data.draw(st.sets(st.integers(0, n - 1))) if n else []) + list(range(n, n + more)), np.int64
    )
    torch.manual_seed(n)
    vectors, prior, users = torch.randn(n + more, 3), torch.randn(n + more), torch.randn(2, 3)
    before = ExactIndex(vectors[:n].clone(), prior[:n].clone(), block)
    was = before.search(users, 5)
    vectors[places], prior[places] = torch.randn(len(places), 3), torch.randn(len(places))
    after = before.after(places, vectors[places], prior[places])
    assert len(after) == n + more
    for got, expected in zip(
        after.search(users, 5), ExactIndex(vectors, prior, block).search(users, 5), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(before.search(users, 5), was, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_what_is_not_finite_or_leaves_a_hole_is_refused() -> None:
    vectors, prior = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match="not finite"):
        ExactIndex(vectors, torch.tensor([0.0, torch.nan, 0.0]))
    with pytest.raises(ValueError, match="not finite"):
        ExactIndex(vectors, prior).search(torch.full((1, 2), torch.inf), 1)
    with pytest.raises(ValueError, match="follow"):
        ExactIndex(vectors, prior).after(np.array([4]), torch.zeros(1, 2), torch.zeros(1))


def clustered(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(50, d), dim=1)

    def around(count: int) -> torch.Tensor:
        noise = torch.randn(count, d) * 0.5 / d**0.5
        return torch.nn.functional.normalize(centres[torch.randint(50, (count,))] + noise, dim=1)

    return around(n), 0.05 * torch.randn(n), around(32)


@pytest.fixture(scope="module")
def approximate() -> FaissIndex:
    pytest.importorskip("faiss")
    vectors, prior, _ = clustered(20_000, 32)
    return FaissIndex(ExactIndex(vectors, prior))


def test_the_approximate_index_finds_nine_in_ten_of_clustered_items(
    approximate: FaissIndex, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, users = clustered(20_000, 32)
    with caplog.at_level("INFO"):
        assert approximate.recall(users, 50) > 0.9
    assert "recall at 50" in caplog.text


def test_it_never_finds_what_is_barred_and_finds_as_many_as_there_are(approximate: FaissIndex) -> None:
    _, _, users = clustered(20_000, 32)
    users = users[:4]
    index: ItemIndex = approximate
    _, first = index.search(users, 100)
    for barred in (np.unique(first), np.isin(np.arange(20_000), first), [np.sort(own) for own in first]):
        scores, places = index.search(users, 100, barred)
        assert (places >= 0).all()
        assert not (places[:, :, None] == first[:, None, :]).any()
        assert (np.diff(scores) <= 0).all()
    allowed = np.arange(0, 20_000, 3)
    barred = np.isin(np.arange(20_000), allowed[:-7])
    _, places = index.search(users, 10, barred, allowed)
    np.testing.assert_array_equal(np.sort(places), [[-1] * 3 + allowed[-7:].tolist()] * 4)


def test_its_later_version_finds_what_changed(approximate: FaissIndex) -> None:
    _, _, users = clustered(20_000, 32)
    one = users[:1]
    _, before = approximate.search(one, 1)
    places = np.array([int(before[0, 0]), 20_000])
    after = approximate.after(places, torch.cat([-one, one]), torch.ones(2))
    assert after.search(one, 1)[1] == 20_000
    assert before[0, 0] not in after.search(one, 50)[1]
    np.testing.assert_array_equal(approximate.search(one, 1)[1], before)
