"""The arithmetic of HSTU: one attention op under one rule of sight. Imports torch and triton alone."""

from torch import Tensor

from kernels import reference
from kernels.buckets import POSITION_BUCKETS, TIME_BUCKETS, position_bucket, time_bucket
from kernels.sight import Sight

__all__ = ["POSITION_BUCKETS", "TIME_BUCKETS", "Sight", "attention", "position_bucket", "time_bucket"]

_IMPLEMENTATIONS = {"reference": reference.attention}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    sight: Sight,
    position_bias: Tensor,
    time_bias: Tensor,
    alpha: float,
    implementation: str = "auto",
) -> Tensor:
    """Each row's sum over what it sees, `kernels.reference` being the definition: (R, H, d_v).

    q, k_self (R, H, d_qk) and v_self (R, H, d_v) belong to the rows, k (M, H, d_qk) and v (M, H, d_v) to
    the memory tokens; the tables are (POSITION_BUCKETS, H) and (TIME_BUCKETS, H) and give the result's dtype.
    This is the one place where an implementation is chosen: "auto" or one of those by name.
    Raises ValueError for an unknown implementation or shapes and lengths that do not fit.
    """
    name = "reference" if implementation == "auto" else implementation
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"no implementation {name!r} of attention: use auto, {', '.join(_IMPLEMENTATIONS)}")
    rows, heads, width = q.shape
    expected = {
        "rows of the sight": ((len(sight.row_prefix),), (rows,)),
        "k": ((len(sight.memory_times), heads, width), k.shape),
        "v": ((len(sight.memory_times), heads, v.shape[-1]), v.shape),
        "k_self": ((rows, heads, width), k_self.shape),
        "v_self": ((rows, heads, v.shape[-1]), v_self.shape),
        "position_bias": ((POSITION_BUCKETS, heads), position_bias.shape),
        "time_bias": ((TIME_BUCKETS, heads), time_bias.shape),
    }
    for what, (wanted, got) in expected.items():
        if wanted != tuple(got):
            raise ValueError(f"{what} must have shape {wanted}, not {tuple(got)}")
    return _IMPLEMENTATIONS[name](q, k, v, k_self, v_self, sight, position_bias, time_bias, alpha)
