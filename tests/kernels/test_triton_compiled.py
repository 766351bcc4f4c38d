"""The attention kernels compile for GPUs that are not here, multiply on tensor cores and do not spill."""

import math

import pytest
import torch

from benchmarks.attention_code import KERNELS, compiled
from benchmarks.kernels import drawn_times, own_sight, static_shares
from benchmarks.machine_code import SHARED, TENSOR, clocks

REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}  # that a thread may have


def check(target: str, kernel: str, dtype: torch.dtype, width: int) -> None:
    code = compiled(target, kernel, dtype, width)
    assert code.stack == 0
    assert code.spills == 0
    assert code.registers <= REGISTERS[target]
    assert code.shared <= SHARED[target]
    assert code.blocks >= 1
    # At least one for each product of a tile, in each of the loops.
    assert code.tensor_instructions >= 2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", TENSOR)
def test_kernels_of_bf16_compile_without_spills(target: str, kernel: str) -> None:
    check(target, kernel, torch.bfloat16, 128)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", TENSOR)
@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 64), (torch.float32, 64)])
def test_kernels_of_other_shapes_compile(target: str, kernel: str, dtype: torch.dtype, width: int) -> None:
    code = compiled(target, kernel, dtype, width)
    assert code.shared <= SHARED[target]
    assert code.registers <= REGISTERS[target]


def test_the_steady_loops_multiply_what_a_tile_takes() -> None:
    """A loop for each kind of tile, with the products of a whole tile: nothing is unrolled or left out."""
    for kernel, products, kinds in (("forward", 2, 3), ("backward_rows", 3, 3), ("backward_memory", 4, 3)):
        loops = compiled("sm_90", kernel, torch.bfloat16, 128).loops()
        assert len(loops) == kinds
        pairs = 32 * 128 if kernel == "backward_memory" else 128 * 64
        for loop in loops:
            assert 2 * loop.tensor_flop() == products * 2 * 128 * pairs  # two warp groups a block
            busy = clocks(loop, 8, (1.0,) * len(loop.inner))
            assert busy["special"] >= pairs / 16  # one tanh a pair
            assert math.isclose(busy["tensor"], products * 2 * 128 * pairs / 4096)


def test_the_bound_on_an_h100_is_what_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    found = static_shares(own_sight(drawn_times(4096)), 128)
    assert found["share_forward"] >= 0.75
    assert found["share_backward"] >= 0.55
    assert found["spills"] == 0
    assert "backward_memory" in capsys.readouterr().out
