"""`kernels.embedding` for a GPU: each program reads and writes a few whole rows, each of them once."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements of a program's tile
SEGMENT = 8  # gradients of one row that are read side by side


@triton.jit
def gather_kernel(table, rows, out, count, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    row = tl.load(rows + at, mask=at < count, other=0)
    inside = (at < count)[:, None] & (column < width)
    values = tl.load(table + row[:, None] * width + column, mask=inside)
    tl.store(out + at[:, None] * width + column, values, mask=inside)


@triton.jit
def segment_sums_kernel(gradient, order, ends, out, width, SEGMENT: tl.constexpr, WIDTH: tl.constexpr):
    """Sums gradient[order[begin : end]], one segment a program."""
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.load(ends + segment - 1, mask=segment > 0, other=0)
    end = tl.load(ends + segment)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((SEGMENT, WIDTH), tl.float32)
    for first in range(begin, end, SEGMENT):
        at = first + tl.arange(0, SEGMENT)
        use = tl.load(order + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (column < width)[None, :]
        total += tl.load(gradient + use[:, None] * width + column[None, :], mask=inside, other=0).to(
            tl.float32
        )
    tl.store(out + segment * width + column, tl.sum(total, 0), mask=column < width)


@triton.jit
def adagrad_kernel(
    table,
    squares,
    rows,
    gradient,
    count,
    width,
    learning_rate,
    epsilon,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = at < count
    column = tl.arange(0, WIDTH)[None, :]
    inside = real[:, None] & (column < width)
    row = tl.load(rows + at, mask=real, other=0)
    g = tl.load(gradient + at[:, None] * width + column, mask=inside, other=0)
    total = tl.load(squares + row, mask=real, other=0) + tl.sum(g * g, 1) / width
    tl.store(squares + row, total, mask=real)
    scale = learning_rate / tl.sqrt_rn(tl.maximum(total, epsilon))
    place = table + row[:, None] * width + column
    tl.store(place, tl.load(place, mask=inside) - scale[:, None] * g, mask=inside)


@triton.jit
def adamw_kernel(
    table,
    mean,
    square,
    steps,
    rows,
    gradient,
    count,
    width,
    learning_rate,
    beta1,
    beta2,
    rest1,  # 1 − β₁, which in float32 would lose digits
    rest2,
    log1,  # log β₁
    log2,
    epsilon,
    weight_decay,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = at < count
    column = tl.arange(0, WIDTH)[None, :]
    inside = real[:, None] & (column < width)
    row = tl.load(rows + at, mask=real, other=0)
    place = row[:, None] * width + column
    g = tl.load(gradient + at[:, None] * width + column, mask=inside, other=0)
    step = tl.load(steps + row, mask=real, other=0) + 1
    first = beta1 * tl.load(mean + place, mask=inside, other=0) + rest1 * g
    second = beta2 * tl.load(square + row, mask=real, other=0) + rest2 * tl.sum(g * g, 1) / width
    tl.store(steps + row, step, mask=real)
    tl.store(mean + place, first, mask=inside)
    tl.store(square + row, second, mask=real)
    # 1 − βᵗ for t = 1 and β = 0.999 loses four digits in float32; there is one a row, so double is cheap.
    age = step.to(tl.float64)
    correction1 = (1.0 - tl.exp(age * log1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(age * log2)).to(tl.float32)
    scale = 1.0 / (correction1 * (tl.sqrt_rn(second / correction2) + epsilon))
    value = tl.load(table + place, mask=inside, other=0)
    change = first * scale[:, None] + weight_decay * value
    tl.store(table + place, value - learning_rate * change, mask=inside)


def gather(table: Tensor, rows: Tensor) -> Tensor:
    count, width = len(rows), table.shape[1]
    out = table.new_empty(count, width)
    if out.numel():
        shape = _tile(width)
        gather_kernel[(triton.cdiv(count, shape["ROWS"]),)](table, rows, out, count, width, **shape)
    return out


def segment_sums(gradient: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    gradient = gradient.contiguous()
    width = gradient.shape[1]
    out = torch.empty(len(ends), width, dtype=torch.float32, device=gradient.device)
    if out.numel():
        shape = {"SEGMENT": SEGMENT, "WIDTH": triton.next_power_of_2(width)}
        segment_sums_kernel[(len(ends),)](gradient, order, ends, out, width, **shape)
    return out


def rowwise_adagrad_(
    table: Tensor, squares: Tensor, rows: Tensor, gradient: Tensor, learning_rate: float, epsilon: float
) -> None:
    count, width = gradient.shape
    if not gradient.numel():
        return
    shape = _tile(width)
    adagrad_kernel[(triton.cdiv(count, shape["ROWS"]),)](
        table, squares, rows, gradient.contiguous(), count, width, learning_rate, epsilon, **shape
    )


def rowwise_adamw_(
    table: Tensor,
    mean: Tensor,
    square: Tensor,
    steps: Tensor,
    rows: Tensor,
    gradient: Tensor,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    count, width = gradient.shape
    if not gradient.numel():
        return
    shape = _tile(width)
    adamw_kernel[(triton.cdiv(count, shape["ROWS"]),)](
        table,
        mean,
        square,
        steps,
        rows,
        gradient.contiguous(),
        count,
        width,
        learning_rate,
        beta1,
        beta2,
        1 - beta1,
        1 - beta2,
        *(math.log(beta) if beta else -math.inf for beta in (beta1, beta2)),
        epsilon,
        weight_decay,
        **shape,
    )


def _tile(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // padded), "WIDTH": padded}
