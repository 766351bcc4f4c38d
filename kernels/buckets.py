"""The buckets of the relative biases.

    b(i, j) = w_pos[position_bucket(p_i - p_j)] + w_time[time_bucket(t_i - t_j)]

Both are logarithms read off a float32's bits, so every implementation and device finds the same bucket,
also at its edges: a difference x is rounded to float32 (to nearest even: exact below 2^24) and written as
1.m · 2^e; the leading bits of m say where in the octave it lies.

A position table of (15 - b) · 2^b rows has 2^b buckets an octave and is exact below 2^(b+1), so its length
alone says which it is. A time of UNKNOWN_TIME makes every difference it takes part in so large that it
falls into the last time bucket, which no two known times reach: they would have to be 400 years apart.
"""

import torch
from torch import Tensor

POSITION_BUCKETS = 96  # rows of the usual table, of 2^3 buckets an octave
TIME_BUCKETS = 88  # 87 of known differences, then the one of unknown times
UNKNOWN_TIME = -(2**61)  # a time in milliseconds that says: not known
UNKNOWN_BUCKET = TIME_BUCKETS - 1
_POSITION_OCTAVES = 15  # the last bucket of position begins just below 2^14 tokens back: beyond any window
_TIME_BITS = 1  # 2 buckets an octave
_MANTISSA = 23  # bits of a float32's mantissa
_EXPONENT = 127  # and the bias of its exponent

# A time bucket is `(bits >> TIME_SHIFT) - TIME_OFFSET`, clamped; kernels do that arithmetic themselves.
TIME_SHIFT = _MANTISSA - _TIME_BITS
TIME_OFFSET = _EXPONENT << _TIME_BITS


def position_rows(bits: int) -> int:
    """Rows of a position table with 2^bits buckets an octave. Raises ValueError outside 1 … 13."""
    if not 1 <= bits <= 13:
        raise ValueError(f"position buckets have 1 to 13 bits an octave, not {bits}")
    return (_POSITION_OCTAVES - bits) << bits


def position_bits(rows: int) -> int:
    """The inverse of `position_rows`. Raises ValueError where no number of bits gives so many rows."""
    for bits in range(1, 14):
        if position_rows(bits) == rows:
            return bits
    sizes = ", ".join(str(position_rows(bits)) for bits in range(1, 14))
    raise ValueError(f"position_bias must have one of these numbers of rows: {sizes}; not {rows}")


def position_offset(bits: int) -> int:
    """What to take from `float32 bits >> (23 - bits)` to have the position bucket, from 2^bits on."""
    return (_EXPONENT + bits - 1) << bits


def position_bucket(difference: Tensor, bits: int = 3) -> Tensor:
    """Bucket of p_i - p_j, an integer tensor; int32 of the same shape.

    With 3 bits x itself below 16, then 8 buckets an octave (16-17, 18-19, …, 30-31, 32-35, …), the last one
    for 15,360 and more. Negative differences are bucket 0.
    """
    logarithm = difference.to(torch.float32).view(torch.int32) >> (_MANTISSA - bits)
    exact = difference < (1 << bits)
    bucket = torch.where(exact, difference.to(torch.int32), logarithm - position_offset(bits))
    return bucket.clamp_(0, position_rows(bits) - 1)


def time_bucket(difference: Tensor) -> Tensor:
    """Bucket of t_i - t_j in milliseconds, an integer tensor; int32 of the same shape.

    2·e + (1 if the difference is at least 1.5 · 2^e), the last one for 1.5 · 2^43 ms and more, which only an
    UNKNOWN_TIME gives. 0 and 1 ms share bucket 0, and so do negative differences: times that go back say
    nothing about distance. An unknown t_i goes in as `Sight.row_clock` has it.
    """
    bits = difference.to(torch.float32).view(torch.int32) >> TIME_SHIFT
    return bits.sub_(TIME_OFFSET).clamp_(0, TIME_BUCKETS - 1)
