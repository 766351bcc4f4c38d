"""LayerNorm(o) ⊙ u, HSTU's gate (Zhai et al. 2024, equation 3), keeping nothing for its backward but o and u.

    out = (n · weight + bias) · u      n = (o − mean(o)) / sqrt(var(o) + ε), of each row

The statistics and n are computed a second time in the backward pass: reading o again costs less than keeping
a normalised copy of it (the paper's section 3.3). Arithmetic is fp32, float64 where o is; what comes out is
of u's dtype, as it goes into the same kind of matrix product as u came from. `pytorch` is the definition and
works anywhere; `triton` is one kernel each way. Both are deterministic.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import twins

BLOCK = (
    1 << 18
)  # elements of a block of rows in PyTorch: what is computed on the way stays in a core's caches

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def norm_gate(
    o: Tensor,  # (R, D)
    u: Tensor,  # (R, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    epsilon: float,
    *,
    implementation: str = "auto",
) -> Tensor:
    """LayerNorm(o) ⊙ u, (R, D) in u's dtype; differentiable once in all four tensors, saving o and u alone.

    Raises ValueError for shapes that do not fit, an ε that is not positive or an unknown implementation.
    """
    _require(o, u, weight, bias, epsilon)
    out: Tensor = _NormGate.apply(o, u, weight, bias, epsilon, twins.chosen(o, implementation))
    return out


def norm_gate_forward(
    o: Tensor, u: Tensor, weight: Tensor, bias: Tensor, epsilon: float, *, implementation: str = "auto"
) -> Tensor:
    """`norm_gate` outside autograd, for a function that is a larger part of a layer."""
    _require(o, u, weight, bias, epsilon)
    if twins.chosen(o, implementation) == "triton":
        out: Tensor = twins.triton_module("norm_gate").forward(o, u, weight, bias, epsilon)
        return out
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    for rows in _blocks(o):
        wide, weight_, bias_ = _wide(o[rows], weight, bias)
        normed = torch.native_layer_norm(wide, o.shape[1:], weight_, bias_, epsilon)[0]
        out[rows] = normed.mul_(u[rows])
    return out


def norm_gate_backward(
    gradient: Tensor,  # (R, D) of `out`
    o: Tensor,  # (R, D)
    u: Tensor,  # (R, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    epsilon: float,
    *,
    implementation: str = "auto",
) -> Gradients:
    """The gradients of o, u, weight and bias, each as its tensor in shape and dtype."""
    _require(o, u, weight, bias, epsilon)
    if gradient.shape != o.shape:
        raise ValueError(f"the gradient must have shape {tuple(o.shape)}, not {tuple(gradient.shape)}")
    if twins.chosen(o, implementation) == "triton":
        gradients: Gradients = twins.triton_module("norm_gate").backward(
            gradient, o, u, weight, bias, epsilon
        )
        return gradients
    of_o = torch.empty_like(o, memory_format=torch.contiguous_format)
    of_u = torch.empty_like(u, memory_format=torch.contiguous_format)
    of_weight, of_bias = (x.new_zeros(x.shape, dtype=_wide(o[:0], x)[1].dtype) for x in (weight, bias))
    for rows in _blocks(o):
        wide, gradient_, weight_, bias_ = _wide(o[rows], gradient[rows], weight, bias)
        normed, mean, rstd = torch.native_layer_norm(wide, o.shape[1:], weight_, bias_, epsilon)
        of_u[rows] = normed.mul_(gradient_)
        torch.mul(gradient_, u[rows], out=normed)
        block_of_o, block_of_weight, block_of_bias = torch.ops.aten.native_layer_norm_backward(
            normed, wide, o.shape[1:], mean, rstd, weight_, bias_, [True, True, True]
        )
        of_o[rows] = block_of_o
        of_weight += block_of_weight
        of_bias += block_of_bias
    return of_o, of_u, of_weight.to(weight.dtype), of_bias.to(bias.dtype)


class _NormGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, o: Tensor, u: Tensor, weight: Tensor, bias: Tensor, epsilon: float, implementation: str
    ) -> Tensor:
        ctx.save_for_backward(o, u, weight, bias)
        ctx.epsilon, ctx.implementation = epsilon, implementation
        return norm_gate_forward(o, u, weight, bias, epsilon, implementation=implementation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        o, u, weight, bias = ctx.saved_tensors
        gradients = norm_gate_backward(
            gradient, o, u, weight, bias, ctx.epsilon, implementation=ctx.implementation
        )
        return *gradients, None, None


def _blocks(o: Tensor) -> list[slice]:
    """Blocks of rows; on a GPU all of them at once, as launches cost more there than memory."""
    rows, width = o.shape
    step = max(rows, 1) if o.is_cuda else max(1, BLOCK // width)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _wide(o: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All in the dtype that o is computed in."""
    wide = torch.promote_types(o.dtype, torch.float32)
    return tuple(x.to(wide) for x in (o, *others))


def _require(o: Tensor, u: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> None:
    if o.dim() != 2 or o.shape[1] == 0 or not o.is_floating_point():
        raise ValueError(f"o must be (rows, width) of floats, not {tuple(o.shape)} of {o.dtype}")
    for name, x, wanted in (("u", u, o.shape), ("weight", weight, o.shape[1:]), ("bias", bias, o.shape[1:])):
        if x.shape != wanted:
            raise ValueError(f"{name} must have shape {tuple(wanted)}, not {tuple(x.shape)}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, not {epsilon}")
