"""Attention over memory that lies in pages: what scoring candidates and extending histories run on.

M-FALCON's inner loop (Zhai et al. 2024, section 3.4, algorithm 1): a user's keys and values are kept between
requests, in pages of a fixed number of tokens that a pool hands out, and each user has a micro-batch of
candidates of its own size, all of which see the whole history and none of the others. The sum is that of
`kernels.reference`; only where a memory token lies differs. Inference alone: there is no backward pass.

`pytorch` gathers the pages into one array, and `triton` reads them where they are. On a CPU `pytorch` has a
way of its own for rows that come in runs, as candidates do (`kernels.cpu_paged`).
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels import attention, jagged, twins
from kernels.buckets import TIME_BUCKETS, UNKNOWN_TIME, position_bits, position_rows
from kernels.sight import Sight

INT8_MOST = 127

LEAST_PAGE = 16  # tokens: what a tensor core takes at a time

Plan = TypeVar("Plan")


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
    """Pages of int8, a scale for each token and head: 127 stands for a row's greatest magnitude."""

    values: Tensor  # (P, page, H, d) int8
    scales: Tensor  # (P, page, H) float32

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


PageTensor = Tensor | Scaled


def stored(pages: PageTensor, places: tuple[Tensor, Tensor], rows: Tensor) -> None:
    """Write rows (R, H, d) into the pages and places in them (R,), (R,), rounded to what pages hold."""
    if isinstance(pages, Scaled):
        scale = rows.abs().amax(-1).float().clamp_(min=torch.finfo(torch.float32).tiny) / INT8_MOST
        pages.scales[places] = scale
        pages.values[places] = (rows / scale.unsqueeze(-1)).round_().to(torch.int8)
    else:
        pages[places] = rows.to(pages.dtype)


def loaded(pages: PageTensor, places: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The rows at these places: (R, H, d)."""
    if isinstance(pages, Scaled):
        return (pages.values[places] * pages.scales[places].unsqueeze(-1)).to(dtype)
    return pages[places].to(dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class PagedSight:
    """S sequences whose memory tokens lie in pages of `page_times`' pool, and R rows of theirs. All int64.

    A sequence of n memory tokens has ceil(n / page) pages; token j lies in its page j // page at j % page.
    Pages may be shared between sequences and stand in any order; what lies in a page past its sequence's end
    is never read. Raises ValueError for dtypes, dimensions and sizes of pages that do not fit.
    """

    memory_lengths: Tensor  # (S,) memory tokens of each sequence
    pages: Tensor  # (sum of ceil(lengths / page),) page numbers, sequence after sequence
    page_times: (
        Tensor  # (P, page) milliseconds, UNKNOWN_TIME where not known; page is a power of two, 16 or more
    )
    row_lengths: Tensor  # (S,) rows of each sequence
    row_prefix: Tensor  # (R,) memory tokens of its own sequence that the row sees; also its position
    row_times: Tensor  # (R,) milliseconds, UNKNOWN_TIME where not known
    _plans: dict[tuple[Any, ...], Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[:6]:
            tensor, dimensions = getattr(self, field.name), 1 + (field.name == "page_times")
            if tensor.dtype != torch.int64 or tensor.dim() != dimensions:
                raise ValueError(
                    f"{field.name} must be int64 of {dimensions} dimension{'s' * (dimensions - 1)}: "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
        for one, other in (("memory_lengths", "row_lengths"), ("row_prefix", "row_times")):
            if len(getattr(self, one)) != len(getattr(self, other)):
                raise ValueError(f"{one} and {other} must be equally long")
        page = self.page_tokens
        if page < LEAST_PAGE or page & (page - 1):
            raise ValueError(f"a page must hold a power of two of tokens, {LEAST_PAGE} or more, not {page}")

    @property
    def page_tokens(self) -> int:
        return self.page_times.shape[1]

    @functools.cached_property
    def row_clock(self) -> Tensor:
        """The rows' times as buckets want them, as `Sight.row_clock`: (R,)."""
        return torch.where(self.row_times == UNKNOWN_TIME, -UNKNOWN_TIME, self.row_times)

    @functools.cached_property
    def page_starts(self) -> Tensor:
        """Where in `pages` each sequence's begin: (S,)."""
        return jagged.starts(page_counts(self.memory_lengths, self.page_tokens))

    @functools.cached_property
    def row_owners(self) -> Tensor:
        """The sequence of each row: (R,)."""
        return jagged.owners(self.row_lengths, len(self.row_prefix))

    def row_places(self) -> tuple[Tensor, Tensor]:
        """Page and place in it where memory token `row_prefix` of each row's sequence lies: (R,) and (R,).

        Rows that are to become memory tokens stand behind what they see, so this is where they are written:
        `k_pages[sight.row_places()] = k`.
        """
        at = self.page_starts[self.row_owners] + self.row_prefix // self.page_tokens
        return self.pages[at], self.row_prefix % self.page_tokens

    def planned(self, build: Callable[..., Plan], *options: Any) -> Plan:
        """`build(self, *options)`: what an implementation derives, once for all layers of a pass."""
        key = (build, *options)
        if key not in self._plans:
            self._plans[key] = build(self, *options)
        return self._plans[key]

    def require_sound(self) -> None:
        """Raises ValueError where numbers disagree.

        A wrong page number would read past the pool's end: worth a GPU's wait, once for all layers.
        """
        self.planned(_require_sound)


def page_counts(lengths: Tensor, page_tokens: int) -> Tensor:
    """How many pages sequences of these lengths take: as `lengths`."""
    return (lengths + page_tokens - 1) // page_tokens


@torch.no_grad()
def paged_attention(
    q: Tensor,  # (R, H, d_qk)
    k_pages: PageTensor,  # (P, page, H, d_qk)
    v_pages: PageTensor,  # (P, page, H, d_v)
    k_self: Tensor,  # (R, H, d_qk)
    v_self: Tensor,  # (R, H, d_v)
    sight: PagedSight,
    position_bias: Tensor | None,  # (position_rows(bits), H)
    time_bias: Tensor | None,  # (TIME_BUCKETS, H)
    alpha: float,
    *,
    softmax: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """`kernels.attention` with its k and v in pages: (R, H, d_v) in fp32, float64 where q is.

    The pages may be views of a larger pool, such as one layer's share of it, with the last dimension whole.
    Pages of another dtype than the queries', and those of int8, are read on a GPU, too, by gathering them.
    Raises ValueError for an unknown implementation and for shapes and lengths that do not fit.
    """
    rows, heads, width = q.shape
    pool, page = sight.page_times.shape
    expected = {
        "rows of the sight": ((len(sight.row_prefix),), (rows,)),
        "k_pages": ((pool, page, heads, width), k_pages.shape),
        "v_pages": ((pool, page, heads, v_pages.shape[-1]), v_pages.shape),
        "k_self": ((rows, heads, width), k_self.shape),
        "v_self": ((rows, heads, v_pages.shape[-1]), v_self.shape),
    }
    if position_bias is not None:
        known = position_rows(position_bits(len(position_bias)))
        expected["position_bias"] = ((known, heads), position_bias.shape)
    if time_bias is not None:
        expected["time_bias"] = ((TIME_BUCKETS, heads), time_bias.shape)
    for what, (wanted, got) in expected.items():
        if wanted != tuple(got):
            raise ValueError(f"{what} must have shape {wanted}, not {tuple(got)}")
    sight.require_sound()
    as_they_are = isinstance(k_pages, Tensor) and k_pages.dtype == q.dtype
    if twins.chosen(q, implementation) == "triton" and as_they_are:
        out: Tensor = twins.triton_module("paged").attention(
            q, k_pages, v_pages, k_self, v_self, sight, position_bias, time_bias, alpha, softmax
        )
        return out
    if q.device.type == "cpu":
        cpu = importlib.import_module("kernels.cpu_paged")
        runs = sight.planned(cpu.plan, heads)
        if runs is not None:
            tables = (position_bias, time_bias)
            out = cpu.attention(q, k_pages, v_pages, k_self, v_self, sight, *tables, alpha, softmax, runs)
            return out
    gathered, places = sight.planned(_gathered)
    k, v = (loaded(pages, places, q.dtype) for pages in (k_pages, v_pages))
    return attention(q, k, v, k_self, v_self, gathered, position_bias, time_bias, alpha, softmax=softmax)


def _gathered(sight: PagedSight) -> tuple[Sight, tuple[Tensor, Tensor]]:
    """The same sight with its memory in one piece, and page and place of each of its M tokens."""
    lengths = sight.memory_lengths
    owner, position = jagged.owners(lengths), jagged.positions(lengths)
    page = sight.pages[sight.page_starts[owner] + position // sight.page_tokens]
    places = page, position % sight.page_tokens
    return (
        Sight(lengths, sight.page_times[places], sight.row_lengths, sight.row_prefix, sight.row_times),
        places,
    )


def _require_sound(sight: PagedSight) -> None:
    lengths, rows, pages, pool = (
        sight.memory_lengths,
        len(sight.row_prefix),
        sight.pages,
        len(sight.page_times),
    )
    # Two reads, not one for each number: a GPU is waited for twice.
    found = (
        (lengths < 0).any() | (sight.row_lengths < 0).any(),
        sight.row_lengths.sum(),
        page_counts(lengths, sight.page_tokens).sum(),
        ((pages < 0) | (pages >= pool)).any(),
    )
    negative, own_rows, needed, foreign = torch.stack([x.long() for x in found]).tolist()
    if negative:
        raise ValueError("lengths must not be negative")
    if own_rows != rows:
        raise ValueError(f"row_lengths do not sum to {rows} rows")
    if needed != len(pages):
        raise ValueError(
            f"sequences of these lengths take {needed} pages of {sight.page_tokens} tokens, not {len(pages)}"
        )
    if foreign:
        raise ValueError(f"page numbers must lie between 0 and {pool - 1}")
    if bool(((sight.row_prefix < 0) | (sight.row_prefix > lengths[sight.row_owners])).any()):
        raise ValueError("a row's prefix must lie between 0 and the number of its sequence's memory tokens")
