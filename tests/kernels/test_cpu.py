"""The CPU's attention is the reference's, forward and backward, and keeps none of its scores."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kernels import Sight, chosen, cpu_blocks
from tests.attention_cases import Case, case, cases


def outcome(case: Case, implementation: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The result and the gradients of all arguments under random weights, by name."""
    arrays = {
        name: array.to(dtype or array.dtype).clone().requires_grad_() for name, array in case.arrays.items()
    }
    out = dataclasses.replace(case, arrays=arrays).run(implementation)
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=random, dtype=torch.float64)
    grads = torch.autograd.grad((out * weights.to(out.dtype)).sum(), list(arrays.values()), allow_unused=True)
    named = dict(zip(arrays, grads, strict=True))
    return {"out": out.detach()} | {
        name: torch.zeros_like(arrays[name]) if grad is None else grad for name, grad in named.items()
    }


def agree(case: Case, bound: float) -> None:
    """Every figure within `bound` of the reference in float64, relative to the larger of 1 and the figure."""
    ours, theirs = outcome(case, "cpu"), outcome(case, "reference", torch.float64)
    for name, array in case.arrays.items():
        assert ours[name].dtype == array.dtype
    assert ours["out"].dtype == torch.promote_types(case.arrays["q"].dtype, torch.float32)
    for name, our in ours.items():
        torch.testing.assert_close(
            our.double(), theirs[name], atol=bound, rtol=bound, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_blocks, "BLOCK_PAIRS", 1 << 11)
    monkeypatch.setattr(cpu_blocks, "BLOCK_ROWS", 7)


@settings(max_examples=60)
@given(cases(torch.float64))
def test_in_float64_it_is_the_reference(case: Case) -> None:
    agree(case, 1e-11)


@settings(max_examples=60)
@given(cases(torch.float32))
def test_in_fp32_it_is_the_reference_within_1e_5(case: Case) -> None:
    agree(case, 1e-5)


@settings(max_examples=60)
@given(cases(torch.bfloat16))
def test_in_bf16_it_is_the_reference_within_the_stated_bound(case: Case) -> None:
    """Scores, weights and their gradients pass through bf16, 2^-9 each, and are summed over a few pairs."""
    agree(case, 6e-2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("times", ["any", "equal", "some"])
@pytest.mark.parametrize("tables", [(), ("position_bias",), ("time_bias",), ("position_bias", "time_bias")])
def test_many_blocks_of_several_groups_are_the_reference(
    softmax: bool, times: str, tables: tuple[str, ...]
) -> None:
    """Rows in order, which share bias indices, beside rows out of order, which cannot."""
    lengths = [0, 60, 1, 33, 32, 31, 0, 2, 59, 14, 15]
    for prefixes in ([[*range(n)] for n in lengths], [[n, *range(n), n // 2] for n in lengths]):
        drawn = case(lengths, prefixes, times=times, dtype=torch.float32, tables=tables, softmax=softmax)
        agree(drawn, 2e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("times", ["any", "equal", "some"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_that_are_the_memory_see_themselves_there(softmax: bool, times: str, dtype: torch.dtype) -> None:
    """With keys and values of their own that are the memory's, sums and gradients are one."""
    lengths = [0, 40, 1, 33, 2, 39]
    drawn = case(lengths, [[*range(n)] for n in lengths], times=times, dtype=dtype, softmax=softmax)
    drawn.sight = dataclasses.replace(drawn.sight, row_times=drawn.sight.memory_times)
    for mine, memory in (("k_self", "k"), ("v_self", "v")):
        drawn.arrays[mine] = drawn.arrays[memory]
    theirs = outcome(drawn, "reference", torch.float64)
    for mine, memory in (("k_self", "k"), ("v_self", "v")):
        theirs[memory] += theirs.pop(mine)
    names = [name for name in drawn.arrays if not name.endswith("_self")]
    leaves = {name: drawn.arrays[name].requires_grad_() for name in names}
    out = drawn.run("cpu")
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((out * weights.to(dtype)).sum(), list(leaves.values()))
    bound = 1e-11 if dtype == torch.float64 else 2e-5
    for name, our in {"out": out, **dict(zip(leaves, grads, strict=True))}.items():
        torch.testing.assert_close(our.double(), theirs[name], atol=bound, rtol=bound)


@pytest.mark.usefixtures("small_blocks")
def test_rows_in_order_share_one_index_of_their_positions() -> None:
    lengths = [20, 21, 19]
    for times, timed, shared in (("equal", True, True), ("any", False, True), ("any", True, False)):
        sight = case(lengths, [[*range(n)] for n in lengths], times=times).sight
        blocks = sight.planned(cpu_blocks.plan, 3, timed, 2, False).blocks
        assert len(blocks) == 3
        for block in blocks:
            assert block.batch == 2 * 3
            assert block.pairs.shape == (1 if shared else 3, block.rows, block.seen)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_at_one_time_share_one_index_of_what_they_see(softmax: bool, dtype: torch.dtype) -> None:
    """Rows that see the same at the same time, but for one of a second request later on."""
    lengths, rows = [33, 30, 31], 20
    prefixes = [[*[n] * (rows - 1), n - (n == 30)] for n in lengths]
    drawn = case(lengths, prefixes, dtype=dtype, softmax=softmax)
    asked = drawn.sight.row_times.view(3, rows)
    drawn.sight = dataclasses.replace(drawn.sight, row_times=asked[:, :1].expand(-1, rows).reshape(-1))
    agree(drawn, 2e-5 if dtype == torch.float32 else 6e-2)
    blocks = drawn.sight.planned(cpu_blocks.plan, 3, True, 2, False).blocks
    assert {block.pairs.shape[1] == 1 for block in blocks} == {False, True}


@pytest.mark.usefixtures("small_blocks")
def test_candidates_at_several_times_have_each_their_own_biases() -> None:
    """They see the same tokens, but not from as far."""
    drawn = case([33, 30], [[33] * 20, [30] * 20], dtype=torch.float32)
    times = drawn.sight.row_times.sort().values.view(2, 20)
    later = times[:, :1] + torch.arange(20) * 3_600_000
    drawn.sight = dataclasses.replace(drawn.sight, row_times=later.reshape(-1))
    agree(drawn, 2e-5)
    blocks = drawn.sight.planned(cpu_blocks.plan, 3, True, 2, False).blocks
    assert all(block.pairs.shape[1] == block.rows for block in blocks)


def test_company_does_not_change_a_row() -> None:
    lengths = [70, 3, 0, 64, 12]
    whole = case(lengths, [[*range(n), n] for n in lengths], dtype=torch.float32)
    out, row, first = whole.run("cpu"), 0, 0
    for n in lengths:
        rows, memory = slice(row, row + n + 1), slice(first, first + n)
        alone = dataclasses.replace(
            whole,
            sight=Sight(
                torch.tensor([n]),
                whole.sight.memory_times[memory],
                torch.tensor([n + 1]),
                whole.sight.row_prefix[rows],
                whole.sight.row_times[rows],
            ),
            arrays=whole.arrays
            | {name: whole.arrays[name][rows] for name in ("q", "k_self", "v_self")}
            | {name: whole.arrays[name][memory] for name in ("k", "v")},
        )
        torch.testing.assert_close(alone.run("cpu"), out[rows], atol=1e-5, rtol=1e-5)
        row, first = rows.stop, memory.stop


@pytest.mark.parametrize("softmax", [False, True])
def test_a_broken_user_stays_alone_with_its_nan(softmax: bool) -> None:
    drawn = case([9, 8, 5], [[9, 2], [8], [5, 4, 0]], dtype=torch.float32, softmax=softmax)
    before = outcome(drawn, "cpu")
    drawn.arrays["k"][:9] = math.nan
    after = outcome(drawn, "cpu")
    for name, first in (("out", 2), ("q", 2), ("k_self", 2), ("v_self", 2), ("k", 9), ("v", 9)):
        torch.testing.assert_close(after[name][first:], before[name][first:])


@pytest.mark.parametrize("softmax", [False, True])
def test_gradients_pass_gradcheck(softmax: bool) -> None:
    drawn = case([3, 0, 5], [[3, 1, 0], [0], [5, 4]], heads=2, qk=2, v=3, times="some", softmax=softmax)
    names, inputs = list(drawn.arrays), [array.requires_grad_() for array in drawn.arrays.values()]

    def run(*arrays: Tensor) -> Tensor:
        return Case(drawn.sight, dict(zip(names, arrays, strict=True)), softmax).run("cpu")

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("softmax", [False, True])
def test_it_saves_its_arguments_alone_and_a_number_a_row_for_the_softmax(softmax: bool) -> None:
    drawn = case([64, 64], [[*range(64)]] * 2, dtype=torch.float32, softmax=softmax)
    arguments = {array.requires_grad_().untyped_storage().data_ptr() for array in drawn.arrays.values()}
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = drawn.run("cpu")
    others = {at: x for at, x in saved.items() if at not in arguments}
    assert arguments <= saved.keys()
    expected = [out.shape, out.shape[:2]] if softmax else []
    assert sorted(x.shape for x in others.values()) == sorted(expected)


def test_narrow_tensors_on_a_cpu_run_here_and_float64_by_the_reference() -> None:
    assert chosen(torch.zeros(1)) == chosen(torch.zeros(1, dtype=torch.bfloat16)) == "cpu"
    assert chosen(torch.zeros(1, dtype=torch.float64)) == "reference"
