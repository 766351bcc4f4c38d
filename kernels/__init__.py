"""The arithmetic of HSTU: one attention op under one rule of sight. Imports torch and triton alone."""

import importlib
from typing import Literal

import torch
from torch import Tensor

from kernels.buckets import (
    POSITION_BUCKETS,
    TIME_BUCKETS,
    UNKNOWN_TIME,
    position_bits,
    position_bucket,
    position_rows,
    time_bucket,
)
from kernels.sight import Sight

__all__ = [
    "POSITION_BUCKETS",
    "TIME_BUCKETS",
    "UNKNOWN_TIME",
    "Implementation",
    "Sight",
    "attention",
    "chosen",
    "position_bits",
    "position_bucket",
    "position_rows",
    "time_bucket",
]

Implementation = Literal["auto", "reference", "cpu", "triton"]

# Modules, each with an `attention` of the same signature; imported when first asked for, as not every machine
# can run every one.
_IMPLEMENTATIONS = {
    "reference": "kernels.reference",
    "cpu": "kernels.cpu",
    "triton": "kernels.triton_attention",
}


def chosen(q: Tensor, softmax: bool = False, implementation: str = "auto") -> str:
    """The implementation that `attention` runs for such queries: the one place where that is decided.

    Raises ValueError for an unknown one.
    """
    if implementation == "auto":
        if q.dtype == torch.float64:
            return "reference"
        if q.device.type == "cuda":
            return "reference" if softmax else "triton"
        return "cpu" if q.device.type == "cpu" else "reference"
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"no implementation {implementation!r} of attention: use auto, {', '.join(_IMPLEMENTATIONS)}"
        )
    return implementation


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    sight: Sight,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    alpha: float,
    *,
    softmax: bool = False,
    implementation: str = "auto",
    deterministic: bool = False,
) -> Tensor:
    """Each row's sum over what it sees, `kernels.reference` being the definition: (R, H, d_v).

    q, k_self (R, H, d_qk) and v_self (R, H, d_v) belong to the rows, k (M, H, d_qk) and v (M, H, d_v) to
    the memory tokens. The tables are (position_rows(bits), H), 2^bits buckets an octave, and
    (TIME_BUCKETS, H); None is a bias of zero. With `softmax` the weights of a row sum to 1 instead of being
    SiLU of the scores each. The result is fp32, float64 where q is. With `deterministic` the order of every
    sum is the same in all processes, at the price of untuned kernels; within one process it always is.
    Raises ValueError for an unknown implementation or shapes and lengths that do not fit.
    """
    name = chosen(q, softmax, implementation)
    module = importlib.import_module(_IMPLEMENTATIONS[name])
    rows, heads, width = q.shape
    memory = len(sight.memory_times)
    expected = {
        "rows of the sight": ((len(sight.row_prefix),), (rows,)),
        "k": ((memory, heads, width), k.shape),
        "v": ((memory, heads, v.shape[-1]), v.shape),
        "k_self": ((rows, heads, width), k_self.shape),
        "v_self": ((rows, heads, v.shape[-1]), v_self.shape),
    }
    if position_bias is not None:
        known = position_rows(position_bits(len(position_bias)))
        expected["position_bias"] = ((known, heads), position_bias.shape)
    if time_bias is not None:
        expected["time_bias"] = ((TIME_BUCKETS, heads), time_bias.shape)
    for what, (wanted, got) in expected.items():
        if wanted != tuple(got):
            raise ValueError(f"{what} must have shape {wanted}, not {tuple(got)}")
    options = {"softmax": softmax}
    if name == "triton":  # the others tune nothing
        options["deterministic"] = deterministic
    out: Tensor = module.attention(q, k, v, k_self, v_self, sight, position_bias, time_bias, alpha, **options)
    return out
