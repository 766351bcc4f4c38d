"""Device functions that the Triton kernels share: SiLU, its derivative, and the buckets of `kernels.buckets`.

SiLU is taken at half its argument, x/2 · (1 + tanh(x/2)). With APPROXIMATE the hyperbolic tangent is the
hardware's (`tanh.approx.f32`, NVIDIA from sm_75 on): one special-function operation an element where
x · sigmoid(x) takes two, with a relative error of 2^-11, below the rounding of bf16. Without it the form is
the exact one, for fp32, the interpreter and AMD. Both give exactly 0, and so do their derivatives, at
arguments as low as `UNSEEN`, so a pair is masked by its bias.
"""

import triton
import triton.language as tl

from kernels import buckets

UNSEEN = -1e30  # bias of a pair out of sight

TIME_SHIFT = tl.constexpr(buckets.TIME_SHIFT)
TIME_OFFSET = tl.constexpr(buckets.TIME_OFFSET)
_TIME_LAST = tl.constexpr(buckets.TIME_BUCKETS - 1)
_MANTISSA = tl.constexpr(23)
_EXPONENT = tl.constexpr(127)
_POSITION_OCTAVES = tl.constexpr(buckets.position_rows(1) // 2 + 1)


@triton.jit
def tanh_approximate(x):
    """The hardware's tanh of a float32."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu_of_half(half, APPROXIMATE: tl.constexpr):
    """SiLU(2 · half)."""
    if APPROXIMATE:
        return half + half * tanh_approximate(half)
    else:
        return 2.0 * half * sigmoid(2.0 * half)


@triton.jit
def silu_of_half_and_slope(half, APPROXIMATE: tl.constexpr):
    """SiLU(x) and 2 · SiLU'(x) - 1 at x = 2 · half, the form that takes fewest instructions.

    A gradient g becomes g · SiLU'(x) = (g + g · slope) / 2.
    """
    if APPROXIMATE:
        t = tanh_approximate(half)
        return half + half * t, t + half * (1.0 - t * t)
    else:
        x = 2.0 * half
        s = sigmoid(x)
        return x * s, 2.0 * (s + x * s * (1.0 - s)) - 1.0


@triton.jit
def silu(x, APPROXIMATE: tl.constexpr):
    return silu_of_half(0.5 * x, APPROXIMATE)


@triton.jit
def silu_and_derivative(x, APPROXIMATE: tl.constexpr):
    """SiLU(x) and SiLU'(x)."""
    value, slope = silu_of_half_and_slope(0.5 * x, APPROXIMATE)
    return value, 0.5 + 0.5 * slope


@triton.jit
def position_bucket(difference, BITS: tl.constexpr):
    """`buckets.position_bucket` of integer differences: int32."""
    rounded = difference.to(tl.float32).to(tl.int32, bitcast=True)
    logarithm = (rounded >> (_MANTISSA - BITS)) - ((_EXPONENT + BITS - 1) << BITS)
    bucket = tl.where(difference < (1 << BITS), difference.to(tl.int32), logarithm)
    return tl.minimum(tl.maximum(bucket, 0), ((_POSITION_OCTAVES - BITS) << BITS) - 1)


@triton.jit
def time_bucket(difference):
    """`buckets.time_bucket` of int64 differences, t_i as `Sight.row_clock` has it: int32."""
    rounded = difference.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((rounded >> TIME_SHIFT) - TIME_OFFSET, 0), _TIME_LAST)
