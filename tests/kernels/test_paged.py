"""Attention over pages is attention, whoever else is in the batch and wherever the pages lie.

`test_interpreted.py` runs this file once more, with the Triton kernels.
"""

import dataclasses
import math
import os

import pytest
import torch
from hypothesis import given, settings

from kernels import UNKNOWN_TIME
from kernels.paged import paged_attention
from tests.attention_cases import TABLES, Case, case
from tests.paged_cases import Paged, candidates, in_pages, paged_cases

IMPLEMENTATION = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "pytorch"


def exact(drawn: Case) -> torch.Tensor:
    """The definition on the same numbers in one piece, in float64."""
    wide = {name: array.double() for name, array in drawn.arrays.items()}
    return Case(drawn.sight, wide, drawn.softmax).run("reference")


def magnitude(drawn: Case) -> torch.Tensor:
    """Each row's sum of |weight · value|, weights being what a row makes of values that are unit vectors."""
    arrays, heads = {name: array.double() for name, array in drawn.arrays.items()}, drawn.arrays["q"].shape[1]
    memory, rows = len(arrays["v"]), len(arrays["v_self"])
    units = torch.eye(memory + rows, dtype=torch.float64).unsqueeze(1).expand(-1, heads, -1)
    read = Case(drawn.sight, {**arrays, "v": units[:memory], "v_self": units[memory:]}, drawn.softmax)
    values = torch.cat((arrays["v"], arrays["v_self"])).abs()
    return torch.einsum("rhm,mhd->rhd", read.run("reference").abs(), values)


@settings(max_examples=40)
@given(paged_cases(torch.float32))
def test_pages_are_the_same_as_one_piece(drawn: Paged) -> None:
    out = drawn.run(IMPLEMENTATION)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact(drawn.case), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(IMPLEMENTATION == "pytorch", reason="it is then a matter of kernels.attention")
@settings(max_examples=15)
@given(paged_cases(torch.bfloat16))
def test_in_bf16_an_error_is_a_rounding_of_the_weights(drawn: Paged) -> None:
    """2^-7 of the sum of |weight · value|, as the interpreter rounds to 0; to nearest it is half that."""
    out, expected, size = drawn.run(IMPLEMENTATION), exact(drawn.case), magnitude(drawn.case)
    assert bool(((out.double() - expected).abs() <= 2**-7 * size + 1e-5).all())


@pytest.mark.skipif(IMPLEMENTATION == "triton", reason="kernels compute in fp32")
@settings(max_examples=20)
@given(paged_cases(torch.float64))
def test_float64_stays_float64(drawn: Paged) -> None:
    torch.testing.assert_close(drawn.run(IMPLEMENTATION), exact(drawn.case), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_histories_and_large_micro_batches_in_pages_of_all_sizes(dtype: torch.dtype) -> None:
    """Several tiles of rows and blocks of memory; neither length a multiple of anything."""
    for page_tokens in (16, 64, 256):
        drawn = candidates([300, 0, 129], [70, 3, 130], page_tokens, dtype, heads=2, qk=16, v=16)
        out = drawn.run(IMPLEMENTATION)
        bound = 1e-5 if dtype == torch.float32 else 2**-7
        size = 1 + magnitude(drawn.case)
        assert bool(((out.double() - exact(drawn.case)).abs() <= bound * size).all())


def test_candidates_may_be_shown_at_times_of_their_own() -> None:
    """Rows that differ in nothing but their time, known or not, or in nothing but what they see."""
    drawn = case([40, 40], [[40] * 4, [40, 39, 40, 0]], times="some", dtype=torch.float32)
    times = torch.tensor([10**6, 10**10, UNKNOWN_TIME, 5, 7, 7, 7, 7])
    drawn.sight = dataclasses.replace(drawn.sight, row_times=times)
    out = in_pages(drawn, 16).run(IMPLEMENTATION)
    torch.testing.assert_close(out.double(), exact(drawn), atol=1e-5, rtol=1e-5)


def test_candidates_in_another_order_have_the_same_results() -> None:
    drawn = candidates([50, 20], [9, 7])
    order = [[3, 0, 8, 1, 7, 2, 6, 4, 5], [6, 2, 0, 1, 5, 4, 3]]
    there = torch.tensor([*order[0], *(9 + r for r in order[1])])
    permuted = drawn.rows(order).run(IMPLEMENTATION)
    torch.testing.assert_close(permuted, drawn.run(IMPLEMENTATION)[there], atol=1e-5, rtol=1e-5)


def test_micro_batches_may_be_of_any_size() -> None:
    """And sequences that have none in one of them may stay away."""
    drawn = candidates([70, 20, 0], [80, 7, 2])
    first, second, third = (list(range(n)) for n in (80, 7, 2))
    parts = [[first[:1], second[:5], []], [first[1:70], [], third], [first[70:], second[5:], []]]
    outs = [drawn.rows(part).run(IMPLEMENTATION).split([len(own) for own in part]) for part in parts]
    joined = torch.cat([torch.cat([out[s] for out in outs]) for s in range(3)])
    torch.testing.assert_close(joined, drawn.run(IMPLEMENTATION), atol=1e-5, rtol=1e-5)


def test_a_page_of_another_user_has_no_effect() -> None:
    drawn = candidates([50, 20, 33], [4, 3, 5])
    before = drawn.run(IMPLEMENTATION)
    theirs = drawn.sight.pages[4:6]  # the second sequence's
    drawn.k_pages[theirs] = math.nan
    drawn.v_pages[theirs] = math.inf
    drawn.sight.page_times[theirs] += 10**9
    after = dataclasses.replace(drawn, sight=dataclasses.replace(drawn.sight)).run(IMPLEMENTATION)
    assert torch.equal(after[:4], before[:4])
    assert torch.equal(after[7:], before[7:])
    assert not bool(torch.isfinite(after[4:7]).any())


def test_pages_may_be_shared() -> None:
    """As by users whose histories begin alike, or the requests of one user in one batch."""
    drawn = candidates([40], [6])
    sight = drawn.sight
    twice = dataclasses.replace(
        sight,
        memory_lengths=sight.memory_lengths.repeat(2),
        pages=sight.pages.repeat(2),
        row_lengths=torch.tensor([2, 4]),
    )
    shared = dataclasses.replace(drawn, sight=twice).run(IMPLEMENTATION)
    torch.testing.assert_close(shared, drawn.run(IMPLEMENTATION), atol=1e-5, rtol=1e-5)


def test_a_layers_pages_may_be_a_view_of_the_pool() -> None:
    """(pages, layers, k and v, tokens, …): nothing but the last dimension need be whole."""
    drawn = candidates([50, 20], [4, 3], qk=4, v=4)
    pool = torch.full((len(drawn.k_pages), 3, 2, *drawn.k_pages.shape[1:]), math.nan)
    pool[:, 1, 0], pool[:, 1, 1] = drawn.k_pages, drawn.v_pages
    viewed = dataclasses.replace(drawn, k_pages=pool[:, 1, 0], v_pages=pool[:, 1, 1])
    assert torch.equal(viewed.run(IMPLEMENTATION), drawn.run(IMPLEMENTATION))


def test_rows_may_be_slices_of_a_projection() -> None:
    drawn = candidates([30], [5], qk=4, v=4, heads=2)
    before = drawn.run(IMPLEMENTATION)
    names = ("q", "k_self", "v_self")
    projection = torch.cat([drawn.case.arrays[name].flatten(1) for name in names], 1)
    for name, columns in zip(names, projection.split(8, 1), strict=True):
        drawn.case.arrays[name] = columns.unflatten(1, (2, 4))
    assert torch.equal(drawn.run(IMPLEMENTATION), before)


def test_extending_writes_a_token_where_it_is_read() -> None:
    """Rows that become memory tokens: written to `row_places`, then all see those before them at once."""
    drawn = case([37, 20], [list(range(30, 37)), []], dtype=torch.float32)
    whole = in_pages(drawn, 16)
    rows, pool = whole.sight.row_places(), whole.k_pages.clone()
    assert bool((pool[rows] == drawn.arrays["k"][30:37]).all())
    whole.k_pages[rows] = math.nan
    assert not bool(torch.isfinite(whole.run(IMPLEMENTATION)[1:]).any())
    whole.k_pages[rows] = drawn.arrays["k"][30:37]
    torch.testing.assert_close(whole.run(IMPLEMENTATION).double(), exact(drawn), atol=1e-5, rtol=1e-5)


def test_nothing_in_sight_and_nothing_at_all() -> None:
    nothing = in_pages(case([0, 0], [[], []], dtype=torch.float32), 16)
    assert nothing.run(IMPLEMENTATION).shape == (0, 2, 4)
    alone = in_pages(case([0, 5], [[0], [0]], dtype=torch.float32), 16)
    torch.testing.assert_close(alone.run(IMPLEMENTATION).double(), exact(alone.case), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pages": torch.tensor([0, 1])}, "take 3 pages of 16 tokens, not 2"),
        ({"pages": torch.tensor([0, 1, 6])}, "page numbers must lie between 0 and 5"),
        ({"pages": torch.tensor([0, 1, -1])}, "page numbers must lie between"),
        ({"row_prefix": torch.tensor([40, 41])}, "prefix must lie between 0"),
        ({"row_lengths": torch.tensor([3])}, "row_lengths do not sum to 2 rows"),
        ({"memory_lengths": torch.tensor([-1])}, "must not be negative"),
    ],
)
def test_numbers_that_disagree_are_named(changes: dict, message: str) -> None:
    drawn = in_pages(case([40], [[40, 39]], dtype=torch.float32), 16)
    drawn.sight = dataclasses.replace(drawn.sight, **changes)
    with pytest.raises(ValueError, match=message):
        drawn.run(IMPLEMENTATION)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pages": torch.zeros(1, 3, dtype=torch.int64)}, "pages must be int64 of 1 dimension:"),
        ({"page_times": torch.zeros(6, 16)}, "page_times must be int64 of 2 dimensions"),
        ({"page_times": torch.zeros(6, 24, dtype=torch.int64)}, "power of two of tokens, 16 or more, not 24"),
        ({"page_times": torch.zeros(6, 8, dtype=torch.int64)}, "16 or more, not 8"),
        ({"row_times": torch.zeros(3, dtype=torch.int64)}, "row_prefix and row_times must be equally long"),
    ],
)
def test_a_paged_sight_that_does_not_fit_is_named(changes: dict, message: str) -> None:
    sight = in_pages(case([40], [[40, 39]]), 16).sight
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sight, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_pages": torch.zeros(6, 16, 2, 5)}, "k_pages must have shape"),
        ({"v_self": torch.zeros(2, 2, 5)}, "v_self must have shape"),
        ({"position_bias": torch.zeros(95, 2)}, "position_bias must have one of these numbers of rows"),
        ({"time_bias": torch.zeros(7, 2)}, "time_bias must have shape"),
        ({"implementation": "magic"}, "no implementation 'magic'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict, message: str) -> None:
    drawn = in_pages(case([40], [[40, 39]], dtype=torch.float32), 16)
    arrays = {n: drawn.case.arrays[n] for n in ("q", "k_self", "v_self", *TABLES)}
    pages = {"k_pages": drawn.k_pages, "v_pages": drawn.v_pages, "sight": drawn.sight}
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**arrays, **pages, "alpha": 1.0, **changes})
