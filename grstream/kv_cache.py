"""Keys and values in pages that are addressed by what they were computed from (law 5).

A full page's address is the chain hash of the weights version and of the tokens and times up to its end, so
nothing is ever invalidated: a roll, a late event, a deletion or new weights are other addresses, and whoever
begins with the same tokens shares pages. The tokens behind a user's last full page lie in a page of the
user's own, which is extended in place.

Pages are held while a request uses them. The others are evicted when there are no free ones, the one let go
longest ago first; a request lets go of its last pages first, so that a history loses its end before its
beginning. Not thread-safe: it belongs to its engine's thread.
"""

import collections
import dataclasses
from collections.abc import Sequence

import torch

from grstream.model import HSTU
from grstream.pages import PagedCache, Pages, blank_pages, page_bytes


class CacheFull(RuntimeError):
    """Requests hold so many pages that not as many are left as were asked for."""


@dataclasses.dataclass(frozen=True)
class Tail:
    """The page behind a user's last full one."""

    page: int
    after: bytes  # address of what comes before it
    content: bytes  # its tokens


@dataclasses.dataclass
class _Page:
    holders: int = 0
    address: bytes | None = None
    user: int | None = None  # whose tail it is


class KVCache:
    """A pool of pages within `budget` bytes, for models of one shape."""

    def __init__(self, model: HSTU, budget: int, page_tokens: int, dtype: str = "float32") -> None:
        size = page_bytes(model, page_tokens, dtype)
        self.page_tokens = page_tokens
        self.budget = budget
        self._page_bytes = size
        self._state = [_Page() for _ in range(budget // size)]
        self.pages: Pages = blank_pages(model, len(self._state), page_tokens, dtype)
        self.newest = model.start.new_zeros(
            len(self._state), len(model.start)
        )  # encoded, of a page's last token
        self._free = list(range(len(self._state)))[::-1]  # the lowest last: they are handed out in order
        self._at: dict[bytes, int] = {}
        self._tails: dict[int, Tail] = {}
        self._idle: collections.OrderedDict[int, None] = (
            collections.OrderedDict()
        )  # least recently used first
        self.evicted = 0

    def __len__(self) -> int:
        """Pages in use."""
        return len(self._state) - len(self._free)

    @property
    def capacity(self) -> int:
        return len(self._state)

    @property
    def nbytes(self) -> int:
        return len(self) * self._page_bytes

    def find(self, addresses: Sequence[bytes]) -> list[int]:
        """The pages of the longest run of addresses from the first on that is here, held for the caller."""
        found = []
        for address in addresses:
            page = self._at.get(address)
            if page is None:
                break
            self._hold(page)
            found.append(page)
        return found

    def tail(self, user: int, after: bytes, content: bytes) -> Tail | None:
        """A user's tail if it stands behind `after` and begins `content`, held for the caller."""
        tail = self._tails.get(user)
        if tail is None or tail.after != after or not content.startswith(tail.content):
            return None
        self._hold(tail.page)
        return tail

    def take(self, count: int) -> list[int]:
        """Pages that hold nothing, held for the caller. Raises CacheFull, and takes none."""
        if count > len(self._free) + len(self._idle):
            raise CacheFull(f"{count} pages are wanted, {len(self._free) + len(self._idle)} can be had")
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self._free.append(page)
            self.evicted += 1
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._state[page].holders = 1
        return taken

    def keep(self, page: int, address: bytes) -> int:
        """Give a full page its address; the page that has it, held in the given one's place."""
        other = self._at.get(address)
        if other == page:
            return page
        self._disown(page)
        if other is not None:
            self._hold(other)
            self.release([page])
            return other
        self._at[address] = page
        self._state[page].address = address
        return page

    def keep_tail(self, user: int, page: int, after: bytes, content: bytes) -> None:
        """Have a page be a user's tail, instead of the one before."""
        before = self._tails.get(user)
        if before is not None and before.page != page:
            self._disown(before.page)
        self._tails[user] = Tail(page, after, content)
        self._state[page].user = user

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages, the last first. Those without an address or a user are free."""
        for page in reversed(pages):
            state = self._state[page]
            state.holders -= 1
            if not state.holders:
                self._rest(page)

    def holders(self, page: int) -> int:
        return self._state[page].holders

    def copy(self, source: int, target: int) -> None:
        """What lies in one page, into another."""
        for array in self.pages.arrays():
            array[target] = array[source]
        self.newest[target] = self.newest[source]

    def cache(self, lengths: Sequence[int], pages: Sequence[Sequence[int]]) -> PagedCache:
        """Sequences in these pages, as a model takes them."""
        device = self.newest.device
        numbers = torch.tensor([page for own in pages for page in own], dtype=torch.int64, device=device)
        return PagedCache(torch.tensor(lengths, device=device), numbers, self.pages)

    def _hold(self, page: int) -> None:
        state = self._state[page]
        if not state.holders:
            del self._idle[page]
        state.holders += 1

    def _rest(self, page: int) -> None:
        """What becomes of a page that nobody holds."""
        state = self._state[page]
        if state.address is None and state.user is None:
            self._free.append(page)
        else:
            self._idle[page] = None

    def _disown(self, page: int) -> None:
        """A page is nobody's tail any more."""
        state = self._state[page]
        if state.user is None:
            return
        del self._tails[state.user]
        state.user = None
        if not state.holders:
            del self._idle[page]
            self._free.append(page)

    def _forget(self, page: int) -> None:
        state = self._state[page]
        if state.address is not None:
            del self._at[state.address]
        if state.user is not None:
            del self._tails[state.user]
        self._state[page] = _Page()
