"""Products of matrices: on a CPU those of fp32 by oneDNN, everything else as PyTorch has it.

PyTorch multiplies fp32 by MKL, whose kernels for AMD processors know AVX2 but not AVX-512; oneDNN's, which
PyTorch carries for bf16 and convolutions, are 2 to 2.5 times as fast there, and as fast as MKL's on Intel's.
The way to them is the operator into which PyTorch's compiler turns linear layers.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_WORTH_IT = 1 << 20  # multiplications: oneDNN takes 8 µs more to set out


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (K, N), plus a bias (N,): (M, N) in their one dtype. Without autograd.

    Where M is small beside N and K, it is faster than with a and b turned about.
    """
    if _by_onednn(a, b):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
        return out
    return a @ b if bias is None else torch.addmm(bias, a, b)


def silu_matmul(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """SiLU(a (M, K) @ b (K, N) + bias (N,)): (M, N), by oneDNN in one pass. Without autograd."""
    if _by_onednn(a, b) or (_reduced(a, b) and _worth_it(a, b)):
        # Behind a product of matrix tiles (AMX) oneDNN's SiLU takes twice as long as a pass of PyTorch's.
        apart = a.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none" if apart else "swish", [], "")
        return torch.ops.aten.silu.out(out, out=out) if apart else out
    return F.silu(torch.addmm(bias, a, b), inplace=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (R, K) @ weightᵀ (K, N), plus a bias (N,): (R, N). With autograd."""
    if not _by_onednn(x, weight.t()):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return matmul(x, weight.t(), bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            matmul(gradient, weight) if needs_x else None,
            matmul(x.t(), gradient).t() if needs_weight else None,
            gradient.sum(0) if needs_bias else None,
        )


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == torch.float32
        and b.dtype == torch.float32
        and a.device.type == "cpu"
        and _worth_it(a, b)
        and torch.backends.mkldnn.is_available()
    )


def _worth_it(a: Tensor, b: Tensor) -> bool:
    return len(a) * b.numel() >= _WORTH_IT


def _reduced(a: Tensor, b: Tensor) -> bool:
    """Whether both are of bf16, on a CPU that has instructions for it."""
    return (
        a.dtype == torch.bfloat16
        and b.dtype == torch.bfloat16
        and a.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
