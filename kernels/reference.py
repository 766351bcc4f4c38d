"""HSTU's attention in plain PyTorch: the definition that every other implementation is tested against.

    o_i = Σ_{j < prefix_i} SiLU(α q_i·k_j + b(i, j)) v_j  +  SiLU(α q_i·k_self_i + b(i, i)) v_self_i

(Zhai et al. 2024, section 3.1, equation 2, without the division by the length.) With softmax in SiLU's place
the weights of a row, its own included, sum to 1. Rows run in padded blocks:
sequences of similar size side by side, so that the number of PyTorch operations grows with the pairs of
tokens and not with the users. A padded pair has a bias so low that SiLU and its derivative are exactly 0
there, so nothing in a row's sum depends on its block (law 2). Narrow inputs are widened to the tables' dtype.

Works on any device and in float64; differentiable in q, k, v, k_self, v_self and both tables. It keeps the
scores for the backward pass: 12 bytes a visible pair and head.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import jagged
from kernels.buckets import (
    POSITION_BUCKETS,
    TIME_BUCKETS,
    TIME_OFFSET,
    TIME_SHIFT,
    position_bits,
    position_bucket,
    position_rows,
)
from kernels.sight import Sight

BLOCK_PAIRS = 1 << 18  # pairs of a block: one head's scores are 1 MiB of fp32, which a core's L2 cache holds
BLOCK_ROWS = 64  # rows of a sequence in a full block: memory later than the last row's is not computed
WASTE_SHARE = 0.15  # padded pairs a block may carry per real one
WASTE_PAIRS = 1 << 14  # and in any case: computing them takes less time than another block's PyTorch calls
MEMORY_PAIRS = 8  # a padded memory token costs about as much as so many padded pairs
UNSEEN = -1e30  # bias of a pair out of sight: x · sigmoid(x) and its derivative are 0 in every float type


def attention(
    q: Tensor,  # (R, H, d_qk)
    k: Tensor,  # (M, H, d_qk)
    v: Tensor,  # (M, H, d_v)
    k_self: Tensor,  # (R, H, d_qk)
    v_self: Tensor,  # (R, H, d_v)
    sight: Sight,
    position_bias: Tensor | None,  # (position_rows(bits), H)
    time_bias: Tensor | None,  # (TIME_BUCKETS, H)
    alpha: float,
    softmax: bool = False,
) -> Tensor:  # (R, H, d_v) in fp32, or in float64 where q is
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[1]
    q, k, v, k_self, v_self = (x.to(wide) for x in (q, k, v, k_self, v_self))
    if position_bias is None:
        position_bias = q.new_zeros(POSITION_BUCKETS, heads)
    if time_bias is None:
        time_bias = q.new_zeros(TIME_BUCKETS, heads)
    tables = _pair_tables(position_bias.to(wide), time_bias.to(wide))
    own = alpha * (q * k_self).sum(-1) + tables[:, 0]  # (R, H)
    plan = sight.planned(_plan, position_bits(len(position_bias)), heads)

    def to_blocks(rows: Tensor) -> tuple[Tensor, ...]:
        return _Reorder.apply(rows.flatten(0, 1), plan.to_blocks, plan.from_blocks).split(plan.block_rows)

    def to_groups(memory: Tensor) -> tuple[Tensor, ...]:
        return _Reorder.apply(memory.flatten(0, 1), plan.to_groups, plan.from_groups).split(plan.group_memory)

    if not plan.blocks:
        return v_self if softmax else F.silu(own).unsqueeze(-1) * v_self
    qs, ks, vs = to_blocks(q), to_groups(k), to_groups(v)
    owns = to_blocks(own.unsqueeze(-1)) if softmax else ()
    selves = to_blocks(v_self) if softmax else ()
    outputs = []
    for at, (block, q_block) in enumerate(zip(plan.blocks, qs, strict=True)):
        n = block.pairs.shape[2]
        bias = _Lookup.apply(tables, block.pairs)  # (H · b, r, n)
        q_block = q_block.unflatten(0, (len(bias), -1))  # (H · b, r, d_qk)
        k_block = ks[block.group].unflatten(0, (len(bias), -1))[:, :n]  # (H · b, n, d_qk)
        v_block = vs[block.group].unflatten(0, (len(bias), -1))[:, :n]  # (H · b, n, d_v)
        scores = torch.baddbmm(bias, q_block, k_block.transpose(1, 2), alpha=alpha)
        if softmax:
            shape = (len(bias), -1, 1)
            weights = torch.cat((scores, owns[at].view(shape)), 2).softmax(2)
            mine = weights[:, :, n:] * selves[at].unflatten(0, shape[:2])
            outputs.append(torch.baddbmm(mine, weights[:, :, :n], v_block).flatten(0, 1))
        else:
            outputs.append(torch.bmm(F.silu(scores), v_block).flatten(0, 1))
    seen = _Reorder.apply(torch.cat(outputs), plan.from_blocks, plan.to_blocks).view(v_self.shape)
    if not softmax:
        return seen + F.silu(own).unsqueeze(-1) * v_self
    if plan.from_blocks.missing is None:
        return seen
    alone = torch.zeros_like(own).view(-1).index_fill_(0, plan.from_blocks.missing, 1)
    return seen + alone.view(own.shape).unsqueeze(-1) * v_self


def _pair_tables(position_bias: Tensor, time_bias: Tensor) -> Tensor:
    """For each head the bias of every pair of buckets, then that of pairs out of sight: (H, (P + 1) · T)."""
    both = (position_bias.unsqueeze(1) + time_bias).flatten(0, 1)  # (P · T, H)
    unseen = both.new_full((TIME_BUCKETS, both.shape[1]), UNSEEN)
    return torch.cat((both, unseen)).t().contiguous()


@dataclasses.dataclass(frozen=True)
class _Index:
    """Where each element of a reordered array comes from; `missing` ones come from nowhere and are zero."""

    source: Tensor
    missing: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        taken = x.index_select(0, self.source)
        return taken if self.missing is None else taken.index_fill_(0, self.missing, 0)


@dataclasses.dataclass(frozen=True)
class _Block:
    """b sequences' next r rows against the first n memory tokens of each."""

    group: int
    pairs: Tensor  # (b, r, n) int32: each pair's place in a pair table


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The padded blocks of a Sight. A group is the sequences that share blocks; its memory is padded once.

    Indices are those of (element, head) in arrays of (elements · H, width); a block has its heads outermost.
    """

    blocks: tuple[_Block, ...]
    block_rows: list[int]  # padded rows of each block, times heads
    group_memory: list[int]  # padded memory tokens of each group, times heads
    to_blocks: _Index  # rows -> padded rows of all blocks
    from_blocks: _Index  # and back
    to_groups: _Index  # memory -> padded memory of all groups
    from_groups: _Index


class _Reorder(torch.autograd.Function):
    """x taken by one index, its gradient by the inverse: a gather each way, where autograd would scatter-add.

    Padding repeats an element of the same sequence, and the gradient of a repetition is 0 in any case, since
    the pairs it takes part in are out of sight. So the inverse need not add repetitions up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: _Index, back: _Index) -> Tensor:
        ctx.back = back
        ctx.there = there
        return there.take(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back.take(gradient), None, None


class _Lookup(torch.autograd.Function):
    """Each head's table[index] (H · b, r, n); the gradient is a weighted count, faster than a scatter-add."""

    @staticmethod
    def forward(ctx: Any, tables: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = tables.shape
        heads = tables.new_empty(len(tables), index.numel())
        for table, out in zip(tables, heads, strict=True):
            torch.index_select(table, 0, index.view(-1), out=out)
        return heads.view(-1, *index.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        heads, size = ctx.shape
        counts = [torch.bincount(index.view(-1), g, minlength=size) for g in gradient.reshape(heads, -1)]
        return torch.stack(counts).to(gradient.dtype), None


def _plan(sight: Sight, bits: int, heads: int) -> _Plan:
    row_lengths, seen = sight.row_lengths.tolist(), _seen(sight)
    row_starts, memory_starts = jagged.starts(sight.row_lengths), jagged.starts(sight.memory_lengths)
    bases = _position_bases(max(seen, default=0), bits, sight.row_prefix.device)
    rows, memory = _Padding(heads), _Padding(heads)
    blocks: list[_Block] = []
    for group, members in enumerate(_groups(row_lengths, seen)):
        width, longest = max(seen[s] for s in members), max(row_lengths[s] for s in members)
        member = torch.tensor(members, device=bases.device)
        memory_index, _ = memory.add(memory_starts, sight.memory_lengths, member, 0, width)
        times = sight.memory_times[memory_index]  # (b, width)
        step = max(BLOCK_ROWS, BLOCK_PAIRS // (len(members) * width))
        for first in range(0, longest, step):
            index, real = rows.add(
                row_starts, sight.row_lengths, member, first, min(first + step, longest)
            )  # (b, r)
            prefix = sight.row_prefix[index] * real  # a padded row sees nothing
            n = max(int(prefix.max()), 1)
            blocks.append(_Block(group, _pairs(prefix, sight.row_clock[index], times[:, :n], bases)))
    to_blocks, from_blocks = rows.both_ways(len(sight.row_prefix))
    to_groups, from_groups = memory.both_ways(len(sight.memory_times))
    return _Plan(tuple(blocks), rows.sizes, memory.sizes, to_blocks, from_blocks, to_groups, from_groups)


def _position_bases(longest: int, bits: int, device: torch.device) -> Tensor:
    """For each p_i - p_j + longest: where its bucket starts in a pair table, less the time offset."""
    difference = torch.arange(-longest, longest + 1, device=device)
    bucket = torch.where(difference > 0, position_bucket(difference, bits), position_rows(bits))
    return (bucket * TIME_BUCKETS - TIME_OFFSET).to(torch.int32)


def _pairs(prefix: Tensor, row_times: Tensor, memory_times: Tensor, bases: Tensor) -> Tensor:
    """Each pair's place in a pair table: (b, r, n) int32 from (b, r), (b, r) and (b, n)."""
    column = torch.arange(memory_times.shape[1], dtype=torch.int32, device=prefix.device)
    difference = (prefix + len(bases) // 2).to(torch.int32).unsqueeze(2) - column
    passed = (row_times.unsqueeze(2) - memory_times.unsqueeze(1)).to(torch.float32)
    # buckets.time_bucket, in place, its offset being in the bases already
    pairs = (passed.view(torch.int32) >> TIME_SHIFT).clamp_(TIME_OFFSET, TIME_OFFSET + TIME_BUCKETS - 1)
    return pairs.add_(bases.index_select(0, difference.view(-1)).view(difference.shape))


def _seen(sight: Sight) -> list[int]:
    """The most memory tokens that a row of each sequence sees. Raises ValueError where numbers disagree."""
    rows, memory = len(sight.row_prefix), len(sight.memory_times)
    if int(sight.row_lengths.sum()) != rows or int(sight.memory_lengths.sum()) != memory:
        raise ValueError(f"the lengths do not sum to {rows} rows and {memory} memory tokens")
    owner = jagged.owners(sight.row_lengths, rows)
    prefix = sight.row_prefix
    if bool(((prefix < 0) | (prefix > sight.memory_lengths[owner])).any()):
        raise ValueError("a row's prefix must lie between 0 and the number of its sequence's memory tokens")
    return torch.zeros_like(sight.memory_lengths).scatter_reduce_(0, owner, prefix, "amax").tolist()


def _groups(row_lengths: list[int], seen: list[int]) -> list[list[int]]:
    """Sequences that may share blocks: similar in rows and in memory seen, and not too many."""
    groups: list[list[int]] = []
    real = widest = longest = 0
    # Rows by octave: within one, padding costs at most half, and the waste below bounds it further.
    some = (s for s in range(len(seen)) if seen[s])
    for s in sorted(some, key=lambda s: (row_lengths[s].bit_length(), seen[s])):
        rows, width = max(longest, row_lengths[s]), max(widest, seen[s])
        real += (row_lengths[s] + MEMORY_PAIRS) * seen[s]
        count = len(groups[-1]) + 1 if groups else 1
        waste = count * (rows + MEMORY_PAIRS) * width - real
        if (
            not groups
            or count * min(rows, BLOCK_ROWS) * width > BLOCK_PAIRS
            or waste > max(WASTE_SHARE * real, WASTE_PAIRS)
        ):
            groups.append([])
            rows, width = row_lengths[s], seen[s]
            real = (rows + MEMORY_PAIRS) * width
        groups[-1].append(s)
        longest, widest = rows, width
    return groups


class _Padding:
    """Collects where the elements of padded blocks come from, block after block."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.sources: list[Tensor] = []
        self.real: list[Tensor] = []

    def add(
        self, starts: Tensor, lengths: Tensor, member: Tensor, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        """Elements [first, last) of each member, its last one repeated past its end, and which are real.

        Both (b, last - first).
        """
        columns = torch.arange(first, last, device=starts.device)
        length = lengths[member].unsqueeze(1)
        index = starts[member].unsqueeze(1) + columns.minimum(length - 1)
        real = columns < length
        head = torch.arange(self.heads, device=starts.device).view(-1, 1, 1)
        self.sources.append(index * self.heads + head)  # (H, b, last - first)
        self.real.append(real.expand(self.heads, -1, -1))
        return index, real

    @property
    def sizes(self) -> list[int]:
        return [source.numel() for source in self.sources]

    def both_ways(self, total: int) -> tuple[_Index, _Index]:
        """The index into the padded blocks and the one back to the `total` elements' heads."""
        if not self.sources:
            nothing = torch.empty(0, dtype=torch.int64)
            return _Index(nothing, None), _Index(nothing, None)
        source = torch.cat([s.flatten() for s in self.sources])
        real = torch.cat([r.flatten() for r in self.real]).nonzero().squeeze(1)
        inverse = source.new_full((total * self.heads,), -1)
        inverse[source[real]] = real
        missing = (inverse < 0).nonzero().squeeze(1)
        return _Index(source, None), _Index(inverse.clamp_(min=0), missing if len(missing) else None)
