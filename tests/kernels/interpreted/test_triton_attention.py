"""The Triton kernels agree with the reference in float64, forward and backward."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kernels import Sight, attention, triton_attention
from kernels.triton_attention import Blocks
from kernels.triton_tiles import Tiles, tiles
from tests.attention_cases import TABLES, Case, case, cases

# The exact SiLU of a pair out of sight is -1e30 / (1 + exp(1e30)).
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

# Largest error allowed, as a share of the largest number: fp32's own, and what rounding scores' weights and
# gradients to 8 and to 11 bits leaves.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> None:
    """Tiles so small that few tokens make many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            triton_attention, "blocks_for", lambda *_, **__: (Blocks(16, 16), Blocks(16, 16, by_memory=True))
        )
        yield


def narrowed(drawn: Case, dtype: torch.dtype) -> Case:
    arrays = {n: x.to(torch.float32 if n in TABLES else dtype) for n, x in drawn.arrays.items()}
    return dataclasses.replace(drawn, arrays=arrays)


def results(drawn: Case, implementation: str, weights: Tensor) -> dict[str, Tensor]:
    arrays = {name: x.detach().clone().requires_grad_() for name, x in drawn.arrays.items()}
    out = dataclasses.replace(drawn, arrays=arrays).run(implementation)
    inputs = list(arrays.values())
    gradients = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(arrays, gradients, strict=True))}


def check(drawn: Case, dtype: torch.dtype) -> None:
    ours = narrowed(dataclasses.replace(drawn, softmax=False), dtype)
    exact = dataclasses.replace(ours, arrays={name: x.double() for name, x in ours.arrays.items()})
    weights = torch.randn(ours.arrays["v_self"].shape, generator=torch.Generator().manual_seed(0))
    expected = results(exact, "reference", weights.to(dtype).double())
    for name, got in results(ours, "triton", weights.to(dtype)).items():
        assert got.dtype == (torch.float32 if name == "out" else ours.arrays[name].dtype)
        # What cancels may leave less than was added up: numbers of the order of 1, in a table one a pair.
        # That many roundings show beside the bound of fp32 alone.
        pairs = len(drawn.sight.row_prefix) + int(drawn.sight.row_prefix.sum())
        least = 0.25 * (pairs**0.5 if name in TABLES and dtype == torch.float32 else 1)
        scale = max(float(expected[name].abs().max()), least) if expected[name].numel() else 0.0
        torch.testing.assert_close(
            got.double(),
            expected[name],
            rtol=0,
            atol=BOUNDS[dtype] * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@settings(max_examples=10, deadline=None)
@given(cases())
def test_drawn_cases_agree_in_fp32(drawn: Case) -> None:
    check(drawn, torch.float32)


@settings(max_examples=4, deadline=None)
@given(cases())
def test_drawn_cases_agree_in_bf16(drawn: Case) -> None:
    check(drawn, torch.bfloat16)


@settings(max_examples=3, deadline=None)
@given(cases())
def test_drawn_cases_agree_in_fp16(drawn: Case) -> None:
    check(drawn, torch.float16)


def long_case(times: str) -> Case:
    """One history of 130, its own rows and two that ask late, and one of 40 seen by candidates alone."""
    drawn = case([130, 40], [[*range(130), 130, 60], [40] * 18], qk=5, v=3, heads=1, times="some", bits=1)
    memory, rows = drawn.sight.memory_times, drawn.sight.row_times
    if times == "rising":
        steps = torch.tensor([50, 1000, 3000]).repeat(57)[:170]
        steps[64] = 10**9  # the next day: all pairs across it are in one bucket
        history = steps.cumsum(0)
        memory, rows = history, torch.cat((history[:130], history[[129, 60]], history[[169]].expand(18) + 7))
    sight = Sight(
        drawn.sight.memory_lengths, memory, drawn.sight.row_lengths, drawn.sight.row_prefix, rows.clone()
    )
    return dataclasses.replace(drawn, sight=sight)


@pytest.mark.parametrize("times", ["rising", "some"])
def test_tiles_of_every_kind_agree(times: str) -> None:
    drawn = long_case(times)
    for blocks in triton_attention.blocks_for(torch.float32, 16, of=9):
        plan = triton_attention._tiles(drawn.sight, 1, True, blocks, sums=False)
        kinds = plan.programs[:, 5:] - plan.programs[:, 4:-1]
        # A tile whose times go back and forth is mixed.
        assert (kinds.sum(0) > 0).tolist() == ([True] * 3 if times == "rising" else [False, False, True])
    check(drawn, torch.float32)


def test_steps_of_mixed_tiles_are_planned_where_a_table_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(*options: Any) -> Tiles:
        asked.append(options[-1])
        return tiles(*options)

    monkeypatch.setattr(triton_attention, "tiles", recorded)
    for learns in (False, True):
        drawn = narrowed(case([20], [[20, 3]]), torch.float32)
        for x in drawn.arrays.values():
            x.requires_grad_()
        with torch.set_grad_enabled(learns):
            out = drawn.run("triton")
        assert asked == [learns]
        if learns:
            out.sum().backward()
            assert asked == [True, False]  # the plan by memory has none
        asked.clear()


def test_two_runs_are_equal_bit_for_bit() -> None:
    drawn = narrowed(long_case("rising"), torch.float32)

    def run() -> list[Tensor]:
        arrays = {name: x.clone().requires_grad_() for name, x in drawn.arrays.items()}
        out = attention(
            **arrays, sight=drawn.sight, alpha=drawn.alpha, implementation="triton", deterministic=True
        )
        return [out, *torch.autograd.grad(out.square().sum(), list(arrays.values()))]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_slices_of_a_projection_are_taken_as_they_are() -> None:
    drawn = narrowed(case([20, 3], [[20, 5], [3]], qk=4, v=4), torch.float32)
    arrays = dict(drawn.arrays)
    arrays["q"], arrays["k_self"] = torch.stack((arrays["q"], arrays["k_self"]), 1).unbind(1)
    arrays["k"], arrays["v"] = torch.stack((arrays["k"], arrays["v"]), 3).unbind(3)
    apart = dataclasses.replace(drawn, arrays=arrays)
    assert not apart.arrays["q"].is_contiguous()
    assert torch.equal(apart.run("triton"), drawn.run("triton"))


def test_a_broken_user_stays_alone_with_its_nan() -> None:
    drawn = narrowed(case([9, 20], [[9, 2], [20, 4, 0]]), torch.float32)
    before = drawn.run("triton")[2:]
    for name in ("k", "v"):
        drawn.arrays[name][:9] = torch.nan
    torch.testing.assert_close(drawn.run("triton")[2:], before)


def test_what_triton_cannot_do_is_refused() -> None:
    drawn = case([4], [[4, 1]], dtype=torch.float32)
    with pytest.raises(ValueError, match="no softmax"):
        dataclasses.replace(drawn, softmax=True).run("triton")
    with pytest.raises(ValueError, match="must all be bf16"):
        case([4], [[4, 1]]).run("triton")
