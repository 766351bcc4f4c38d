"""The HSTU layer for training: 14·d bytes a token are kept for the backward pass (Zhai et al. 2024, 3.3).

Two operations, each with a backward pass of its own:

    z = LayerNorm(x) W + β                                        keeps x
    y = x + dropout((LayerNorm(o) ⊙ u) W_o),  u, v, q, k = SiLU(z)    keeps z and o

With x in fp32 (4d bytes), z and o in bf16 (8d and 2d where h·d_qk = h·d_v = d) that is 14d. LayerNorms, SiLU,
the gate, the scores and the dropout's mask (from a seed) are computed again. Memory rows and query rows that
see them are read by one call of the second operation, so that what they share is kept, and summed, once.

`reduced` is the dtype of the matrix products and of z and o, None for x's own. Everything else is x's dtype.
Works on any device and in float64; can be differentiated once.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.matmul import matmul
from kernels.sight import Sight


@dataclasses.dataclass(frozen=True)
class Shape:
    """What both operations must know of a layer."""

    heads: int
    qk: int
    v: int
    epsilon: float
    alpha: float
    softmax: bool = False
    dropout: float = 0.0  # 0 when not training
    reduced: torch.dtype | None = None

    @property
    def columns(self) -> tuple[int, int, int, int]:
        """Widths of k, v, q and u, the columns of z in this order."""
        qk, v = self.heads * self.qk, self.heads * self.v
        return qk, v, qk, v


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Rows that see the memory: x (R, d), their z (R, columns), None where they are the memory, and how."""

    x: Tensor
    z: Tensor | None
    sight: Sight


def project(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, shape: Shape) -> Tensor:
    """LayerNorm(x) W + β of the rows x (R, d): (R, len(weight)), in the reduced dtype."""
    z: Tensor = _Project.apply(x, gain, shift, weight, bias, shape)
    return z


def attend(
    z: Tensor,  # (M, columns) of the memory; k's and v's alone will do where no reader is the memory
    readers: Sequence[Reader],
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    gain: Tensor,  # (H · d_v,) of the LayerNorm of o
    shift: Tensor,
    weight: Tensor,  # (d, H · d_v)
    shape: Shape,
) -> tuple[Tensor, ...]:
    """The layer's output for the rows of each reader: (R, d)."""
    some = [reader for reader in readers if len(reader.x)]
    sights = tuple(reader.sight for reader in some)
    rows = [tensor for reader in some for tensor in (reader.x, reader.z)]
    tables = position_bias, time_bias
    outs = iter(_Attend.apply(shape, sights, z, *tables, gain, shift, weight, *rows) if some else ())
    return tuple(next(outs) if len(reader.x) else reader.x for reader in readers)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, shape: Shape
    ) -> Tensor:
        ctx.save_for_backward(x, gain, shift, weight)
        ctx.shape = shape
        normed = F.layer_norm(x, gain.shape, gain, shift, shape.epsilon)
        return matmul(*(_narrow(y, shape.reduced) for y in (normed, weight.t(), bias)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_z: Tensor) -> Any:
        x, gain, shift, weight = ctx.saved_tensors
        norm = _Norm(x, gain, shift, ctx.shape.epsilon)
        d_normed = matmul(d_z, _narrow(weight, ctx.shape.reduced))
        d_weight = matmul(_narrow(norm.out, ctx.shape.reduced).t(), d_z).t()
        d_bias = d_z.sum(0, dtype=gain.dtype)
        d_x, d_gain, d_shift = norm.backward(d_normed.to(x.dtype))
        return d_x, d_gain, d_shift, d_weight.to(weight.dtype), d_bias, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shape: Shape,
        sights: tuple[Sight, ...],
        z: Tensor,
        position_bias: Tensor | None,
        time_bias: Tensor | None,
        gain: Tensor,
        shift: Tensor,
        weight: Tensor,
        *rows: Tensor | None,
    ) -> tuple[Tensor, ...]:
        memory = F.silu(z)
        ctx.shape, ctx.sights, ctx.seeds = shape, sights, []
        kept: list[Tensor | None] = []
        outs = []
        for sight, x, own_z in zip(sights, rows[::2], rows[1::2], strict=True):
            assert x is not None
            own = memory if own_z is None else F.silu(own_z)
            arguments = _arguments(memory, own, sight, position_bias, time_bias, shape)
            o, lse = _raw(arguments[0], shape.softmax).forward(*arguments, softmax=shape.softmax)
            o = _narrow(o.flatten(1), shape.reduced)
            normed = F.layer_norm(o.to(x.dtype), gain.shape, gain, shift, shape.epsilon)
            gated = _narrow(normed.mul_(own[:, -o.shape[1] :]), shape.reduced)
            branch = matmul(gated, _narrow(weight, shape.reduced).t()).to(x.dtype)
            ctx.seeds.append(int(torch.randint(2**62, ())) if shape.dropout else 0)
            outs.append(_dropped(branch, shape.dropout, ctx.seeds[-1]).add_(x))
            kept += [own_z, o, lse]
        ctx.save_for_backward(z, position_bias, time_bias, gain, shift, weight, *kept)
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        z, position_bias, time_bias, gain, shift, weight, *kept = ctx.saved_tensors
        shape: Shape = ctx.shape
        memory = _Columns(z, shape)
        parameters = position_bias, time_bias, gain, shift, weight
        sums = [None if p is None else torch.zeros_like(p) for p in parameters]
        d_rows: list[Tensor | None] = []
        readers = zip(ctx.sights, ctx.seeds, gradients, kept[::3], kept[1::3], kept[2::3], strict=True)
        for sight, seed, d_y, own_z, o, lse in readers:
            own = memory if own_z is None else _Columns(own_z, shape)
            u = own.out[:, -o.shape[1] :]
            norm = _Norm(o.to(d_y.dtype), gain, shift, shape.epsilon)
            d_branch = _narrow(
                _dropped(d_y.clone(), shape.dropout, seed) if shape.dropout else d_y, shape.reduced
            )
            d_weight = matmul(d_branch.t(), _narrow(norm.out * u, shape.reduced))
            d_gated = matmul(d_branch, _narrow(weight, shape.reduced)).to(d_y.dtype)
            d_o, d_gain, d_shift = norm.backward(d_gated * u)
            arguments = _arguments(memory.out, own.out, sight, position_bias, time_bias, shape)
            q, k, v, k_self, v_self, d_position, d_time = _raw(arguments[0], shape.softmax).backward(
                d_o.unflatten(1, (shape.heads, -1)),
                o.unflatten(1, (shape.heads, -1)),
                lse,
                *arguments,
                softmax=shape.softmax,
            )
            memory.add(k, v)
            own.add(k_self, v_self, q, d_gated.mul_(norm.out))
            d_rows += [d_y, None if own_z is None else own.gradient()]
            for total, part in zip(sums, (d_position, d_time, d_gain, d_shift, d_weight), strict=True):
                if total is not None:
                    total.add_(part)
        return None, None, memory.gradient(), *sums, *d_rows


class _Columns:
    """SiLU(z), and its gradient by columns k, v, q, u; those that are not added to are 0."""

    def __init__(self, z: Tensor, shape: Shape) -> None:
        self.z, self.out = z, F.silu(z)
        self.widths = shape.columns
        self.parts: list[Tensor | None] = [None] * 4

    def add(self, *parts: Tensor | None) -> None:
        for at, part in enumerate(parts):
            if part is not None:
                held, part = self.parts[at], part.flatten(1)
                self.parts[at] = part if held is None else held + part

    def gradient(self) -> Tensor:
        """The gradient of z, in the memory of `out`."""
        widths = self.widths[:2] if self.z.shape[1] < sum(self.widths) else self.widths
        parts = [
            self.z.new_zeros(()).expand(len(self.z), width) if part is None else part.to(self.z.dtype)
            for width, part in zip(widths, self.parts, strict=False)
        ]
        torch.cat(parts, 1, out=self.out)
        torch.ops.aten.silu_backward.grad_input(self.out, self.z, grad_input=self.out)
        return self.out


class _Norm:
    """A LayerNorm whose statistics live as long as this object."""

    def __init__(self, x: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> None:
        self.x, self.gain, self.shift = x, gain, shift
        self.out, self.mean, self.rstd = torch.native_layer_norm(x, gain.shape, gain, shift, epsilon)

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, the gain and the shift."""
        d_x, d_gain, d_shift = torch.ops.aten.native_layer_norm_backward(
            gradient, self.x, self.gain.shape, self.mean, self.rstd, self.gain, self.shift, [True] * 3
        )
        return d_x, d_gain, d_shift


def _narrow(x: Tensor, reduced: torch.dtype | None) -> Tensor:
    return x if reduced is None else x.to(reduced)


def _dropped(x: Tensor, share: float, seed: int) -> Tensor:
    """x with a share of its elements 0 and the others scaled, in place; a seed says which."""
    if not share:
        return x
    random = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty_like(x).bernoulli_(1 - share, generator=random)
    return x.mul_(mask.div_(1 - share))


def _arguments(
    memory: Tensor,
    own: Tensor,
    sight: Sight,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    shape: Shape,
) -> tuple[Any, ...]:
    """`kernels.attention`'s, from the memory's k and v (and more) and the rows' k, v, q, u."""
    qk, v = shape.columns[:2]
    k, v_ = (x.unflatten(1, (shape.heads, -1)) for x in memory[:, : qk + v].split((qk, v), 1))
    k_self, v_self, q, _ = (x.unflatten(1, (shape.heads, -1)) for x in own.split(shape.columns, 1))
    return q, k, v_, k_self, v_self, sight, position_bias, time_bias, shape.alpha


class _Raw(Protocol):
    """An implementation of attention as two functions without autograd, as in `kernels.cpu`."""

    def forward(self, *arguments: Any, softmax: bool) -> tuple[Tensor, Tensor | None]: ...

    def backward(
        self, gradient: Tensor, out: Tensor, lse: Tensor | None, *arguments: Any, softmax: bool
    ) -> tuple[Any, ...]: ...


class _Again:
    """Of any implementation: its backward pass runs the forward pass once more, under autograd."""

    @staticmethod
    def forward(*arguments: Any, softmax: bool) -> tuple[Tensor, None]:
        return kernels.attention(*arguments, softmax=softmax), None

    @staticmethod
    def backward(
        gradient: Tensor, out: Tensor, lse: Tensor | None, *arguments: Any, softmax: bool
    ) -> tuple[Any, ...]:
        again: list[Any] = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
        tensors = [x for x in again if isinstance(x, Tensor)]
        with torch.enable_grad():
            result = kernels.attention(*again, softmax=softmax)
        gradient = gradient.to(result.dtype)
        grads = iter(torch.autograd.grad(result, tensors, gradient, materialize_grads=True))
        every = [next(grads) if isinstance(x, Tensor) else None for x in again]
        return *every[:5], *every[6:8]


_WITHOUT_AUTOGRAD = {"cpu": "kernels.cpu"}


def _raw(q: Tensor, softmax: bool) -> _Raw:
    """The implementation that is chosen for q, without autograd."""
    module = _WITHOUT_AUTOGRAD.get(kernels.chosen(q, softmax))
    return cast(_Raw, importlib.import_module(module) if module else _Again)
