"""Events as tokens: what the encoder reads.

    fused        [context …] event             and, for each prediction, a candidate behind a prefix
    interleaved  [context …] item, action      as in the paper (section 2.2): Φ_0, a_0, Φ_1, a_1, …

In the fused layout an event is one memory token that carries its item and its actions, and an event that is
to be predicted has a query token of its own item beside it, which sees the events before. In the interleaved
layout the item's own token is asked: its actions come after it, so it cannot see them.

Items are retrieved from two tokens' outputs together: the newest memory token's, which leads back to its
item, and that of a request token, which has no item but carries the time of the request and sees its
context. The newest token alone found fewer of the next items; the request alone far fewer where users come
back to what they had.

Context is what an event was shown in (the place, the device). It enters as tokens of its own when it
changes (section 2.1: slowly changing features are kept where they change): one for each feature that is
present and not what it was at the event before, and for each that is present at a sequence's first event.
They stand before the event, which sees them.
"""

import dataclasses
import enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grstream.keys import ABSENT, Keys
from kernels import jagged

if TYPE_CHECKING:
    from grstream.model import Encoded


class Kind(enum.IntEnum):
    """What a token says. Each kind has a learned vector."""

    EVENT = 0  # fused: an item and what was done with it
    ITEM = 1  # interleaved: an item that was shown, or may be
    ACTION = 2  # interleaved: what was done with the item before
    CONTEXT = 3  # a feature of the moment took this value
    CANDIDATE = 4  # fused: an item that may be shown
    REQUEST = 5  # the user is asking for items


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Memory tokens and query tokens of S sequences, each packed sequence after sequence.

    Vectors are those of the vocabulary, on the model's device and of its dtype; the rest is int64.
    """

    memory_lengths: Tensor  # (S,)
    memory_vectors: Tensor  # (M, d) zero where a token has none
    memory_kinds: Tensor  # (M,) Kind
    memory_actions: Tensor  # (M,) bit a is set where configured action a was taken
    memory_times: Tensor  # (M,) milliseconds, kernels.UNKNOWN_TIME where not known
    query_lengths: Tensor  # (S,)
    query_vectors: Tensor  # (Q, d)
    query_kinds: Tensor  # (Q,) Kind
    query_prefix: Tensor  # (Q,) memory tokens of its own sequence that the query sees
    query_times: Tensor  # (Q,) milliseconds

    @classmethod
    def of_memory(
        cls, lengths: Tensor, vectors: Tensor, kinds: Tensor, actions: Tensor, times: Tensor
    ) -> "Tokens":
        """Memory tokens alone: what `HSTU.extend` takes."""
        none = times.new_empty(0)
        queries = (torch.zeros_like(lengths), vectors[:0], none, none, none)
        return cls(lengths, vectors, kinds, actions, times, *queries)

    @classmethod
    def of_events(cls, lengths: Tensor, items: Tensor, actions: Tensor, times: Tensor) -> "Tokens":
        """A memory token for each of E events in the fused layout, without context."""
        return cls.of_memory(lengths, items, torch.full_like(times, Kind.EVENT), actions, times)

    @classmethod
    def of_candidates(
        cls, lengths: Tensor, items: Tensor, prefix: Tensor, times: Tensor, kind: Kind = Kind.CANDIDATE
    ) -> "Tokens":
        """Query tokens alone: what `HSTU.score` takes. `prefix` is as a rule the length of the history."""
        none = times.new_empty(0)
        memory = (torch.zeros_like(lengths), items[:0], none, none, none)
        return cls(*memory, lengths, items, torch.full_like(times, kind), prefix, times)


@dataclasses.dataclass(frozen=True, eq=False)
class Events:
    """E events of S sequences, oldest first, and the K context tokens that stand before some of them."""

    lengths: Tensor  # (S,)
    items: Tensor  # (E, d) item and item features
    actions: Tensor  # (E,) bits
    times: Tensor  # (E,) milliseconds
    contexts: Tensor  # (K, d)
    context_of: Tensor  # (K,) the event that each stands before, ascending


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """Where the N events to be predicted are read out: `HSTU.forward` takes `readout`."""

    events: Tensor  # (N,) the row of each among the E events
    readout: Tensor  # memory tokens wanted, -1 for the start vector
    interleaved: bool

    def ranking(self, encoded: "Encoded") -> Tensor:
        """What each event's actions are predicted from: (N, d)."""
        return encoded.memory[len(self.events) :] if self.interleaved else encoded.query[1::2]

    def retrieval(self, encoded: "Encoded") -> Tensor:
        """What each event's item is predicted from, newest token and request together: (N, d)."""
        request = encoded.query if self.interleaved else encoded.query[::2]
        return encoded.memory[: len(self.events)] + request


def candidate_kind(interleaved: bool) -> Kind:
    return Kind.ITEM if interleaved else Kind.CANDIDATE


def changed_context(
    context: Keys,  # (E, C) feature keys, ABSENT where an event has none
    before: Keys,  # (E, C) those of the event before, ABSENT before a sequence's first
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The event and the column of every context token, in the tokens' order: (K,) and (K,)."""
    event, column = np.nonzero((context != ABSENT) & (context != before))
    return event, column


def context_before(context: Keys, lengths: npt.NDArray[np.int32]) -> Keys:
    """Each event's predecessor's context, ABSENT before a sequence's first event: (E, C)."""
    before = np.empty_like(context)
    before[1:] = context[:-1]
    starts = np.cumsum(lengths) - lengths
    before[starts[lengths > 0]] = ABSENT
    return before


def memory_tokens(events: Events, interleaved: bool) -> tuple[Tokens, Tensor]:
    """All events as memory tokens, and which token is each event's item: (E,).

    Gradients flow back to the vectors from the tokens.
    """
    count, contexts = len(events.times), len(events.context_of)
    arange = torch.arange(contexts + 2 * count, device=events.times.device)
    own = 2 if interleaved else 1  # an event's tokens beside its context's
    before = _counts(events.context_of, count)  # (E,) context tokens of each
    first = jagged.starts(before + own)
    item = first + before
    context = first[events.context_of] + arange[:contexts] - jagged.starts(before)[events.context_of]
    place = torch.cat((context, item, item + 1) if interleaved else (context, item))
    source = torch.empty_like(place).index_copy_(0, place, arange[: len(place)])

    def placed(of_contexts: Tensor, of_items: Tensor, of_actions: Tensor) -> Tensor:
        parts = (of_contexts, of_items, of_actions) if interleaved else (of_contexts, of_items)
        return torch.cat(parts).index_select(0, source)

    def each(like: Tensor, value: int) -> Tensor:
        return torch.full_like(like, value)

    kind = Kind.ITEM if interleaved else Kind.EVENT
    silent = torch.zeros_like(events.actions)
    lengths = torch.zeros_like(events.lengths)
    lengths.index_add_(0, jagged.owners(events.lengths, count), before + own)
    tokens = Tokens.of_memory(
        lengths=lengths,
        vectors=placed(events.contexts, events.items, torch.zeros_like(events.items)),
        kinds=placed(each(context, Kind.CONTEXT), each(item, kind), each(item, Kind.ACTION)),
        actions=placed(each(context, 0), silent if interleaved else events.actions, events.actions),
        times=placed(events.times[events.context_of], events.times, events.times),
    )
    return tokens, item


def training_tokens(events: Events, new: Tensor, interleaved: bool) -> tuple[Tokens, Asked]:
    """The tokens of a training step in which the events `new` (N,), ascending, are to be predicted.

    Each has a request token at its time, and in the fused layout a candidate token behind it. Both see what
    came before the event, and the event's context.
    """
    tokens, item = memory_tokens(events, interleaved)
    count = len(events.times)
    owner = jagged.owners(events.lengths, count)[new]
    starts = jagged.starts(tokens.memory_lengths)[owner]
    own, context = item[new], _counts(events.context_of, count)[new]
    newest = own - context - 1  # the last token of the event before
    readout = [torch.where(newest >= starts, newest, -1)]
    kinds, vectors = [Kind.REQUEST], [events.items.new_zeros(len(new), events.items.shape[1])]
    if interleaved:
        readout.append(own)
    else:
        kinds.append(Kind.CANDIDATE)
        vectors.append(events.items.index_select(0, new))
    each = len(kinds)
    tokens = dataclasses.replace(
        tokens,
        query_lengths=_counts(owner, len(events.lengths)) * each,
        query_vectors=torch.stack(vectors, 1).flatten(0, 1),
        query_kinds=torch.tensor(kinds, device=new.device).repeat(len(new)),
        query_prefix=(own - starts).repeat_interleave(each),
        query_times=events.times[new].repeat_interleave(each),
    )
    return tokens, Asked(new, torch.cat(readout), interleaved)


def _counts(of: Tensor, among: int) -> Tensor:
    """How often each of 0 … among − 1 stands there: `bincount`, without its wait for a GPU."""
    return of.new_zeros(among).index_add_(0, of, torch.ones_like(of))
