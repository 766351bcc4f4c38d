"""A vocabulary dealt out to ranks is one vocabulary, and nothing is looked up with another key's row."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grstream.config import TrainConfig
from grstream.keys import INT64_MAX, INT64_MIN, Keys
from grstream.ranks import Ranks
from grstream.shards import Asked, Fetched, Negatives, Shards, dealt, owners, shard
from grstream.vocabulary import DAY_MS, VocabularyState, initial_rows
from tests.grstream.thread_ranks import together

DIM, RATE = 3, 0.1


def asked(keys: list[int]) -> Asked:
    """Every use of an even key is a new event about that item; the odd ones are what an event carries."""
    array = np.array(keys, np.int64)
    even = array % 2 == 0
    return Asked(
        keys=array,
        items=even,
        new=np.ones(len(array), np.bool_),
        targets=array[even],
        times=array[even] % 7 * DAY_MS,
        acted=np.ones(int(even.sum()), np.bool_),
        names={key: f"item {key}" for key in array[even].tolist()},
    )


class Model:
    """A dict of vectors, each changed by Adagrad as if it were alone. It forgets what it is told to."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.vectors: dict[int, torch.Tensor] = {}
        self.squares: dict[int, float] = {}

    def vector(self, key: int) -> torch.Tensor:
        held = self.vectors.get(key)
        return initial_rows(np.array([key]), DIM, self.seed)[0] if held is None else held

    def learn(self, key: int, gradient: torch.Tensor) -> None:
        self.squares[key] = self.squares.get(key, 0.0) + gradient.square().mean().item()
        scale = RATE / max(self.squares[key], 1e-20) ** 0.5
        self.vectors[key] = self.vector(key) - scale * gradient

    def keep(self, keys: set[int]) -> None:
        for key in set(self.vectors) - keys:
            del self.vectors[key], self.squares[key]


def held_keys(state: VocabularyState) -> set[int]:
    return set(state.keys.tolist())


def gradient_of(rank: int, keys: Keys) -> torch.Tensor:
    """A gradient that tells keys and ranks apart: (n, DIM)."""
    return torch.from_numpy(np.stack([np.sin(keys % 97 + i + 3 * rank + 1) for i in range(DIM)], 1)).float()


small = st.integers(-30, 30)
batches = st.lists(st.lists(small, max_size=10), min_size=3, max_size=3)  # of three ranks; others read fewer


@settings(max_examples=60)
@given(
    steps=st.lists(st.tuples(batches, st.sampled_from([1, 2, 3])), min_size=1, max_size=8),
    budget=st.one_of(st.none(), st.integers(1, 40)),
    admit_after=st.integers(1, 3),
    all_up_to=st.sampled_from([0, 1000]),
)
def test_every_key_has_its_own_row_through_admissions_evictions_and_changes_of_ranks(
    steps: list[tuple[list[list[int]], int]], budget: int | None, admit_after: int, all_up_to: int
) -> None:
    config = TrainConfig(vocabulary_rows=budget, admit_after=admit_after, seed=2)
    model, events = Model(config.seed), dict[int, int]()
    parts = [shard(DIM, config, Ranks(), half_lives_days=[0.1, 7]).state()]
    for number, (of_ranks, world) in enumerate(steps):

        def run(
            ranks: Ranks,
            parts: list[VocabularyState] = parts,
            of_ranks: list[list[int]] = of_ranks,
            number: int = number,
        ) -> tuple[VocabularyState, VocabularyState, Fetched, VocabularyState]:
            held = shard(DIM, config, ranks, half_lives_days=[0.1, 7])
            held.restore(dealt(parts, ranks))
            restored, shards = held.state(), Shards(held, ranks)
            fetched = shards.fetch(asked(of_ranks[ranks.rank]), Negatives(5, all_up_to, (0, number)))
            admitted = held.state()
            keys = np.array(of_ranks[ranks.rank], np.int64)
            gradient = torch.zeros_like(fetched.table)
            gradient[torch.from_numpy(fetched.places)] = gradient_of(ranks.rank, keys)
            rows, total = shards.summed(fetched, gradient)
            assert len(set(rows.tolist())) == len(rows)
            held.update(rows, total, RATE)
            shards.count(fetched)
            return restored, admitted, fetched, held.state()

        before = {key: row for part in parts for key, row in by_key(part).items()}
        results = together(world, run)
        of_ranks = of_ranks[:world]
        for rank, (restored, _, _, _) in enumerate(results):
            assert (owners(restored.keys, world) == rank).all()
            assert all(np.array_equal(row, before[key]) for key, row in by_key(restored).items())
        if budget is None:
            assert set().union(*(held_keys(r[0]) for r in results)) == set(before)
        model.keep(set().union(*(held_keys(r[0]) for r in results)))
        known = set().union(*(held_keys(r[1]) for r in results))
        model.keep(known)
        for key in [key for keys in of_ranks for key in keys]:
            events[key] = events.get(key, 0) + 1
        if budget is None:
            assert known == {key for key, count in events.items() if count >= admit_after}
        for keys, (_, admitted, fetched, _) in zip(of_ranks, results, strict=True):
            assert set(admitted.item_names) == {k for k in held_keys(admitted) if k % 2 == 0}
            for key, vector in zip(keys, fetched.table[torch.from_numpy(fetched.places)], strict=True):
                torch.testing.assert_close(vector, model.vector(key))
            items = fetched.items
            assert items is not None
            assert items.total == sum(key % 2 == 0 for key in known)
            for key, vector in zip(items.keys, fetched.table[torch.from_numpy(items.places)], strict=True):
                assert key % 2 == 0
                assert int(key) in known
                torch.testing.assert_close(vector, model.vector(int(key)))
            targets = [key for theirs in of_ranks for key in theirs if key % 2 == 0 and key in known]
            assert items.keys[items.in_batch].tolist() == targets
            wanted = [key for key in keys if key % 2 == 0 and key in known]
            assert items.keys[items.wanted].tolist() == wanted
            if items.total and not all_up_to:
                assert len(items.sampled) == 5
            if all_up_to:
                assert sorted(items.keys[items.sampled].tolist()) == sorted(k for k in known if k % 2 == 0)
        for key in known & {key for keys in of_ranks for key in keys}:
            total = sum(gradient_of(r, np.array([key]))[0] for r, keys in enumerate(of_ranks) if key in keys)
            model.learn(key, total)
        parts = [after for _, _, _, after in results]
        for part in parts:
            for key, row in by_key(part).items():
                torch.testing.assert_close(torch.from_numpy(row), model.vector(key), rtol=1e-4, atol=1e-5)


def by_key(state: VocabularyState) -> dict[int, np.ndarray]:
    return dict(zip(state.keys.tolist(), state.rows, strict=True))


@pytest.mark.parametrize("optimizer", ["adagrad", "adamw"])
@pytest.mark.parametrize("worlds", [(2, 1, 3), (1, 3, 2, 1), (3, 3)])
def test_another_number_of_ranks_holds_the_same_rows_bit_for_bit(
    optimizer: str, worlds: tuple[int, ...]
) -> None:
    config = TrainConfig.model_validate({"row_optimizer": optimizer, "admit_after": 2})
    keys = np.unique(np.random.default_rng(0).integers(INT64_MIN, INT64_MAX, 500))

    def learn(ranks: Ranks) -> VocabularyState:
        shards = Shards(shard(DIM, config, ranks, half_lives_days=[0.1, 7]), ranks)
        for repeat in (1, 3, 2):
            fetched = shards.fetch(asked(keys[ranks.rank :: ranks.world][:-repeat].tolist()), None)
            shards.vocabulary.update(*shards.summed(fetched, torch.ones_like(fetched.table)), 0.1)
            shards.count(fetched)
        return shards.vocabulary.state()

    def told(parts: list[VocabularyState]) -> list[object]:
        names = {key: name for part in parts for key, name in part.item_names.items()}
        rows = {}
        for part in parts:
            columns = [part.rows, part.items, part.levels, part.used, *part.optimizer.values()]
            for at, key in enumerate(part.keys.tolist()):
                rows[key] = [column[at].tobytes() for column in columns]
        candidates = {
            (key, count, young)
            for c in (part.candidates for part in parts)
            if c is not None
            for key, count, young in zip(c.keys.tolist(), c.counts.tolist(), c.young.tolist(), strict=True)
        }
        return [names, rows, candidates, {part.admissions for part in parts}]

    first, *others = worlds
    parts = together(first, learn)
    expected = told(parts)
    assert len(expected[1]) > 400  # type: ignore[arg-type]
    assert expected[2]
    for world in others:

        def resumed(ranks: Ranks, parts: list[VocabularyState] = parts) -> VocabularyState:
            held = shard(DIM, config, ranks, half_lives_days=[0.1, 7])
            held.restore(dealt(parts, ranks))
            return held.state()

        parts = together(world, resumed)
        assert told(parts) == expected
        sizes = [len(part.keys) for part in parts]
        assert max(sizes) < 1.4 * min(sizes)


def test_ranks_share_a_budget() -> None:
    config = TrainConfig(vocabulary_rows=100)
    assert [shard(DIM, config, Ranks(rank, 3)).budget for rank in range(3)] == [34, 33, 33]


def test_draws_are_the_same_on_a_replay_and_uniform_over_all_ranks_items() -> None:
    keys = np.arange(0, 80, 2)

    def draw(ranks: Ranks) -> list[Keys]:
        shards = Shards(shard(DIM, TrainConfig(), ranks), ranks)
        out = []
        for step in range(60):
            mine = keys[ranks.rank :: ranks.world] if step == 0 else keys[:0]
            items = shards.fetch(asked(mine.tolist()), Negatives(200, 0, (7, step))).items
            assert items is not None
            out.append(items.keys[items.sampled])
        return out

    one, again = together(3, draw), together(3, draw)
    assert all(np.array_equal(a, b) for a, b in zip(one[0], again[0], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(one[0], one[2], strict=True))
    drawn = np.bincount(np.concatenate(one[0]), minlength=80)[::2]
    assert drawn.sum() == 60 * 200
    assert drawn.min() > 220  # of 300 expected; four and a half standard deviations


def test_ranks_of_items_count_the_items_of_all_ranks() -> None:
    keys = np.arange(0, 40, 2)
    users = torch.randn(6, DIM, generator=torch.Generator().manual_seed(0))
    table = initial_rows(keys, DIM, 0)
    targets = np.array([0, 2, 38, 10, 999, 12])  # the fifth is no item

    worth = np.log1p(0.5 ** (6 - keys % 7.0)).astype(np.float32)  # after half-lives of a day

    def rank(ranks: Ranks) -> tuple[torch.Tensor, int]:
        shards = Shards(shard(DIM, TrainConfig(), ranks, half_lives_days=[1]), ranks)
        shards.count(shards.fetch(asked(keys[ranks.rank :: ranks.world].tolist()), None))
        mine = slice(ranks.rank * 6 // ranks.world, (ranks.rank + 1) * 6 // ranks.world)
        without = shards.vocabulary.lookup(np.array([12]))
        return shards.ranks_of(
            users[mine],
            targets[mine],
            vectors=lambda rows: rows,
            prior=lambda popularity: popularity @ torch.tensor([0.3]),
            without=without[without >= 0],
        )

    kept = keys != 12
    scores = users @ table.T + 0.3 * torch.from_numpy(worth)
    expected = [
        int((scores[i, kept] > scores[i, int(np.flatnonzero(keys == t)[0])]).sum())
        if t in keys and t != 12
        else int(kept.sum())
        for i, t in enumerate(targets.tolist())
    ]
    for world in (1, 2, 3):
        found = together(world, rank)
        assert [total for _, total in found] == [kept.sum()] * world
        assert torch.cat([places for places, _ in found]).tolist() == expected


def test_a_state_of_another_optimizer_is_refused() -> None:
    held = shard(DIM, TrainConfig(row_optimizer="adamw"), Ranks())
    state = dataclasses.replace(shard(DIM, TrainConfig(), Ranks()).state())
    with pytest.raises(ValueError, match=r"train\.row_optimizer must stay"):
        held.restore(state)
