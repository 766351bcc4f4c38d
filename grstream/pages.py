"""Keys and values in pages: a `Cache` laid out so that a history grows without being copied.

A pool of pages of equally many tokens is shared by all sequences (as in vLLM's paged attention, Kwon et al.
2023); `HSTU.score` takes it as it takes a `Cache`, and gives the same.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import jagged
from kernels.paged import PagedSight, page_counts

if TYPE_CHECKING:
    from grstream.model import Cache
    from grstream.tokens import Tokens


@dataclasses.dataclass(frozen=True, eq=False)
class PagedCache:
    """What the encoder keeps of S sequences' memory tokens, in a pool of P pages."""

    lengths: Tensor  # (S,) int64
    pages: Tensor  # (sum of ceil(lengths / page),) int64 page numbers, sequence after sequence
    page_times: Tensor  # (P, page) int64 milliseconds
    layers: tuple[tuple[Tensor, Tensor], ...]  # per layer k (P, page, H, d_qk) and v (P, page, H, d_v)

    @classmethod
    def of(cls, cache: "Cache", page_tokens: int) -> "PagedCache":
        """A cache's tokens, each sequence's in pages of its own, a power of two from 16 up of tokens each."""
        counts = page_counts(cache.lengths, page_tokens)
        pages = torch.arange(int(counts.sum()), device=counts.device)
        first = jagged.owners(cache.lengths, len(cache.times))
        place = jagged.starts(counts)[first] * page_tokens + jagged.positions(cache.lengths, len(cache.times))

        def laid_out(array: Tensor) -> Tensor:
            pool = array.new_zeros(len(pages) * page_tokens, *array.shape[1:])
            return pool.index_copy_(0, place, array).unflatten(0, (-1, page_tokens))

        layers = tuple((laid_out(k), laid_out(v)) for k, v in cache.layers)
        return cls(cache.lengths, pages, laid_out(cache.times), layers)

    def seen_by(self, tokens: "Tokens") -> PagedSight:
        """What the query tokens see."""
        rows = (tokens.query_lengths, tokens.query_prefix, tokens.query_times)
        return PagedSight(self.lengths, self.pages, self.page_times, *rows)
