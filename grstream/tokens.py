"""Events as tokens: what the encoder reads (fused layout).

Every event is one memory token, item ⊕ features ⊕ actions, which later tokens may see. An item whose actions
are asked for (a candidate, or a new event before its actions are known) is a query token, which nobody sees.
Vectors of items come from the vocabulary; this module needs none of it, only numpy and torch.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import jagged

if TYPE_CHECKING:  # it brings pyarrow, which a bare GPU machine need not have
    from grstream.microbatch import MicroBatch


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """S sequences with M memory tokens and Q query tokens, each packed sequence after sequence."""

    memory_lengths: Tensor  # (S,) int64: memory tokens of each sequence
    memory_items: Tensor  # (M, d): vocabulary vectors, item + features
    memory_actions: Tensor  # (M,) int64: bit a is set where configured action a was taken
    memory_times: Tensor  # (M,) int64 milliseconds
    query_lengths: Tensor  # (S,) int64: query tokens of each sequence
    query_items: Tensor  # (Q, d)
    query_prefix: Tensor  # (Q,) int64: memory tokens of its own sequence that the query sees
    query_times: Tensor  # (Q,) int64 milliseconds

    @classmethod
    def of_events(cls, lengths: Tensor, items: Tensor, actions: Tensor, times: Tensor) -> "Tokens":
        """Memory tokens alone: what `HSTU.extend` takes."""
        none = times.new_empty(0)
        return cls(lengths, items, actions, times, torch.zeros_like(lengths), items[:0], none, none)

    @classmethod
    def of_candidates(cls, lengths: Tensor, items: Tensor, prefix: Tensor, times: Tensor) -> "Tokens":
        """Query tokens alone: what `HSTU.score` takes. `prefix` is as a rule the length of the history."""
        none = times.new_empty(0)
        return cls(torch.zeros_like(lengths), items[:0], none, none, lengths, items, prefix, times)


@dataclasses.dataclass(frozen=True, eq=False)
class NewEvents:
    """The N events of a micro-batch that are predicted and learned from, in the order of the query tokens."""

    events: Tensor  # (N,) int64: the row of each among the batch's E events, and of its memory token
    before: Tensor  # (N,) int64: the memory token just before it in its sequence, -1 without any
    roles: Tensor  # (N,) uint8: Role.NEW or Role.NEW_LATE


def fused(batch: "MicroBatch", vectors: Tensor) -> tuple[Tokens, NewEvents]:
    """A micro-batch's tokens: each event a memory token, and each new event a query token before it.

    A query sees the events before its own and asks at its event's time. `vectors` (E, d) are those of the
    events' items + features; gradients flow back to them from both kinds of token.
    """
    device = vectors.device
    lengths = torch.tensor(batch.lengths, dtype=torch.int64)
    total = len(batch.items)
    position, owner = jagged.positions(lengths, total), jagged.owners(lengths, total)
    times = torch.tensor(batch.times, dtype=torch.int64)
    roles = torch.tensor(batch.roles, dtype=torch.uint8)
    new = roles.nonzero().squeeze(1)  # every Role but CONTEXT, which is 0
    prefix = position[new]
    tokens = Tokens(
        memory_lengths=lengths.to(device),
        memory_items=vectors,
        memory_actions=torch.tensor(batch.actions, dtype=torch.int64).to(device),
        memory_times=times.to(device),
        query_lengths=torch.bincount(owner[new], minlength=len(lengths)).to(device),
        query_items=vectors.index_select(0, new.to(device)),
        query_prefix=prefix.to(device),
        query_times=times[new].to(device),
    )
    before = torch.where(prefix > 0, new - 1, -1)
    return tokens, NewEvents(new.to(device), before.to(device), roles[new].to(device))
