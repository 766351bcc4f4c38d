"""Sequences of different lengths packed one after another, described by their lengths alone."""

import torch
from torch import Tensor


def starts(lengths: Tensor) -> Tensor:
    """Where each sequence begins: (S,) int64."""
    return torch.cumsum(lengths, 0) - lengths


def owners(lengths: Tensor, total: int | None = None) -> Tensor:
    """The sequence of each element: (sum of lengths,) int64. `total`, when known, spares a GPU a wait."""
    sequences = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(sequences, lengths, output_size=total)


def positions(lengths: Tensor, total: int | None = None) -> Tensor:
    """The index of each element within its sequence: (sum of lengths,) int64."""
    start = torch.repeat_interleave(starts(lengths), lengths, output_size=total)
    return torch.arange(len(start), device=lengths.device) - start
