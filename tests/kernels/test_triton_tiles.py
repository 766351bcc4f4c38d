"""The plan of the Triton kernels covers what is in sight, once, and says of each tile what is true of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import TIME_BUCKETS, UNKNOWN_TIME, Sight, jagged, position_bucket, position_rows, time_bucket
from kernels.triton_tiles import MIXED, MOST_STEPS, STEPPED, UNIFORM, edges, tiles


@st.composite
def sights(draw: st.DrawFn) -> Sight:
    lengths = draw(st.lists(st.integers(0, 40), max_size=4))
    prefixes = [draw(st.lists(st.integers(n // 2, n), max_size=30)) for n in lengths]
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    step = draw(st.sampled_from([1, 10, 10**6, 10**10]))
    back = draw(st.sampled_from([0.0, 0.1]))

    def times(count: int) -> torch.Tensor:
        steps = torch.randint(0, step, (count,), generator=random)
        moments = steps.cumsum(0)
        moments[torch.rand(count, generator=random) < back] = UNKNOWN_TIME
        return moments

    return Sight(
        torch.tensor(lengths, dtype=torch.int64),
        times(sum(lengths)),
        torch.tensor([len(p) for p in prefixes], dtype=torch.int64),
        torch.tensor([p for prefix in prefixes for p in prefix], dtype=torch.int64),
        times(sum(map(len, prefixes))) + draw(st.sampled_from([0, 100, 10**9])),
    )


@settings(max_examples=50)
@given(sights(), st.booleans(), st.sampled_from([None, 1, 3]), st.booleans())
def test_every_pair_in_sight_is_in_one_tile_which_knows_its_buckets(
    sight: Sight, by_memory: bool, bits: int | None, timed: bool
) -> None:
    block_rows, block_memory = (4, 8) if by_memory else (8, 4)
    plan = tiles(sight, bits, timed, block_rows, block_memory, by_memory, sums=True)
    row_end, memory_end = sight.row_lengths.cumsum(0), sight.memory_lengths.cumsum(0)
    met = torch.zeros(len(sight.row_prefix), len(sight.memory_times), dtype=torch.int32)
    passed = sight.row_clock.unsqueeze(1) - sight.memory_times
    for first, end, other_end, memory_first, *bounds in plan.programs.tolist():
        assert other_end in (row_end if by_memory else memory_end)
        for kind in (UNIFORM, STEPPED, MIXED):
            for at in range(bounds[kind], bounds[kind + 1]):
                other, packed, most, index = plan.entries[at].tolist()
                until = min(other + (block_rows if by_memory else block_memory), other_end)
                mine, theirs = torch.arange(first, end), torch.arange(other, until)
                rows, memory = (theirs, mine) if by_memory else (mine, theirs)
                met[rows.unsqueeze(1), memory] += 1
                assert most == int(sight.row_prefix[rows].max())
                assert most - int(sight.row_prefix[rows].min()) + block_memory <= plan.window
                away = sight.row_prefix[rows].unsqueeze(1) - (memory - memory_first)
                if kind != MIXED:
                    assert (away > 0).all()
                    assert until - other == (block_rows if by_memory else block_memory)
                seen = away > 0
                for low, high, known, bucket in (
                    (packed & 0xFF, packed >> 8 & 0xFF, timed, time_bucket(passed[rows][:, memory])),
                    (
                        packed >> 16 & 0xFFFF,
                        packed >> 32,
                        bits is not None,
                        position_bucket(away, bits or 1),
                    ),
                ):
                    if known and seen.any():
                        assert low <= int(bucket[seen].min())
                        assert high >= int(bucket[seen].max())
                    assert kind != UNIFORM or low == high
                assert kind != STEPPED or (packed >> 8 & 0xFF) - (packed & 0xFF) <= MOST_STEPS
                if kind != UNIFORM and timed:
                    low, high = packed & 0xFF, packed >> 8 & 0xFF
                    for step in range(high - low):
                        edge = plan.steps[index + step, : len(mine)].unsqueeze(1)
                        rank = plan.ranks[theirs]
                        earlier = rank < edge if by_memory else edge < rank  # (mine, theirs)
                        bucket = time_bucket(passed[rows][:, memory])
                        assert ((earlier.t() if by_memory else earlier) == (bucket < high - step)).all()
    row_owner, memory_owner = jagged.owners(sight.row_lengths), jagged.owners(sight.memory_lengths)
    same = row_owner.unsqueeze(1) == memory_owner
    in_sight = same & (sight.row_prefix.unsqueeze(1) > jagged.positions(sight.memory_lengths))
    assert (met[in_sight] == 1).all()
    assert (met[~same] == 0).all()


@pytest.mark.parametrize("bits", [None, 1, 3, 8])
def test_an_edge_is_where_a_bucket_begins(bits: int | None) -> None:
    count = TIME_BUCKETS if bits is None else position_rows(bits)
    edge = edges(bits)

    def bucket(x: torch.Tensor) -> torch.Tensor:
        return time_bucket(x) if bits is None else position_bucket(x, bits)

    index = torch.arange(count)
    assert (bucket(edge) >= index).all()
    assert (bucket(edge[1:] - 1) < index[1:]).all()


def test_prefixes_and_lengths_that_do_not_fit_are_refused() -> None:
    one, two = torch.tensor([1]), torch.tensor([2])
    with pytest.raises(ValueError, match="prefix must lie between"):
        tiles(Sight(one, one, one, two, one), 3, True, 8, 8, False)
    with pytest.raises(ValueError, match="do not sum to 1 rows and 1 memory tokens"):
        tiles(Sight(two, one, one, one, one), 3, True, 8, 8, False)
