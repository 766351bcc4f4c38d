"""The Triton kernels of LayerNorm ⊙ u against PyTorch's of the same, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import triton_norm_gate
from kernels.norm_gate import norm_gate, norm_gate_backward, norm_gate_forward

EPSILON = 1e-6


def drawn(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """The gradient, o, u, weight and bias; u is a column of something wider."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    o = normal(rows, width) * normal(rows, 1).exp() + normal(rows, 1)
    u = normal(rows, 2 * width).to(dtype)[:, width - width // 2 :][:, :width]
    return [normal(rows, width).to(dtype), o.to(dtype), u, normal(width), normal(width)]


@settings(max_examples=25)
@given(
    rows=st.integers(0, 70),
    width=st.sampled_from([1, 5, 64, 100, 300]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 3),
)
def test_both_ways_are_pytorchs(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    arrays = drawn(rows, width, dtype, seed)
    bound = 2**-7 if dtype == torch.bfloat16 else 1e-5  # the interpreter rounds to bf16 towards 0
    exact = [array.double() for array in arrays]
    out = norm_gate_forward(*arrays[1:], EPSILON, implementation="triton")
    ours = (out, *norm_gate_backward(*arrays, EPSILON, implementation="triton"))
    theirs = (norm_gate_forward(*exact[1:], EPSILON), *norm_gate_backward(*exact, EPSILON))
    for name, our, their in zip(("out", "o", "u", "weight", "bias"), ours, theirs, strict=True):
        assert our.dtype == (dtype if name in ("out", "o", "u") else torch.float32)
        scale = max(1.0, float(their.abs().max()) if their.numel() else 0.0)
        torch.testing.assert_close(
            our.double(), their, atol=2e-5 * scale, rtol=bound, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_each_programs_share_of_the_sums_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than the programs take at once: they come back for more, and the last has less to do."""
    monkeypatch.setattr(triton_norm_gate, "PROGRAMS", 3)
    arrays = drawn(50, 500, torch.float32)  # 4 rows a tile: 13 tiles of 3 programs
    ours = norm_gate_backward(*arrays, EPSILON, implementation="triton")
    theirs = norm_gate_backward(*(array.double() for array in arrays), EPSILON)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, atol=1e-4, rtol=1e-5)
    again = norm_gate_backward(*arrays, EPSILON, implementation="triton")
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


def test_autograd_goes_through_the_kernels() -> None:
    gradient, *arrays = drawn(9, 12, torch.float32)
    leaves = [array.detach().requires_grad_() for array in arrays]
    norm_gate(*leaves, EPSILON, implementation="triton").backward(gradient)
    theirs = norm_gate_backward(gradient, *arrays, EPSILON, implementation="triton")
    for leaf, their in zip(leaves, theirs, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, their)
