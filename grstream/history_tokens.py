"""A history as the memory tokens that a version reads, numbered, and what they say as bytes.

The tokens are those of `grstream.tokens.memory_tokens`, laid out without their vectors, so that a part of
them can be looked up and encoded alone. Times are relative to the first token: the encoder reads differences
only, and two histories that say the same at other times of day are then the same (law 5).
"""

import dataclasses
import hashlib

import numpy as np
import numpy.typing as npt
import torch

from grstream.embedding_table import EmbeddingTable
from grstream.histories import History
from grstream.keys import ABSENT, Keys
from grstream.tokens import Kind, Tokens, changed_context

_DIGEST_BYTES = 16


@dataclasses.dataclass(frozen=True, eq=False)
class HistoryTokens:
    """M memory tokens of one history."""

    content: npt.NDArray[np.int64]  # (M, 4 + item features): kind, key, actions, time, features' keys
    begin_ms: int  # time of the first token: what times are relative to

    @classmethod
    def of(cls, history: History, contexts: int, interleaved: bool) -> "HistoryTokens":
        """The history's events as tokens, the first `contexts` of its features being those of context."""
        events, context = len(history.items), history.features[:, :contexts]
        before = np.concatenate([np.full_like(context[:1], ABSENT), context[:-1]])
        of, column = changed_context(context, before)
        told = np.bincount(of, minlength=events)  # context tokens before each event
        size = told + (2 if interleaved else 1)
        first = np.cumsum(size) - size
        begin = int(history.times[0]) if events else 0
        content = np.zeros((int(size.sum()), 4 + history.features.shape[1] - contexts), np.int64)
        content[:, 3] = np.repeat(history.times.astype(np.int64) - begin, size)
        content[:, 4:] = ABSENT
        item = first + told
        content[item, 0] = Kind.ITEM if interleaved else Kind.EVENT
        content[item, 1] = history.items
        content[item, 4:] = history.features[:, contexts:]
        content[item + 1 if interleaved else item, 2] = history.actions
        if interleaved:
            content[item + 1, 0] = Kind.ACTION
        place = first[of] + np.arange(len(of)) - (np.cumsum(told) - told)[of]
        content[place, 0], content[place, 1] = Kind.CONTEXT, context[of, column]
        return cls(content, begin)

    @classmethod
    def of_context(cls, context: Keys, last: Keys, at_ms: int, features: int) -> "HistoryTokens":
        """What a request's context (C,) changes of the `last` event's, at a relative time."""
        _, column = changed_context(context[None], last[None])
        content = np.zeros((len(column), 4 + features), np.int64)
        content[:, 0], content[:, 1] = Kind.CONTEXT, context[column]
        content[:, 3], content[:, 4:] = at_ms, ABSENT
        return cls(content, 0)

    def __len__(self) -> int:
        return len(self.content)

    def digests(self, after: bytes, page_tokens: int) -> list[bytes]:
        """The chain hash up to the end of each full page, `after` being what stands before the first."""
        chain = []
        for page in range(len(self.content) // page_tokens):
            after = hashlib.blake2b(after + self.page(page, page_tokens), digest_size=_DIGEST_BYTES).digest()
            chain.append(after)
        return chain

    def page(self, number: int, page_tokens: int) -> bytes:
        """What the tokens of a page say; fewer of the last one."""
        return self.content[number * page_tokens : (number + 1) * page_tokens].tobytes()

    def page_bytes(self, page_tokens: int) -> int:
        return page_tokens * self.content.shape[1] * self.content.itemsize


def memory_tokens(parts: list[npt.NDArray[np.int64]], table: EmbeddingTable) -> Tokens:
    """Parts of histories' contents, one a sequence, as the tokens that `HSTU.grow` takes."""
    content = np.concatenate(parts)
    device = table.rows.device
    spoken = np.flatnonzero(content[:, 0] != Kind.ACTION)  # an action's token has no vector of the vocabulary
    vectors, _ = table.vectors(content[spoken, 1])
    if len(spoken) < len(content):
        at = torch.from_numpy(spoken).to(device)
        vectors = vectors.new_zeros(len(content), vectors.shape[1]).index_copy_(0, at, vectors)
    for column in content.T[4:]:
        present = np.flatnonzero(column != ABSENT)
        if len(present):
            at = torch.from_numpy(present).to(device)
            vectors.index_add_(0, at, table.vectors(column[present])[0])
    kinds, actions, times = (torch.from_numpy(content[:, i].copy()).to(device) for i in (0, 2, 3))
    lengths = torch.tensor([len(part) for part in parts], device=device)
    return Tokens.of_memory(lengths, vectors, kinds, actions, times)
