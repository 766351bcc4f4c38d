"""LayerNorm(o) ⊙ u says what the formula says, both ways, and keeps nothing but o and u."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import norm_gate as module
from kernels.norm_gate import norm_gate, norm_gate_backward, norm_gate_forward

EPSILON = 1e-6
NAMES = ("o", "u", "weight", "bias")


def formula(o: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = o - o.mean(1, keepdim=True)
    return (centred / (centred.square().mean(1, keepdim=True) + EPSILON).sqrt() * weight + bias) * u


def drawn(rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """o, u, weight and bias; o's rows of very different sizes."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    o = normal(rows, width) * (3 * normal(rows, 1)).exp() + normal(rows, 1)
    wide = torch.promote_types(dtype, torch.float32)
    return [o.to(dtype), normal(rows, width).to(dtype), normal(width).to(wide), normal(width).to(wide)]


def expected_gradients(gradient: Tensor, arrays: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [array.double().requires_grad_() for array in arrays]
    return torch.autograd.grad((formula(*leaves) * gradient.double()).sum(), leaves)


@settings(max_examples=30)
@given(rows=st.integers(0, 9), width=st.integers(1, 9), seed=st.integers(0, 5))
def test_forward_and_backward_are_the_formula(rows: int, width: int, seed: int) -> None:
    arrays = drawn(rows, width, seed)
    gradient = torch.randn(rows, width, dtype=torch.float64)
    out = norm_gate(*(array.requires_grad_() for array in arrays), EPSILON)
    torch.testing.assert_close(out, formula(*arrays), atol=1e-9, rtol=1e-9)
    ours = torch.autograd.grad((out * gradient).sum(), arrays)
    for name, our, their in zip(NAMES, ours, expected_gradients(gradient, arrays), strict=True):
        torch.testing.assert_close(our, their, atol=1e-7, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_pass_gradcheck() -> None:
    arrays = [array.requires_grad_() for array in drawn(4, 5)]
    assert torch.autograd.gradcheck(lambda *x: norm_gate(*x, EPSILON), arrays)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = drawn(23, 8)
    gradient = torch.randn(23, 8, dtype=torch.float64)
    whole = norm_gate_forward(*arrays, EPSILON), *norm_gate_backward(gradient, *arrays, EPSILON)
    monkeypatch.setattr(module, "BLOCK", 40)
    parts = norm_gate_forward(*arrays, EPSILON), *norm_gate_backward(gradient, *arrays, EPSILON)
    for one, other in zip(whole[:3], parts[:3], strict=True):
        assert torch.equal(one, other)  # law 2: a row does not depend on others
    torch.testing.assert_close(whole[3:], parts[3:], atol=1e-12, rtol=1e-12)


def test_a_gate_that_is_a_column_of_something_wider() -> None:
    """u is a slice of the layer's projection, which must not be copied to be used."""
    o, u, weight, bias = drawn(6, 4)
    wider = torch.cat((torch.randn(6, 3, dtype=torch.float64), u, torch.randn(6, 2, dtype=torch.float64)), 1)
    column = wider[:, 3:7]
    ours = norm_gate_forward(o, column, weight, bias, EPSILON)
    assert torch.equal(ours, norm_gate_forward(o, u, weight, bias, EPSILON))
    theirs = norm_gate_backward(u, o, u, weight, bias, EPSILON)
    for one, other in zip(norm_gate_backward(u, o, column, weight, bias, EPSILON), theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_narrow_inputs_are_rounded_once(dtype: torch.dtype, bound: float) -> None:
    """Arithmetic is fp32, so bf16 costs the rounding of what comes out: half a unit in the last place."""
    arrays = drawn(40, 32, dtype=dtype)
    gradient = torch.randn(40, 32).to(dtype)
    out = norm_gate_forward(*arrays, EPSILON)
    assert out.dtype == dtype
    exact = formula(*(array.double() for array in arrays))
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=bound)
    ours = norm_gate_backward(gradient, *arrays, EPSILON)
    assert [our.dtype for our in ours] == [array.dtype for array in arrays]
    for name, our, their in zip(NAMES, ours, expected_gradients(gradient, arrays), strict=True):
        scale = float(their.abs().max())
        torch.testing.assert_close(
            our.double(), their, atol=1e-5 * scale, rtol=bound, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_o_and_u_are_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    arrays = [array.requires_grad_() for array in drawn(64, 16, dtype=dtype)]
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        norm_gate(*arrays, EPSILON)
    assert set(kept) == {array.untyped_storage().data_ptr() for array in arrays}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"o": torch.zeros(2, 3, 4)}, r"o must be \(rows, width\) of floats"),
        ({"o": torch.zeros(2, 3, dtype=torch.int64)}, "o must be"),
        ({"u": torch.zeros(2, 4)}, r"u must have shape \(2, 3\), not \(2, 4\)"),
        ({"weight": torch.zeros(2)}, r"weight must have shape \(3,\)"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"implementation": "magic"}, "no implementation 'magic'"),
        (
            {"o": torch.zeros(2, 3, dtype=torch.float64), "implementation": "triton"},
            "compute in fp32: for torch.float64 use pytorch",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict, message: str) -> None:
    given_ = {
        "o": torch.zeros(2, 3),
        "u": torch.zeros(2, 3),
        "weight": torch.zeros(3),
        "bias": torch.zeros(3),
    }
    with pytest.raises(ValueError, match=message):
        norm_gate(**{**given_, "epsilon": EPSILON, **change})
    with pytest.raises(ValueError, match="gradient must have shape"):
        norm_gate_backward(torch.zeros(3, 3), *given_.values(), EPSILON)
