"""Embedding rows: sums by row and rowwise optimizers say what the formulas say, and touch nothing else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.embedding import gather, rowwise_adagrad_, rowwise_adamw_, summed_by_row

N, D = 12, 5

distinct_rows = st.lists(st.integers(0, N - 1), unique=True)
some_rows = st.lists(st.integers(0, N - 1), max_size=30)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_rows(rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


@given(some_rows)
def test_sums_by_row_are_those_of_a_loop(rows: list[int]) -> None:
    gradient = normal(len(rows), D)
    expected: dict[int, Tensor] = {}
    for row, one in zip(rows, gradient, strict=True):
        expected[row] = expected.get(row, torch.zeros(D, dtype=torch.float64)) + one
    distinct, sums = summed_by_row(as_rows(rows), gradient)
    assert distinct.tolist() == sorted(expected)
    assert sums.shape == (len(expected), D)
    for row, total in zip(distinct.tolist(), sums, strict=True):
        torch.testing.assert_close(total, expected[row], atol=1e-12, rtol=1e-12)


def test_narrow_gradients_are_summed_in_fp32() -> None:
    rows = torch.zeros(1000, dtype=torch.int64)
    _, sums = summed_by_row(rows, torch.ones(1000, 3, dtype=torch.bfloat16))
    assert sums.dtype == torch.float32
    assert sums.tolist() == [[1000.0] * 3]  # in bf16 it would have stopped at 256


@given(some_rows)
def test_gathered_rows_are_the_tables(rows: list[int]) -> None:
    table = normal(N, D)
    assert torch.equal(gather(table, as_rows(rows)), table[as_rows(rows)])


@settings(max_examples=30)
@given(st.lists(distinct_rows, min_size=1, max_size=4))
def test_adagrad_is_the_formula_and_leaves_other_rows_as_they_were(steps: list[list[int]]) -> None:
    table, squares = normal(N, D).float(), torch.zeros(N)
    untouched = sorted(set(range(N)).difference(*steps))
    before = table.clone()
    exact, sums = before.double(), [0.0] * N
    for at, rows in enumerate(steps):
        gradient = normal(len(rows), D, seed=at).float()
        rowwise_adagrad_(table, squares, as_rows(rows), gradient, learning_rate=0.3)
        for row, one in zip(rows, gradient.double(), strict=True):
            sums[row] += sum(x * x for x in one.tolist()) / D
            exact[row] -= 0.3 / math.sqrt(max(sums[row], 1e-20)) * one
    torch.testing.assert_close(table.double(), exact, atol=1e-5, rtol=1e-5)
    rounded = (D + len(steps)) * 2.0**-24  # of sums in fp32: half a unit in the last place an addition
    torch.testing.assert_close(
        squares.double(), torch.tensor(sums, dtype=torch.float64), atol=0, rtol=rounded
    )
    assert torch.equal(table[untouched], before[untouched])


@settings(max_examples=30)
@given(
    st.lists(distinct_rows, min_size=1, max_size=4),
    st.sampled_from([(0.9, 0.999), (0.0, 0.5)]),
    st.sampled_from([0.0, 0.1]),
)
def test_adamw_is_the_formula_with_steps_of_each_row(
    steps: list[list[int]], betas: tuple[float, float], decay: float
) -> None:
    table, mean, square = normal(N, D), torch.zeros(N, D).double(), torch.zeros(N).double()
    counts = torch.zeros(N, dtype=torch.int32)
    exact = table.clone()
    first, second = [torch.zeros(D).double()] * N, [0.0] * N
    for at, rows in enumerate(steps):
        gradient = normal(len(rows), D, seed=at)
        rowwise_adamw_(
            table, mean, square, counts, as_rows(rows), gradient, 0.1, betas, 1e-8, weight_decay=decay
        )
        for row, one in zip(rows, gradient, strict=True):
            t = sum(row in earlier for earlier in steps[: at + 1])
            first[row] = betas[0] * first[row] + (1 - betas[0]) * one
            second[row] = betas[1] * second[row] + (1 - betas[1]) * float(one.square().mean())
            corrected = first[row] / (1 - betas[0] ** t)
            root = math.sqrt(second[row] / (1 - betas[1] ** t))
            exact[row] -= 0.1 * (corrected / (root + 1e-8) + decay * exact[row])
    torch.testing.assert_close(table, exact, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(mean, torch.stack(first), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(square, torch.tensor(second).double(), atol=1e-12, rtol=1e-6)
    assert counts.tolist() == [sum(row in rows for rows in steps) for row in range(N)]
    untouched = sorted(set(range(N)).difference(*steps))
    assert torch.equal(table[untouched], normal(N, D)[untouched])


def test_with_one_weight_a_row_adamw_is_pytorchs() -> None:
    """Then rowwise is elementwise, and torch.optim.AdamW the same thing."""
    table, mean, square = normal(N, 1).float(), torch.zeros(N, 1), torch.zeros(N)
    counts, rows = torch.zeros(N, dtype=torch.int64), torch.arange(N)
    theirs = torch.nn.Parameter(table.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for step in range(5):
        theirs.grad = normal(N, 1, seed=step).float()
        optimizer.step()
        rowwise_adamw_(table, mean, square, counts, rows, theirs.grad, 0.01, weight_decay=0.1)
    torch.testing.assert_close(table, theirs.detach(), atol=1e-6, rtol=1e-5)


ROWS, GRADIENT = torch.tensor([1, 3]), torch.zeros(2, D)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(N, D, dtype=torch.bfloat16)}, r"table must be \(rows, width\) of float32"),
        ({"table": torch.zeros(D, N).t()}, "contiguous"),
        ({"rows": ROWS.int()}, "rows must be int64"),
        ({"gradient": torch.zeros(3, D)}, r"gradient must be \(2, 5\) of torch.float32, not \(3, 5\)"),
        ({"gradient": GRADIENT.double()}, "not .* of torch.float64"),
        ({"implementation": "magic"}, "no implementation 'magic'"),
        ({"square": torch.zeros(N + 1)}, r"must be \(12,\) of torch.float32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict, message: str) -> None:
    given_ = {
        "table": torch.zeros(N, D),
        "square": torch.zeros(N),
        "rows": ROWS,
        "gradient": GRADIENT,
        **change,
    }
    implementation = given_.pop("implementation", "auto")
    table, square, rows, gradient = given_.values()
    with pytest.raises(ValueError, match=message):
        rowwise_adagrad_(table, square, rows, gradient, 0.1, implementation=implementation)
    state = torch.zeros(table.shape, dtype=table.dtype), square, torch.zeros(N, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        rowwise_adamw_(table, *state, rows, gradient, 0.1, implementation=implementation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(N, D + 1)}, r"mean must be \(12, 5\)"),
        ({"steps": torch.zeros(N)}, "steps must be .* of int32 or int64"),
        ({"betas": (0.9, 1.0)}, "betas must lie in"),
    ],
)
def test_the_state_of_adamw_must_fit(change: dict, message: str) -> None:
    state = {"mean": torch.zeros(N, D), "square": torch.zeros(N), "steps": torch.zeros(N, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        rowwise_adamw_(
            table=torch.zeros(N, D), rows=ROWS, gradient=GRADIENT, learning_rate=0.1, **{**state, **change}
        )


def test_gradients_to_sum_must_fit() -> None:
    with pytest.raises(ValueError, match=r"gradient must be \(2, width\)"):
        summed_by_row(ROWS, torch.zeros(3, D))
    with pytest.raises(ValueError, match="rows must be int64"):
        summed_by_row(ROWS.int(), GRADIENT)
