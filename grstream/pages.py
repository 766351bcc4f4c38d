"""Keys and values in pages: a `Cache` laid out so that a history grows without being copied.

A pool of pages of equally many tokens is shared by all sequences (as in vLLM's paged attention, Kwon et al.
2023); `HSTU.score` takes it as it takes a `Cache`, and gives the same. `HSTU.grow` adds to it in place.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import jagged
from kernels.paged import PagedSight, PageTensor, Scaled, page_counts

if TYPE_CHECKING:
    from grstream.model import HSTU, Cache
    from grstream.tokens import Tokens

PAGE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclasses.dataclass(frozen=True, eq=False)
class Pages:
    """A pool of P pages."""

    times: Tensor  # (P, page) int64 milliseconds
    layers: tuple[
        tuple[PageTensor, PageTensor], ...
    ]  # per layer k (P, page, H, d_qk) and v (P, page, H, d_v)

    def arrays(self) -> Iterator[Tensor]:
        yield self.times
        for layer in self.layers:
            for pages in layer:
                if isinstance(pages, Scaled):
                    yield pages.values
                    yield pages.scales
                else:
                    yield pages


@dataclasses.dataclass(frozen=True, eq=False)
class PagedCache:
    """What the encoder keeps of S sequences' memory tokens, in a pool."""

    lengths: Tensor  # (S,) int64
    pages: Tensor  # (sum of ceil(lengths / page),) int64 page numbers, sequence after sequence
    pool: Pages

    @property
    def layers(self) -> tuple[tuple[PageTensor, PageTensor], ...]:
        return self.pool.layers

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
        return cls(cache.lengths, pages, Pages(laid_out(cache.times), layers))

    def seen_by(self, tokens: "Tokens") -> PagedSight:
        """What the query tokens see."""
        return self.sight(tokens.query_lengths, tokens.query_prefix, tokens.query_times)

    def sight(self, row_lengths: Tensor, row_prefix: Tensor, row_times: Tensor) -> PagedSight:
        return PagedSight(self.lengths, self.pages, self.pool.times, row_lengths, row_prefix, row_times)


def page_bytes(model: "HSTU", page_tokens: int, dtype: str) -> int:
    """What a page takes in all layers, with its times and the encoding of its last token."""
    numbers = sum(layer.heads * (layer.qk + layer.v) for layer in model.layers)
    scales = 2 * 4 * sum(layer.heads for layer in model.layers) if dtype == "int8" else 0
    a_token = numbers * PAGE_DTYPES[dtype].itemsize + scales + 8
    return page_tokens * a_token + len(model.start) * model.start.element_size()


def blank_pages(model: "HSTU", count: int, page_tokens: int, dtype: str) -> Pages:
    """Pages for `model`, on its device, with the heads outermost, as a CPU reads them fastest."""
    device = model.start.device

    def blank(heads: int, width: int) -> PageTensor:
        def array(*last: int, of: torch.dtype) -> Tensor:
            # Empty, so that the system gives memory as pages are used; what no token wrote is never read.
            return torch.empty(heads, count, page_tokens, *last, dtype=of, device=device).movedim(0, 2)

        values = array(width, of=PAGE_DTYPES[dtype])
        return Scaled(values, array(of=torch.float32)) if dtype == "int8" else values

    layers = tuple((blank(layer.heads, layer.qk), blank(layer.heads, layer.v)) for layer in model.layers)
    return Pages(torch.zeros(count, page_tokens, dtype=torch.int64, device=device), layers)
