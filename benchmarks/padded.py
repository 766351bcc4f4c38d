"""The baseline of `benchmarks.training`: HSTU as dense PyTorch, every sequence padded to the window.

This is the way of the public research code (Meta's generative-recommenders, research/modeling/sequential/
hstu.py): tokens as (batch, window, d), scores of all window² pairs, a relative bias gathered by bucket for
each of them, a causal mask, SiLU, and autograd for the rest. The maths of a layer are ours to the last bias
(`encode` gives what `HSTU.forward` gives), its weights are the model's own.

It is no straw man. Buckets are found once a step, not once a layer; the causal mask is part of the position
bias, so that it costs nothing; a batch whose scores would leave the cache is cut (`sequences`), and where
autograd would scatter-add the gradient of the time table pair by pair, it is a weighted count instead.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grstream.layers import HSTULayer
from grstream.model import HSTU
from kernels import position_bits, position_bucket, time_bucket

UNSEEN = -1e30  # a pair of which SiLU and its derivative are 0


@dataclasses.dataclass(frozen=True, eq=False)
class Padded:
    """B sequences of at most `window` tokens, each padded at its end."""

    x: Tensor  # (B, window, d) what the first layer reads
    times: Tensor  # (B, window) int64 milliseconds
    real: Tensor  # (B, window) bool

    @classmethod
    def of(cls, x: Tensor, times: Tensor, lengths: Tensor, window: int) -> "Padded":
        """From packed tokens (M, d) and their times (M,)."""
        real = torch.arange(window) < lengths.unsqueeze(1)
        place = real.view(-1).nonzero().squeeze(1)
        # Written out as a gather, whose gradient is one too.
        row = torch.zeros(real.numel(), dtype=torch.int64)
        row[place] = torch.arange(1, len(place) + 1)
        padded = F.pad(x, (0, 0, 1, 0)).index_select(0, row)
        padded_times = torch.zeros(real.numel(), dtype=torch.int64).index_copy_(0, place, times)
        return cls(padded.view(*real.shape, -1), padded_times.view(real.shape), real)


def encode(model: HSTU, batch: Padded) -> Tensor:
    """The encoder's outputs at the real tokens, in their order: (M, d)."""
    window = batch.x.shape[1]
    difference = torch.arange(window).unsqueeze(1) - torch.arange(window)
    passed = time_bucket(batch.times.unsqueeze(2) - batch.times.unsqueeze(1))  # (B, window, window)
    x = batch.x
    for layer in model.layers:
        assert isinstance(layer, HSTULayer)
        assert layer.position_bias is not None
        bucket = position_bucket(difference, position_bits(len(layer.position_bias)))
        x = _layer(layer, x, bucket, passed, difference < 0)
    return x[batch.real]


def _layer(layer: HSTULayer, x: Tensor, bucket: Tensor, passed: Tensor, unseen: Tensor) -> Tensor:
    assert layer.position_bias is not None
    qk, v = layer.heads * layer.qk, layer.heads * layer.v

    def linear(x: Tensor, of: nn.Linear) -> Tensor:
        bias = None if of.bias is None else of.bias.to(dtype)
        return F.linear(x.to(dtype), of.weight.to(dtype), bias)

    dtype = x.dtype if layer.reduced is None else layer.reduced
    projected = F.silu(linear(layer.norm(x), layer.project_in))
    keys, values, queries, gate = projected.split((qk, v, qk, v), 2)

    def by_head(y: Tensor) -> Tensor:
        return y.unflatten(2, (layer.heads, -1)).transpose(1, 2)  # (B, H, window, width)

    position = layer.position_bias[bucket].masked_fill(unseen.unsqueeze(2), UNSEEN)  # (window, window, H)
    bias = position.permute(2, 0, 1).to(projected.dtype)
    if layer.time_bias is not None:
        bias = bias + _ByBucket.apply(layer.time_bias.t().to(projected.dtype), passed)
    scores = (by_head(queries) * layer.qk**-0.5) @ by_head(keys).transpose(2, 3) + bias
    seen = (F.silu(scores) @ by_head(values)).transpose(1, 2).flatten(2)  # (B, window, H · d_v)
    gated = layer.norm_out(seen.to(x.dtype)) * gate
    return x + layer.dropout(linear(gated, layer.project_out)).to(x.dtype)


class _ByBucket(torch.autograd.Function):
    """Each head's weight of every pair's bucket: (B, H, window, window)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = table.shape[1]
        heads = [row.index_select(0, index.view(-1)).view(index.shape) for row in table]
        return torch.stack(heads, 1) if len(heads) > 1 else heads[0].unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        rows = [
            torch.bincount(index.view(-1), gradient[:, head].reshape(-1), minlength=ctx.rows)
            for head in range(gradient.shape[1])
        ]
        return torch.stack(rows).to(gradient.dtype), None


def products(batch: int, window: int, dim: int, heads: int) -> list[tuple[tuple[int, ...], ...]]:
    """The matrix products of a layer's forward pass as shapes of their factors, for heads of dim / heads."""
    width = dim // heads
    return [
        ((batch * window, dim), (dim, 4 * dim)),
        ((batch * heads, window, width), (batch * heads, width, window)),
        ((batch * heads, window, window), (batch * heads, window, width)),
        ((batch * window, dim), (dim, dim)),
    ]
