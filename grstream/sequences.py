"""Histories on their way into the cache: what is there already, and what is still to be encoded."""

import dataclasses
from collections.abc import Sequence as Several

import numpy as np
import torch
from torch import Tensor

from grstream.history_tokens import HistoryTokens, memory_tokens
from grstream.kv_cache import CacheFull, KVCache
from grstream.scores import Reuse
from grstream.served import Served


class Sequence:
    """One history under one version. Its first `done` tokens are encoded, in pages that it holds."""

    def __init__(self, served: Served, cache: KVCache, tokens: HistoryTokens, user: int | None) -> None:
        self.served, self.cache, self.tokens, self.user = served, cache, tokens, user
        self.addresses = tokens.digests(served.root, cache.page_tokens)
        self.pages: list[int] = []
        self.done = self.cached = 0  # `cached`: of them, found
        self.newest: Tensor | None = None if len(tokens) else served.model.start  # (d,) once ready
        self.holders = 0  # requests that use it
        self._located = not len(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def identity(self) -> tuple[bytes, bytes, int | None]:
        """Equal for sequences of a user that are the same tokens under the same version."""
        full = len(self.addresses)
        return self._before(full), self.tokens.page(full, self.cache.page_tokens), self.user

    @property
    def ready(self) -> bool:
        return self.newest is not None

    @property
    def reuse(self) -> Reuse:
        """How much of it the cache had."""
        if self.cached == len(self):
            return Reuse.HIT
        return Reuse.EXTEND if self.cached else Reuse.MISS

    @property
    def missing(self) -> bytes | None:
        """The address of the first full page that is not encoded yet."""
        at = self.done // self.cache.page_tokens
        return self.addresses[at] if at < len(self.addresses) else None

    def locate(self) -> None:
        """Find and hold the pages that are there."""
        if self._located:
            return
        self._located = True
        page = self.cache.page_tokens
        self.pages = self.cache.find(self.addresses)
        self.done = len(self.pages) * page
        if self.user is not None and self.done < len(self):
            at = len(self.pages)
            tail = self.cache.tail(self.user, self._before(at), self.tokens.page(at, page))
            if tail is not None:
                self.pages.append(tail.page)
                self.done += len(tail.content) // self.tokens.page_bytes(1)
        self.cached = self.done
        if self.done == len(self):
            self._finish()

    def make_room(self, count: int) -> None:
        """Have pages of its own for `count` tokens more. Raises CacheFull, and changes nothing."""
        page = self.cache.page_tokens
        self.pages += self.cache.take(-(-(self.done + count) // page) - len(self.pages))

    def encoded(self, count: int) -> None:
        """Its next `count` tokens are there now: full pages get their address, and the rest is its user's."""
        page = self.cache.page_tokens
        full = self.done // page
        self.done += count
        for at in range(full, self.done // page):
            self.pages[at] = self.cache.keep(self.pages[at], self.addresses[at])
        if self.done == len(self):
            self._finish()

    def look_again(self) -> None:
        """Forget what was found: more will be there in a moment. Nothing of it may be encoded yet."""
        if self.done == self.cached:
            self.release()
            self._located, self.done, self.cached = False, 0, 0

    def release(self) -> None:
        self.cache.release(self.pages)
        self.pages = []

    def _finish(self) -> None:
        self.newest = self.cache.newest[self.pages[-1]].clone()  # a tail may grow under a request's feet
        full = len(self.addresses)
        rest = self.tokens.page(full, self.cache.page_tokens)
        if rest and self.user is not None:
            self.cache.keep_tail(self.user, self.pages[full], self._before(full), rest)

    def _before(self, page: int) -> bytes:
        """The address of what stands before a page."""
        return self.addresses[page - 1] if page else self.served.root


@dataclasses.dataclass(frozen=True)
class Part:
    """The next `count` tokens of a sequence that are to be encoded."""

    sequence: Sequence
    count: int


def room_for(sequence: Sequence, count: int) -> bool:
    """Whether there are pages now for `count` tokens more; then it has them."""
    try:
        sequence.make_room(count)
    except CacheFull:
        return False
    return True


def encode(parts: Several[Part]) -> None:
    """Encode parts of sequences of one version and one cache, which have room for them, as one batch."""
    cache, served = parts[0].sequence.cache, parts[0].sequence.served
    page = cache.page_tokens
    spans = [(part.sequence.done, part.sequence.done + part.count) for part in parts]
    contents = [p.sequence.tokens.content[a:b] for p, (a, b) in zip(parts, spans, strict=True)]
    tokens = memory_tokens(contents, served.table)
    wanted: list[int] = []  # new tokens that end a page or their sequence
    ends: list[int] = []  # the pages whose newest token they are then
    first = 0
    for part, (begin, end) in zip(parts, spans, strict=True):
        stops = np.arange(begin // page + 1, end // page + 1) * page
        if end == len(part.sequence) and end % page:
            stops = np.append(stops, end)
        wanted += (first + stops - 1 - begin).tolist()
        ends += [part.sequence.pages[(stop - 1) // page] for stop in stops.tolist()]
        first += part.count
    paged = cache.cache(
        [end for _, end in spans], [held(p.sequence, e) for p, (_, e) in zip(parts, spans, strict=True)]
    )
    device = cache.newest.device
    newest = served.model.grow(paged, tokens, torch.tensor(wanted, dtype=torch.int64, device=device))
    cache.newest[torch.tensor(ends, dtype=torch.int64, device=device)] = newest
    for part in parts:
        part.sequence.encoded(part.count)


def held(sequence: Sequence, tokens: int) -> list[int]:
    """The pages of its first so many tokens."""
    return sequence.pages[: -(-tokens // sequence.cache.page_tokens)]
