"""Rows of an embedding table: gathered, and after a step the touched ones updated in place.

A step reads some rows, gets a gradient for each use of a row, sums them by row and updates those rows alone.
The optimizers are rowwise: one second moment a row, of the mean squared gradient, where the usual ones keep
one a weight, so that a table of 2^20 rows of 64 needs 4 MiB for it instead of 256. (Zhai et al. 2024, section
3.3: rowwise AdamW, after Gupta et al. 2014, whose Adagrad it was, and FBGEMM, Khudia et al. 2021.)

Tables and states are float32; PyTorch's implementations take float64 too. Reduced tables, which would need
stochastic rounding not to swallow small steps, are refused. `pytorch` is the definition and works anywhere;
`triton` reads and writes each touched row once. All are deterministic.

Rows are int64. Those of an update must be distinct, and all within the table: what that costs to check, a GPU
would have to wait for.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import twins

_DTYPES = (torch.float32, torch.float64)


def gather(table: Tensor, rows: Tensor, *, implementation: str = "auto") -> Tensor:
    """A copy of these rows (U,) of the table (N, d): (U, d). A row may be asked for several times."""
    _require(table, rows)
    if twins.chosen(table, implementation) == "triton":
        out: Tensor = twins.triton_module("embedding").gather(table, rows)
        return out
    return table.index_select(0, rows)


def summed_by_row(rows: Tensor, gradient: Tensor, *, implementation: str = "auto") -> tuple[Tensor, Tensor]:
    """The distinct rows (U,), ascending, and the sum of each one's gradients (U, d).

    rows (n,) and gradient (n, d) belong together. The order of each sum depends on `rows` alone, so it is the
    same in every run; it is float32, or float64 where the gradient is. On a GPU it waits once, for U.
    Raises ValueError for shapes that do not fit or an unknown implementation.
    """
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 of one dimension, not {_said(rows)}")
    if gradient.dim() != 2 or len(gradient) != len(rows) or not gradient.is_floating_point():
        raise ValueError(f"the gradient must be ({len(rows)}, width) of floats, not {_said(gradient)}")
    ordered, order = torch.sort(rows, stable=True)
    distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
    ends = torch.cumsum(counts, 0)
    if twins.chosen(gradient, implementation) == "triton":
        sums: Tensor = twins.triton_module("embedding").segment_sums(gradient, order, ends)
        return distinct, sums
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if not len(rows):
        return distinct, wide
    return distinct, F.embedding_bag(order, wide, ends - counts, mode="sum")


def rowwise_adagrad_(
    table: Tensor,  # (N, d), changed in place
    squares: Tensor,  # (N,), changed in place: the sum of mean squared gradients
    rows: Tensor,  # (U,) distinct
    gradient: Tensor,  # (U, d)
    learning_rate: float,
    epsilon: float = 1e-20,
    *,
    implementation: str = "auto",
) -> None:
    """Rowwise Adagrad of the touched rows:

        squares += mean(gradient²)      row −= learning_rate · gradient / sqrt(max(squares, ε))

    Raises ValueError for shapes or dtypes that do not fit or an unknown implementation.
    """
    _require(table, rows)
    _require_gradient(table, rows, gradient)
    _require_state(table, "squares", squares, table.shape[:1])
    if twins.chosen(table, implementation) == "triton":
        twins.triton_module("embedding").rowwise_adagrad_(
            table, squares, rows, gradient, learning_rate, epsilon
        )
        return
    sums = squares.index_select(0, rows).add_(gradient.square().mean(1))
    squares.index_copy_(0, rows, sums)
    scale = learning_rate / sums.clamp(min=epsilon).sqrt_()
    table.index_add_(0, rows, scale.unsqueeze(1) * gradient, alpha=-1)


def rowwise_adamw_(
    table: Tensor,  # (N, d), changed in place
    mean: Tensor,  # (N, d), changed in place: the first moment
    square: Tensor,  # (N,), changed in place: the second moment, of the mean squared gradient
    steps: Tensor,  # (N,) int32 or int64, changed in place: updates that each row has had
    rows: Tensor,  # (U,) distinct
    gradient: Tensor,  # (U, d)
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    implementation: str = "auto",
) -> None:
    """Rowwise AdamW of the touched rows, each with its own count of steps t:

        t += 1      mean = β₁ mean + (1 − β₁) gradient      square = β₂ square + (1 − β₂) mean(gradient²)
        row −= learning_rate · (mean / (1 − β₁ᵗ) / (sqrt(square / (1 − β₂ᵗ)) + ε) + weight_decay · row)

    (Kingma and Ba 2015, algorithm 1; the decay decoupled as by Loshchilov and Hutter 2019; one second moment
    a row as FBGEMM's PARTIAL_ROWWISE_ADAM.) A row that is not touched does not decay and forgets nothing: its
    moments belong to its own steps, not to the table's.
    Raises ValueError for shapes or dtypes that do not fit or an unknown implementation.
    """
    _require(table, rows)
    _require_gradient(table, rows, gradient)
    _require_state(table, "mean", mean, table.shape)
    _require_state(table, "square", square, table.shape[:1])
    if (
        steps.shape != table.shape[:1]
        or steps.dtype not in (torch.int32, torch.int64)
        or not steps.is_contiguous()
    ):
        raise ValueError(
            f"steps must be ({len(table)},) of int32 or int64 and contiguous, not {_said(steps)}"
        )
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must lie in [0, 1), not {betas}")
    options = (learning_rate, *betas, epsilon, weight_decay)
    if twins.chosen(table, implementation) == "triton":
        twins.triton_module("embedding").rowwise_adamw_(table, mean, square, steps, rows, gradient, *options)
        return
    _adamw_(table, mean, square, steps, rows, gradient, *options)


def _adamw_(
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
    t = steps.index_select(0, rows).add_(1)
    age = t.to(table.dtype)
    first = mean.index_select(0, rows).mul_(beta1).add_(gradient, alpha=1 - beta1)
    second = square.index_select(0, rows).mul_(beta2).add_(gradient.square().mean(1), alpha=1 - beta2)
    steps.index_copy_(0, rows, t)
    mean.index_copy_(0, rows, first)
    square.index_copy_(0, rows, second)
    root = second.div_(_bias_correction(beta2, age)).sqrt_().add_(epsilon)
    scale = (root * _bias_correction(beta1, age)).reciprocal_()
    change = first.mul_(scale.unsqueeze(1))
    if weight_decay:
        change.add_(table.index_select(0, rows), alpha=weight_decay)
    table.index_add_(0, rows, change, alpha=-learning_rate)


def _bias_correction(beta: float, age: Tensor) -> Tensor:
    """1 − βᵗ without the cancellation that costs four digits where β is near 1 and t small."""
    return torch.expm1(age * (math.log(beta) if beta else -math.inf)).neg_()


def _require(table: Tensor, rows: Tensor) -> None:
    if table.dim() != 2 or table.dtype not in _DTYPES or not table.is_contiguous():
        raise ValueError(f"the table must be (rows, width) of float32 and contiguous, not {_said(table)}")
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 of one dimension, not {_said(rows)}")


def _require_gradient(table: Tensor, rows: Tensor, gradient: Tensor) -> None:
    wanted = (len(rows), table.shape[1])
    if gradient.shape != wanted or gradient.dtype != table.dtype:
        raise ValueError(f"the gradient must be {wanted} of {table.dtype}, not {_said(gradient)}")


def _require_state(table: Tensor, name: str, state: Tensor, shape: torch.Size) -> None:
    if state.shape != shape or state.dtype != table.dtype or not state.is_contiguous():
        raise ValueError(f"{name} must be {tuple(shape)} of {table.dtype} and contiguous, not {_said(state)}")


def _said(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype}"
