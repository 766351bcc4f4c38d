"""Products of fp32 by oneDNN are those of float64 to their rounding, small and large; so are gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import matmul as products
from kernels.matmul import linear, matmul, silu_matmul

SIZES = [(0, 5, 7), (1, 300, 5000), (3, 4, 5), (2000, 50, 200), (50, 2000, 200), (700, 64, 33)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, exact: Tensor, depth: int) -> None:
    # Sums of `depth` products of numbers around 1, in any order.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=4e-7 * max(depth, 1))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_products_are_those_of_float64(m: int, k: int, n: int, with_bias: bool, turned: bool) -> None:
    a, b = drawn(m, k), drawn(k, n, seed=1)
    bias = drawn(n, seed=2) if with_bias else None
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    if turned:  # the same numbers, laid out the other way
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    close(matmul(a, b, bias), exact, k)


def test_columns_of_a_wider_matrix_are_multiplied_as_they_lie() -> None:
    wide = drawn(2000, 200)
    close(matmul(wide[:, 50:100], drawn(50, 60)), wide[:, 50:100].double() @ drawn(50, 60).double(), 50)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorchs_own(dtype: torch.dtype) -> None:
    a, b = drawn(2000, 50).to(dtype), drawn(50, 200).to(dtype)
    assert torch.equal(matmul(a, b), a @ b)


def test_gradients_are_those_of_a_linear_layer() -> None:
    found, expected = [], []
    for function, dtype, grads in ((linear, torch.float32, found), (F.linear, torch.float64, expected)):
        x, weight, bias = (
            drawn(*shape, seed=at).to(dtype).requires_grad_()
            for at, shape in enumerate([(2000, 50), (200, 50), (200,)])
        )
        out = function(x, weight, bias)
        out.backward(drawn(2000, 200, seed=9).to(dtype))
        grads += [out.detach(), x.grad, weight.grad, bias.grad]
    assert found[0].dtype == torch.float32
    for one, exact, depth in zip(found, expected, (50, 200, 2000, 2000), strict=True):
        close(one, exact, depth)


def test_large_products_of_fp32_go_to_onednn_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert products._by_onednn(drawn(2000, 50), drawn(50, 200))
    assert not products._by_onednn(drawn(2, 50), drawn(50, 200))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products._by_onednn(drawn(2000, 50), drawn(50, 200))


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_silu_behind_a_product_is_that_of_float64(
    dtype: torch.dtype, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass or two; bf16's score is rounded once more before SiLU in the latter."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    a, b, bias = (drawn(*shape, seed=at).to(dtype) for at, shape in enumerate([(700, 32), (32, 900), (900,)]))
    exact = F.silu(a.double() @ b.double() + bias.double())
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(silu_matmul(a, b, bias).double(), exact, rtol=bound, atol=bound)
