"""Attention problems whose memory lies in pages, and hypothesis drawing them."""

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.paged import PagedSight, paged_attention
from tests.attention_cases import TABLES, Case, case


@dataclasses.dataclass
class Paged:
    """A case in one piece, and the same in pages."""

    case: Case
    sight: PagedSight
    k_pages: Tensor = dataclasses.field(repr=False)
    v_pages: Tensor = dataclasses.field(repr=False)

    def run(self, implementation: str) -> Tensor:
        arrays, tables = self.case.arrays, {name: self.case.arrays.get(name) for name in TABLES}
        return paged_attention(
            arrays["q"],
            self.k_pages,
            self.v_pages,
            arrays["k_self"],
            arrays["v_self"],
            self.sight,
            **tables,
            alpha=self.case.alpha,
            softmax=self.case.softmax,
            implementation=implementation,
        )

    def rows(self, chosen: list[list[int]]) -> "Paged":
        """With some rows of each sequence, in this order."""
        starts = torch.cumsum(self.sight.row_lengths, 0) - self.sight.row_lengths
        at = torch.tensor([int(first) + r for first, own in zip(starts, chosen, strict=True) for r in own])
        lengths = torch.tensor([len(own) for own in chosen])
        changes = {
            "row_lengths": lengths,
            "row_prefix": self.sight.row_prefix[at],
            "row_times": self.sight.row_times[at],
        }
        arrays = {**self.case.arrays, **{n: self.case.arrays[n][at] for n in ("q", "k_self", "v_self")}}
        whole = dataclasses.replace(self.case.sight, **changes)
        return dataclasses.replace(
            self,
            case=Case(whole, arrays, self.case.softmax),
            sight=dataclasses.replace(self.sight, **changes),
        )


def in_pages(case: Case, page_tokens: int, seed: int = 0, spare: int = 3) -> Paged:
    """The case's memory in pages drawn at random from a pool, NaN wherever no token of it lies.

    By some seeds the pool has its heads outermost, and by some each sequence's pages follow one another.
    """
    k, v, sight = case.arrays["k"], case.arrays["v"], case.sight
    lengths = sight.memory_lengths.tolist()
    counts = [math.ceil(length / page_tokens) for length in lengths]
    pool = sum(counts) + spare
    pages = torch.randperm(pool, generator=torch.Generator().manual_seed(seed))[: sum(counts)]
    if seed % 4 == 3:
        pages = torch.arange(sum(counts)) + 1

    def blank(like: Tensor) -> Tensor:
        tokens, (heads, width) = (pool, page_tokens), like.shape[1:]
        if seed % 2:
            return like.new_full((heads, *tokens, width), math.nan).movedim(0, 2)
        return like.new_full((*tokens, heads, width), math.nan)

    k_pages, v_pages = blank(k), blank(v)
    times = torch.full((pool, page_tokens), 77)
    token = first = 0
    for length, count in zip(lengths, counts, strict=True):
        for j in range(length):
            place = int(pages[first + j // page_tokens]), j % page_tokens
            k_pages[place], v_pages[place] = k[token + j], v[token + j]
            times[place] = sight.memory_times[token + j]
        token, first = token + length, first + count
    paged = PagedSight(
        sight.memory_lengths, pages, times, sight.row_lengths, sight.row_prefix, sight.row_times
    )
    return Paged(case, paged, k_pages, v_pages)


def candidates(
    lengths: list[int],
    counts: list[int],
    page_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    **options,
) -> Paged:
    """So many candidates of each sequence, all behind the whole of it and shown at one time."""
    whole = case(
        lengths, [[n] * rows for n, rows in zip(lengths, counts, strict=True)], dtype=dtype, **options
    )
    shown = torch.randint(0, 10**11, (len(lengths),), generator=torch.Generator().manual_seed(1))
    times = shown.repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    whole.sight = dataclasses.replace(whole.sight, row_times=times)
    return in_pages(whole, page_tokens)


@st.composite
def paged_cases(draw: st.DrawFn, dtype: torch.dtype, longest: int = 40) -> Paged:
    lengths = draw(st.lists(st.integers(0, longest), max_size=4))
    prefixes = [draw(st.lists(st.integers(0, n), max_size=5)) for n in lengths]
    whole = case(
        lengths,
        prefixes,
        heads=draw(st.integers(1, 3)),
        qk=draw(st.integers(1, 20)),
        v=draw(st.integers(1, 20)),
        times=draw(st.sampled_from(["any", "equal", "close", "some"])),
        dtype=dtype,
        seed=draw(st.integers(0, 9)),
        bits=draw(st.sampled_from([1, 3, 8])),
        tables=draw(st.sampled_from([(), TABLES[:1], TABLES[1:], TABLES])),
        softmax=draw(st.booleans()),
    )
    if draw(st.booleans()):  # as candidates are: behind everything, at one time
        sight, owner = (
            whole.sight,
            torch.repeat_interleave(torch.arange(len(lengths)), whole.sight.row_lengths),
        )
        whole.sight = dataclasses.replace(
            sight, row_prefix=sight.memory_lengths[owner], row_times=10**11 + owner
        )
    return in_pages(whole, draw(st.sampled_from([16, 32, 64])), draw(st.integers(0, 3)))
