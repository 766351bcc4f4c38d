"""The buckets of the relative biases.

    b(i, j) = w_pos[position_bucket(p_i - p_j)] + w_time[time_bucket(t_i - t_j)]

Both are logarithms read off a float32's bits, so every implementation and device finds the same bucket,
also at its edges: a difference x is rounded to float32 (to nearest even: exact below 2^24) and written as
1.m · 2^e; the leading bits of m say where in the octave it lies.
"""

import torch
from torch import Tensor

POSITION_BUCKETS = 96  # reaches 16,384 tokens back: beyond any window, and a table of 96 rows costs nothing
TIME_BUCKETS = 80  # reaches 34 years back in milliseconds
_POSITION_BITS = 3  # 8 buckets an octave, exact below 16
_TIME_BITS = 1  # 2 buckets an octave
_MANTISSA = 23  # bits of a float32's mantissa
_EXPONENT = 127  # and the bias of its exponent

# A time bucket is `(bits >> TIME_SHIFT) - TIME_OFFSET`, clamped; kernels do that arithmetic themselves.
TIME_SHIFT = _MANTISSA - _TIME_BITS
TIME_OFFSET = _EXPONENT << _TIME_BITS


def position_bucket(difference: Tensor) -> Tensor:
    """Bucket of p_i - p_j, an integer tensor; int32 of the same shape.

    x itself below 16, then 8 buckets an octave (16-17, 18-19, …, 30-31, 32-35, …), the last one for 15,360
    and more. Negative differences are bucket 0.
    """
    bits = difference.to(torch.float32).view(torch.int32) >> (_MANTISSA - _POSITION_BITS)
    logarithm = bits - ((_EXPONENT + _POSITION_BITS - 1) << _POSITION_BITS)
    exact = difference < (1 << _POSITION_BITS)
    return torch.where(exact, difference.to(torch.int32), logarithm).clamp_(0, POSITION_BUCKETS - 1)


def time_bucket(difference: Tensor) -> Tensor:
    """Bucket of t_i - t_j in milliseconds, an integer tensor; int32 of the same shape.

    2·e + (1 if the difference is at least 1.5 · 2^e), the last one for 1.5 · 2^39 ms and more. 0 and 1 ms
    share bucket 0, and so do negative differences: times that go back say nothing about distance.
    """
    bits = difference.to(torch.float32).view(torch.int32) >> TIME_SHIFT
    return bits.sub_(TIME_OFFSET).clamp_(0, TIME_BUCKETS - 1)
