"""The reference attention says what the formula says."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import POSITION_BUCKETS, TIME_BUCKETS, Sight, attention, position_bucket, time_bucket
from kernels import reference as blocks

TABLES = ("position_bias", "time_bias")


@dataclasses.dataclass
class Case:
    sight: Sight
    arrays: dict[str, Tensor]  # the differentiable arguments of attention, by name

    def run(self) -> Tensor:
        alpha = self.arrays["q"].shape[-1] ** -0.5
        return attention(sight=self.sight, alpha=alpha, **self.arrays)


def case(
    lengths: list[int],
    prefixes: list[list[int]],
    *,
    heads: int = 2,
    qk: int = 3,
    v: int = 4,
    times: str = "any",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """Random tensors for sequences of these lengths, whose rows see these prefixes."""
    random = torch.Generator().manual_seed(seed)
    memory, rows = sum(lengths), sum(map(len, prefixes))

    def draw(count: int) -> Tensor:
        spread = {"any": 10**11, "equal": 1, "close": 50}[times]
        return torch.randint(0, spread, (count,), generator=random)  # going back as often as forward

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    sight = Sight(
        memory_lengths=torch.tensor(lengths, dtype=torch.int64),
        memory_times=draw(memory),
        row_lengths=torch.tensor([len(p) for p in prefixes], dtype=torch.int64),
        row_prefix=torch.tensor([p for prefix in prefixes for p in prefix], dtype=torch.int64),
        row_times=draw(rows),
    )
    arrays = {
        "q": normal(rows, heads, qk),
        "k": normal(memory, heads, qk),
        "v": normal(memory, heads, v),
        "k_self": normal(rows, heads, qk),
        "v_self": normal(rows, heads, v),
        "position_bias": normal(POSITION_BUCKETS, heads).to(wide),
        "time_bias": normal(TIME_BUCKETS, heads).to(wide),
    }
    return Case(sight, arrays)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64, longest: int = 24) -> Case:
    lengths = draw(st.lists(st.integers(0, longest), max_size=5))
    prefixes = [draw(st.lists(st.integers(0, n), max_size=6)) for n in lengths]
    return case(
        lengths,
        prefixes,
        heads=draw(st.integers(1, 3)),
        qk=draw(st.integers(1, 5)),
        v=draw(st.integers(1, 5)),
        times=draw(st.sampled_from(["any", "equal", "close"])),
        dtype=dtype,
        seed=draw(st.integers(0, 9)),
    )


def log_bucket(x: int, bits: int, count: int) -> int:
    """The bucket in exact integers: 2^bits an octave, those that hold no other integer exact."""
    x = max(x, 0)
    if x < 2**bits:
        return x if bits > 1 else 0
    octave = x.bit_length() - 1
    return min(((octave - bits + 1) << bits) + (x >> (octave - bits)) - (1 << bits), count - 1)


def naive(case: Case) -> Tensor:
    """The formula pair by pair, in Python's own arithmetic for buckets."""
    a, sight = {name: array.double() for name, array in case.arrays.items()}, case.sight
    heads = a["q"].shape[1]
    out = torch.zeros(len(sight.row_prefix), heads, a["v"].shape[-1], dtype=torch.float64)
    alpha = a["q"].shape[-1] ** -0.5

    def weight(q: Tensor, k: Tensor, head: int, position: int, time: int) -> float:
        bias = a["position_bias"][log_bucket(position, 3, POSITION_BUCKETS), head]
        bias = bias + a["time_bias"][log_bucket(time, 1, TIME_BUCKETS), head]
        score = float(alpha * (q @ k) + bias)
        return score / (1 + math.exp(-score))

    row = first = 0
    for length, row_count in zip(sight.memory_lengths.tolist(), sight.row_lengths.tolist(), strict=True):
        for i in range(row, row + row_count):
            p, t = int(sight.row_prefix[i]), int(sight.row_times[i])
            for h in range(heads):
                q = a["q"][i, h]
                for j in range(p):
                    passed = t - int(sight.memory_times[first + j])
                    out[i, h] += weight(q, a["k"][first + j, h], h, p - j, passed) * a["v"][first + j, h]
                out[i, h] += weight(q, a["k_self"][i, h], h, 0, 0) * a["v_self"][i, h]
        row, first = row + row_count, first + length
    return out


@settings(max_examples=60)
@given(cases())
def test_the_blocked_sum_is_the_sum_pair_by_pair(case: Case) -> None:
    torch.testing.assert_close(case.run(), naive(case), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_narrow_inputs_are_summed_in_fp32(dtype: torch.dtype, bound: float) -> None:
    drawn = case([20, 0, 7], [[20, 3, 0], [0], [7] * 4], dtype=dtype)
    assert drawn.run().dtype == torch.float32
    torch.testing.assert_close(drawn.run().double(), naive(drawn), atol=bound, rtol=bound)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 1 << 12)
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 16)


@pytest.mark.usefixtures("small_blocks")
def test_many_blocks_equal_one_sequence_at_a_time() -> None:
    """Lengths far apart, long rows and rows out of order make several groups and blocks of each."""
    lengths = [0, 300, 1, 150, 149, 80, 0, 2, 299, 64, 65]
    prefixes = [[n, *range(n), n // 2] for n in lengths]
    whole = case(lengths, prefixes)
    plan = whole.sight.planned(blocks._plan, 2)
    assert len({block.group for block in plan.blocks}) > 1
    assert len(plan.blocks) > len({block.group for block in plan.blocks})
    torch.testing.assert_close(whole.run(), naive_by_sequence(whole), atol=1e-10, rtol=1e-10)


def naive_by_sequence(case: Case) -> Tensor:
    """One dense masked matrix a sequence and head, without blocks, buckets still from the library."""
    a, sight, parts = case.arrays, case.sight, []
    alpha = a["q"].shape[-1] ** -0.5
    rows, memory = sight.row_lengths.tolist(), sight.memory_lengths.tolist()
    names = ("q", "k_self", "v_self")
    by_row = zip(*(a[name].split(rows) for name in names), sight.row_prefix.split(rows), strict=True)
    by_memory = zip(a["k"].split(memory), a["v"].split(memory), sight.memory_times.split(memory), strict=True)
    for (q, k_self, v_self, p), (k, v, t), own in zip(
        by_row, by_memory, sight.row_times.split(rows), strict=True
    ):
        j = torch.arange(len(t))
        bias = a["position_bias"][position_bucket(p[:, None] - j).long()]
        bias = bias + a["time_bias"][time_bucket(own[:, None] - t).long()]  # (r, n, H)
        scores = torch.nn.functional.silu(alpha * torch.einsum("rhd,nhd->rnh", q, k) + bias)
        seen = (j < p[:, None]).unsqueeze(2)
        self_score = alpha * (q * k_self).sum(-1) + a["position_bias"][0] + a["time_bias"][0]
        mine = torch.nn.functional.silu(self_score).unsqueeze(2) * v_self
        parts.append(torch.einsum("rnh,nhd->rhd", scores * seen, v) + mine)
    return torch.cat(parts)


@pytest.mark.usefixtures("small_blocks")
def test_gradients_of_the_blocks_are_those_of_the_formula() -> None:
    lengths = [0, 130, 1, 70, 69, 20]
    whole = case(lengths, [[n, *range(n), n // 2] for n in lengths])
    for array in whole.arrays.values():
        array.requires_grad_()
    weights = torch.randn(whole.arrays["v_self"].shape, dtype=torch.float64)
    ours = torch.autograd.grad((whole.run() * weights).sum(), list(whole.arrays.values()))
    theirs = torch.autograd.grad((naive_by_sequence(whole) * weights).sum(), list(whole.arrays.values()))
    for name, our, their in zip(whole.arrays, ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-9, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_pass_gradcheck() -> None:
    drawn = case([3, 0, 5], [[3, 1, 0], [0], [5, 4]], heads=2, qk=2, v=3)
    names = list(drawn.arrays)
    # A table of 96 rows makes gradcheck slow: check the rows that take part, leave the others as they are.
    inputs = [array.requires_grad_() for array in drawn.arrays.values()]

    def run(*arrays: Tensor) -> Tensor:
        return Case(drawn.sight, dict(zip(names, arrays, strict=True))).run()

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(run, inputs[:5] + [t.detach() for t in inputs[5:]])


def test_what_a_row_does_not_see_gets_no_gradient() -> None:
    drawn = case([4, 4], [[2], [0]])
    k = drawn.arrays["k"].requires_grad_()
    drawn.run().sum().backward()
    assert k.grad is not None
    assert (k.grad[:2] != 0).all()
    assert (k.grad[2:] == 0).all()


def test_a_broken_user_stays_alone_with_its_nan() -> None:
    drawn = case([9, 5], [[9, 2], [5, 4, 0]])
    before = drawn.run()[2:]
    drawn.arrays["k"][:9] = math.nan
    torch.testing.assert_close(drawn.run()[2:], before)


@pytest.mark.parametrize("x", [*range(-3, 70), 255, 256, 15_359, 15_360, 10**6])
def test_position_buckets_are_exact_and_then_eighths_of_octaves(x: int) -> None:
    assert int(position_bucket(torch.tensor(x))) == log_bucket(x, 3, POSITION_BUCKETS)
    if 0 <= x < 16:
        assert int(position_bucket(torch.tensor(x))) == x


@given(
    st.integers(-(10**12), 2**24)
    | st.integers(1, 62).map(lambda e: 2**e)
    | st.integers(1, 61).map(lambda e: 3 * 2**e)
)
def test_time_buckets_are_half_octaves(x: int) -> None:
    """Exact integers up to 2^24 and at every edge; between, rounding to float32 is part of the definition."""
    assert int(time_bucket(torch.tensor(x))) == log_bucket(x, 1, TIME_BUCKETS)


@given(st.integers(0, 2**62), st.integers(0, 2**62))
def test_buckets_never_decrease_with_distance(x: int, y: int) -> None:
    low, high = sorted((x, y))
    for bucket in (position_bucket, time_bucket):
        assert int(bucket(torch.tensor(low))) <= int(bucket(torch.tensor(high)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(5, 2, 3, dtype=torch.float64)}, "k must have shape"),
        ({"position_bias": torch.zeros(7, 2)}, "position_bias must have shape"),
        ({"implementation": "magic"}, "no implementation 'magic'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict, message: str) -> None:
    drawn = case([4], [[4, 1]])
    with pytest.raises(ValueError, match=message):
        attention(**{"sight": drawn.sight, "alpha": 1.0, **drawn.arrays, **changes})


@pytest.mark.parametrize(
    ("lengths", "prefixes", "message"),
    [([3], [[4]], "prefix must lie between"), ([3], [[-1]], "prefix must lie between")],
)
def test_a_row_cannot_see_beyond_its_history(
    lengths: list[int], prefixes: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        case(lengths, prefixes).run()


def test_lengths_must_sum_to_the_tokens() -> None:
    drawn = case([4], [[4, 1]])
    drawn.sight = dataclasses.replace(drawn.sight, memory_lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="do not sum to 2 rows and 4 memory tokens"):
        drawn.run()


def test_a_sight_is_int64_of_one_dimension() -> None:
    sight = case([4], [[4, 1]]).sight
    with pytest.raises(ValueError, match="row_prefix must be int64"):
        dataclasses.replace(sight, row_prefix=sight.row_prefix.int())
    with pytest.raises(ValueError, match="row_prefix and row_times must be equally long"):
        dataclasses.replace(sight, row_prefix=sight.row_prefix[:1])
