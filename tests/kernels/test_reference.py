"""The reference attention says what the formula says."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import (
    TIME_BUCKETS,
    UNKNOWN_TIME,
    attention,
    position_bits,
    position_bucket,
    position_rows,
    time_bucket,
)
from kernels import reference as blocks
from tests.attention_cases import Case, case, cases


def log_bucket(x: int, bits: int, count: int) -> int:
    """The bucket in exact integers: 2^bits an octave, those that hold no other integer exact."""
    x = max(x, 0)
    if x < 2**bits:
        return x
    octave = x.bit_length() - 1
    return min(((octave - bits + 1) << bits) + (x >> (octave - bits)) - (1 << bits), count - 1)


def log_time_bucket(x: int, count: int) -> int:
    """The same, two an octave, 0 and 1 sharing the first."""
    return 0 if x < 2 else log_bucket(x, 1, count)


def naive(case: Case) -> Tensor:
    """The formula pair by pair, in Python's own arithmetic for buckets."""
    a, sight = {name: array.double() for name, array in case.arrays.items()}, case.sight
    heads = a["q"].shape[1]
    out = torch.zeros(len(sight.row_prefix), heads, a["v"].shape[-1], dtype=torch.float64)

    def score(q: Tensor, k: Tensor, head: int, position: int, time: int | None) -> float:
        bias = 0.0
        if "position_bias" in a:
            rows = len(a["position_bias"])
            bias += float(a["position_bias"][log_bucket(position, position_bits(rows), rows), head])
        if "time_bias" in a:
            bucket = TIME_BUCKETS - 1 if time is None else log_time_bucket(time, TIME_BUCKETS - 1)
            bias += float(a["time_bias"][bucket, head])
        return float(case.alpha * (q @ k)) + bias

    def weights(scores: list[float]) -> Tensor:
        drawn = torch.tensor(scores, dtype=torch.float64)
        return drawn.softmax(0) if case.softmax else drawn / (1 + torch.exp(-drawn))

    row = first = 0
    for length, row_count in zip(sight.memory_lengths.tolist(), sight.row_lengths.tolist(), strict=True):
        for i in range(row, row + row_count):
            p, t = int(sight.row_prefix[i]), int(sight.row_times[i])
            for h in range(heads):
                q = a["q"][i, h]
                scores = [score(q, a["k_self"][i, h], h, 0, 0)]
                for j in range(p):
                    then = int(sight.memory_times[first + j])
                    passed = None if UNKNOWN_TIME in (t, then) else t - then
                    scores.append(score(q, a["k"][first + j, h], h, p - j, passed))
                seen = torch.cat((a["v_self"][i : i + 1, h], a["v"][first : first + p, h]))
                out[i, h] = weights(scores) @ seen
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
    plan = whole.sight.planned(blocks._plan, 3, 2)
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


@pytest.mark.parametrize("softmax", [False, True])
def test_gradients_pass_gradcheck(softmax: bool) -> None:
    drawn = case([3, 0, 5], [[3, 1, 0], [0], [5, 4]], heads=2, qk=2, v=3, times="some", softmax=softmax)
    names = list(drawn.arrays)
    # A table of 96 rows makes gradcheck slow: check the rows that take part, leave the others as they are.
    inputs = [array.requires_grad_() for array in drawn.arrays.values()]

    def run(*arrays: Tensor) -> Tensor:
        return Case(drawn.sight, dict(zip(names, arrays, strict=True)), softmax).run()

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
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_position_buckets_are_exact_and_then_parts_of_octaves(x: int, bits: int) -> None:
    bucket = int(position_bucket(torch.tensor(x), bits))
    assert bucket == log_bucket(x, bits, position_rows(bits))
    if 0 <= x < 2 ** (bits + 1):
        assert bucket == x


@given(
    st.integers(-(10**12), 2**24)
    | st.integers(1, 62).map(lambda e: 2**e)
    | st.integers(1, 61).map(lambda e: 3 * 2**e)
)
def test_time_buckets_are_half_octaves(x: int) -> None:
    """Exact integers up to 2^24 and at every edge; between, rounding to float32 is part of the definition.

    The last bucket is that of unknown times: no known ones lie 2^43.5 ms apart.
    """
    assert int(time_bucket(torch.tensor(x))) == log_time_bucket(x, TIME_BUCKETS)


@given(st.integers(0, 2**62), st.integers(0, 2**62))
def test_buckets_never_decrease_with_distance(x: int, y: int) -> None:
    low, high = sorted((x, y))
    for bucket in (position_bucket, time_bucket):
        assert int(bucket(torch.tensor(low))) <= int(bucket(torch.tensor(high)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(5, 2, 3, dtype=torch.float64)}, "k must have shape"),
        ({"position_bias": torch.zeros(7, 2)}, "position_bias must have one of these numbers of rows"),
        ({"position_bias": torch.zeros(96, 3)}, "position_bias must have shape"),
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
