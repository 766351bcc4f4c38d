"""`kernels.paged` on a CPU where rows come in runs that see the same: a micro-batch of candidates is one run.

    o_i = Σ_{j < n} SiLU(α q_i·k_j + b_j) v_j  +  SiLU(α q_i·k_self_i + b_self) v_self_i

All rows of a run have one prefix n and one time, so the bias is a vector over the memory tokens. That makes
a run's scores a linear layer with a bias and a SiLU behind it, which oneDNN computes in one go without the
scores leaving the registers; the sum over v is a second product. Where a pool has its heads outermost, a
history whose pages follow one another is read where it lies; others are copied, once a sequence and layer.

Rows are cut so that their weights stay in a cache. No row's sum depends on the others (law 2).
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import jagged
from kernels.buckets import position_bits, position_bucket, time_bucket
from kernels.matmul import matmul, silu_matmul
from kernels.paged import PagedSight, PageTensor, Scaled, page_counts

CACHED_WEIGHTS = (
    1 << 20
)  # of a head at once: 4 MiB of fp32. Fewer, and products are too small; more, and L3 is full
LEAST_ROWS = 32  # at once, however long the history
# Rows that follow one another in a history have each a run of its own. Beyond so many runs a sequence the
# blocks of `kernels.cpu`, which look a bias up for each pair, are faster.
MOST_RUNS = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """Rows [first, last) of sequence `of`, which all see its first n tokens, at `start` among the biases."""

    of: int
    first: int
    last: int
    n: int
    start: int


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    runs: tuple[Run, ...]
    pages: tuple[Tensor, ...]  # of each sequence (·,) int64
    first: tuple[int | None, ...]  # of each sequence's pages, if they follow one another
    distances: Tensor  # (sum of n over runs,) of each run's rows to the tokens it sees
    passed: Tensor  # (sum of n,) milliseconds


def plan(sight: PagedSight, heads: int) -> Plan | None:
    """How the rows fall into runs; None where there are too many of them for this to be worth it."""
    lengths, prefix, clock = sight.row_lengths.tolist(), sight.row_prefix, sight.row_clock
    rows = len(prefix)
    owner = sight.row_owners
    begins = torch.ones(rows, dtype=torch.bool)
    if rows > 1:
        same = (prefix[1:] == prefix[:-1]) & (clock[1:] == clock[:-1]) & (owner[1:] == owner[:-1])
        begins[1:] = ~same
    firsts = begins.nonzero().squeeze(1)
    if len(firsts) > MOST_RUNS * max(1, sum(1 for length in lengths if length)):
        return None
    of, sees = owner[firsts], prefix[firsts]
    bounds = [*firsts.tolist(), rows]
    runs, start = [], 0
    for i, (sequence, n) in enumerate(zip(of.tolist(), sees.tolist(), strict=True)):
        runs.append(Run(sequence, bounds[i], bounds[i + 1], n, start))
        start += n
    run = jagged.owners(sees, start)
    token = jagged.positions(sees, start)
    page = sight.pages[sight.page_starts[of[run]] + token // sight.page_tokens]
    times = sight.page_times[page, token % sight.page_tokens]
    own = sight.pages.split(page_counts(sight.memory_lengths, sight.page_tokens).tolist())
    first = tuple(int(p[0]) if len(p) and bool((p.diff() == 1).all()) else None for p in own)
    return Plan(tuple(runs), own, first, sees[run] - token, clock[firsts][run] - times)


def attention(
    q: Tensor,  # (R, H, d_qk)
    k_pages: PageTensor,  # (P, page, H, d_qk)
    v_pages: PageTensor,  # (P, page, H, d_v)
    k_self: Tensor,
    v_self: Tensor,
    sight: PagedSight,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    alpha: float,
    softmax: bool,
    planned: Plan,
) -> Tensor:
    """(R, H, d_v) in fp32, float64 where q is."""
    rows, heads, width = v_self.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    bias, own_bias = _bias(sight, planned, position_bias, time_bias, heads, q.dtype)
    asked = torch.mul(q.transpose(0, 1), alpha).contiguous()  # (H, R, d_qk)
    own = alpha * (q.to(wide) * k_self).sum(-1) + own_bias  # (R, H)
    out = torch.empty(rows, heads, width, dtype=wide)
    memory: dict[int, list[Tensor]] = {}
    weigh = _softmax if softmax else _silu
    for run in planned.runs:
        if run.of not in memory:
            memory[run.of] = [_by_head(x, planned, run.of, q.dtype) for x in (k_pages, v_pages)]
        k, v = (x[:, : run.n] for x in memory[run.of])
        weigh(run, asked, k, v, bias[:, run.start : run.start + run.n], own, out)
    if softmax:  # what was summed so far has its share already; `own` has become its own pair's
        return out.addcmul_(own.unsqueeze(-1), v_self.to(wide))
    return out.addcmul_(F.silu(own).unsqueeze(-1), v_self.to(wide))


def _silu(run: Run, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, own: Tensor, out: Tensor) -> None:
    if not run.n:
        out[run.first : run.last] = 0
        return
    step = _step(run)
    for head in range(len(q)):
        for first in range(run.first, run.last, step):
            rows = slice(first, min(first + step, run.last))
            weights = silu_matmul(q[head, rows], k[head].t(), bias[head])
            out[rows, head] = matmul(weights, v[head])


def _softmax(run: Run, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, own: Tensor, out: Tensor) -> None:
    if not run.n:
        out[run.first : run.last] = 0
        own[run.first : run.last] = 1
        return
    step = _step(run)
    for head in range(len(q)):
        for first in range(run.first, run.last, step):
            rows = slice(first, min(first + step, run.last))
            scores = matmul(q[head, rows], k[head].t(), bias[head]).to(own.dtype)
            mine = own[rows, head].unsqueeze(1)
            most = torch.maximum(scores.amax(1, keepdim=True), mine)
            weights, mine = scores.sub_(most).exp_(), (mine - most).exp_()
            total = weights.sum(1, keepdim=True) + mine
            out[rows, head] = matmul(weights.to(v.dtype), v[head]).to(own.dtype) / total
            own[rows, head] = (mine / total).squeeze(1)


def _step(run: Run) -> int:
    """Rows at once: as many as keep the weights in a cache, in equal parts."""
    count = run.last - run.first
    most = max(LEAST_ROWS, CACHED_WEIGHTS // run.n)
    return -(-count // -(-count // most))


def _by_head(pages: PageTensor, planned: Plan, sequence: int, dtype: torch.dtype) -> Tensor:
    """The tokens of a sequence's pages (P, page, H, d), each head's in one piece: (H, tokens, d)."""
    if isinstance(pages, Scaled):
        parts = (_chosen(x, planned, sequence) for x in (pages.values, pages.scales))
        values, scales = (x.flatten(1, 2) for x in parts)
        return (values * scales.unsqueeze(-1)).to(dtype)
    return _chosen(pages, planned, sequence).flatten(1, 2).to(dtype)


def _chosen(pages: Tensor, planned: Plan, sequence: int) -> Tensor:
    """A sequence's pages, heads outermost: (H, ·, page, …)."""
    outside = pages.movedim(2, 0)  # (H, P, page, …)
    first, own = planned.first[sequence], planned.pages[sequence]
    if first is not None and outside.is_contiguous():
        return outside[:, first : first + len(own)]
    return outside.index_select(1, own)


def _buckets(sight: PagedSight, planned: Plan, bits: int) -> tuple[Tensor, Tensor]:
    """Each seen token's buckets, for all layers: (sum of n,) and (sum of n,)."""
    position = position_bucket(planned.distances, bits) if bits else planned.distances
    return position, time_bucket(planned.passed)


def _bias(
    sight: PagedSight,
    planned: Plan,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The bias of each run's rows on the tokens that they see (H, sum of n), and of own pairs (H,)."""
    bits = 0 if position_bias is None else position_bits(len(position_bias))
    position, time = sight.planned(_buckets, planned, bits)
    bias = torch.zeros(len(position), heads)
    own = bias.new_zeros(heads)
    for table, bucket in ((position_bias, position), (time_bias, time)):
        if table is not None:
            bias = bias + table.index_select(0, bucket)
            own = own + table[0]
    return bias.t().to(dtype).contiguous(), own
