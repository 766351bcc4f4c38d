"""The Triton kernels of embedding rows against PyTorch's, and untouched rows bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.embedding import gather, rowwise_adagrad_, rowwise_adamw_, summed_by_row

widths = st.sampled_from([1, 5, 50, 64, 200])


@settings(max_examples=15)
@given(width=widths, count=st.integers(0, 40), seed=st.integers(0, 3))
def test_gathered_rows_and_sums_are_pytorchs(width: int, count: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    table = torch.randn(30, width, generator=random)
    rows = torch.randint(0, 1 + 29 * seed // 3, (count,), generator=random)  # from all one to mostly distinct
    taken = gather(table, rows, implementation="triton")
    assert torch.equal(taken, table[rows])
    ours = summed_by_row(rows, taken, implementation="triton")
    theirs = summed_by_row(rows, taken, implementation="pytorch")
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)


@settings(max_examples=15)
@given(width=widths, touched=st.integers(0, 30), seed=st.integers(0, 3))
def test_updates_are_pytorchs(width: int, touched: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randperm(30, generator=random)[:touched]
    state = {
        "pytorch": [torch.randn(30, width, generator=random), torch.rand(30, generator=random)],
    }
    state["pytorch"] += [torch.randn(30, width, generator=random), torch.randint(0, 500, (30,))]
    state["triton"] = [array.clone() for array in state["pytorch"]]
    before = [array.clone() for array in state["pytorch"]]
    for _ in range(2):
        gradient = torch.randn(touched, width, generator=random)
        for name, (table, square, mean, steps) in state.items():
            rowwise_adagrad_(table, square, rows, gradient, 0.1, implementation=name)
            rowwise_adamw_(
                table, mean, square, steps, rows, gradient, 1e-2, weight_decay=0.1, implementation=name
            )
    untouched = torch.ones(30, dtype=torch.bool).index_fill_(0, rows, False)
    for our, their, old in zip(state["triton"], state["pytorch"], before, strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)
        assert torch.equal(our[untouched], old[untouched])


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.9999)])
def test_the_first_step_of_adamw_is_the_learning_rate(betas: tuple[float, float]) -> None:
    """Bias correction at t = 1, where 1 − β cancels: with equal gradients the step is exactly that long."""
    table, mean = torch.zeros(1, 8), torch.zeros(1, 8)
    square, steps = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    gradient = torch.full((1, 8), 3.0)
    rowwise_adamw_(
        table, mean, square, steps, torch.tensor([0]), gradient, 0.5, betas, implementation="triton"
    )
    torch.testing.assert_close(table, torch.full((1, 8), -0.5), atol=0, rtol=1e-6)
