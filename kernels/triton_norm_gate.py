"""`kernels.norm_gate` for a GPU: one kernel each way, a row whole in registers, statistics in two passes.

The gradients of weight and bias are sums over rows. Each program adds up the rows that fall to it, and the
programs' sums are added in their order, so they are the same in every run and on every card.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of a program's tile with 4 warps: 16 a thread
PROGRAMS = 1024  # of the backward pass, whose every program has its own sum over rows


@triton.jit
def _normalised(x, inside, width, epsilon):
    """Rows (ROWS, WIDTH) less their mean, over their deviation; and one over that."""
    centred = tl.where(inside, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / width + epsilon)
    return centred * inverse[:, None], inverse


@triton.jit
def forward_kernel(
    o, u, weight, bias, out, rows, width, o_stride, u_stride, epsilon, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)
    inside = (row < rows) & (column < width)[None, :]
    x = tl.load(o + row * o_stride + column[None, :], mask=inside, other=0).to(tl.float32)
    gate = tl.load(u + row * u_stride + column[None, :], mask=inside, other=0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < width, other=0).to(tl.float32)[None, :]
    shift = tl.load(bias + column, mask=column < width, other=0).to(tl.float32)[None, :]
    n, _ = _normalised(x, inside, width, epsilon)
    value = (n * scale + shift) * gate
    tl.store(out + row * width + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gradient,
    o,
    u,
    weight,
    bias,
    of_o,
    of_u,
    sums,  # (2, programs, width): of weight's gradient and of bias's
    rows,
    width,
    gradient_stride,
    o_stride,
    u_stride,
    epsilon,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, WIDTH)
    scale = tl.load(weight + column, mask=column < width, other=0).to(tl.float32)[None, :]
    shift = tl.load(bias + column, mask=column < width, other=0).to(tl.float32)[None, :]
    of_weight = tl.zeros((ROWS, WIDTH), tl.float32)
    of_bias = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (column < width)[None, :]
        x = tl.load(o + row * o_stride + column[None, :], mask=inside, other=0).to(tl.float32)
        gate = tl.load(u + row * u_stride + column[None, :], mask=inside, other=0).to(tl.float32)
        g = tl.load(gradient + row * gradient_stride + column[None, :], mask=inside, other=0).to(tl.float32)
        n, inverse = _normalised(x, inside, width, epsilon)
        place = row * width + column[None, :]
        tl.store(of_u + place, (g * (n * scale + shift)).to(of_u.dtype.element_ty), mask=inside)
        g = g * gate
        of_bias += g
        of_weight += g * n
        g = g * scale
        along = (tl.sum(g * n, 1) / width)[:, None]
        change = (g - (tl.sum(g, 1) / width)[:, None] - n * along) * inverse[:, None]
        tl.store(of_o + place, change.to(of_o.dtype.element_ty), mask=inside)
    own = sums + program * width + column
    tl.store(own, tl.sum(of_weight, 0), mask=column < width)
    tl.store(own + programs * width, tl.sum(of_bias, 0), mask=column < width)


def forward(o: Tensor, u: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    rows, width = o.shape
    o, u = _by_row(o), _by_row(u)
    out = torch.empty(o.shape, dtype=u.dtype, device=u.device)
    if rows:
        shape, warps = _tile(width)
        forward_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
            o,
            u,
            weight.contiguous(),
            bias.contiguous(),
            out,
            rows,
            width,
            o.stride(0),
            u.stride(0),
            epsilon,
            **shape,
            num_warps=warps,
        )
    return out


def backward(
    gradient: Tensor, o: Tensor, u: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = o.shape
    gradient, o, u = _by_row(gradient), _by_row(o), _by_row(u)
    of_o, of_u = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (o, u))
    shape, warps = _tile(width)
    programs = min(PROGRAMS, triton.cdiv(rows, shape["ROWS"]))
    sums = torch.empty(2, programs, width, dtype=torch.float32, device=o.device)
    if rows:
        backward_kernel[(programs,)](
            gradient,
            o,
            u,
            weight.contiguous(),
            bias.contiguous(),
            of_o,
            of_u,
            sums,
            rows,
            width,
            gradient.stride(0),
            o.stride(0),
            u.stride(0),
            epsilon,
            **shape,
            num_warps=warps,
        )
    of_weight, of_bias = sums.sum(1)
    return of_o, of_u, of_weight.to(weight.dtype), of_bias.to(bias.dtype)


def _by_row(x: Tensor) -> Tensor:
    """x with whole rows, which may lie apart: a slice of columns is used as it is."""
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(width: int) -> tuple[dict[str, int], int]:
    padded = triton.next_power_of_2(width)
    rows = max(1, TILE // padded)
    return {"ROWS": rows, "WIDTH": padded}, max(4, min(16, rows * padded // 512))
