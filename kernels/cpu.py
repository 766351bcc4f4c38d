"""HSTU's attention on a CPU: cache-sized blocks without padding to the longest user, scores never kept.

What it computes is `kernels.reference`'s. The forward pass walks the blocks of `kernels.cpu_blocks`; the
backward pass walks them again and makes each block's scores anew, so that nothing of the size of the pairs
outlives a block. All temporaries of a block lie in buffers that every block uses again.

Matrices are multiplied in the queries' dtype (bf16 where the machine has instructions for it is about four
times faster than fp32); scores, their SiLU or softmax and all sums outside a matrix product are fp32. With
bf16 the scores, the weights and their gradients pass through bf16 on their way, a relative error of 2^-9
each. float64 runs too, in float64.

`forward` and `backward` are without autograd, for a layer that decides itself what it keeps.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.buckets import position_bits
from kernels.cpu_blocks import Block, Index, Plan, plan
from kernels.sight import Sight

UNSEEN = -1e30  # bias of a pair out of sight: SiLU, exp and their derivatives are 0 there in every float type

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


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
    arguments = (q, k, v, k_self, v_self, sight, position_bias, time_bias, alpha, softmax)
    out: Tensor = _Attention.apply(*arguments)
    return out


class _Attention(torch.autograd.Function):
    """Keeps its arguments and, for the softmax, its result and a number a row and head."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.alpha, ctx.softmax = arguments
        ctx.sight = tensors.pop(5)
        out, lse = forward(*arguments)
        ctx.save_for_backward(*tensors, out if ctx.softmax else None, lse)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, v, k_self, v_self, position_bias, time_bias, out, lse = ctx.saved_tensors
        tables = position_bias, time_bias
        grads = backward(
            gradient, out, lse, q, k, v, k_self, v_self, ctx.sight, *tables, ctx.alpha, softmax=ctx.softmax
        )
        return *grads[:5], None, *grads[5:], None, None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    sight: Sight,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    alpha: float,
    softmax: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The result (R, H, d_v) and, with softmax alone, each row's log of the sum of exp(score): (R, H)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    work = _Work(sight, q.shape[1], position_bias, time_bias, q.dtype, wide)
    own = alpha * (q.to(wide) * k_self).sum(-1) + work.own_bias  # (R, H)
    if not work.plan.blocks:
        return (v_self.to(wide), own) if softmax else (F.silu(own).unsqueeze(-1) * v_self, None)
    qs = _flat(q).index_select(0, work.plan.to_blocks.source)
    ks, vs = (_flat(x).index_select(0, work.plan.to_groups.source) for x in (k, v))
    outs = vs.new_empty(len(qs), vs.shape[-1])
    lses = own.new_empty(len(qs), 1)
    owns = own.view(-1, 1).index_select(0, work.plan.to_blocks.source) if softmax else lses
    for block, _, k_block, v_block in work.blocks(ks, vs):
        scores = work.scores(block, work.part(qs, block), k_block, alpha)
        if softmax:
            lse, mine = work.part(lses, block), work.part(owns, block)
            torch.maximum(torch.amax(scores, 2, keepdim=True), mine, out=lse)
            total = scores.sub_(lse).exp_().sum(2, keepdim=True).add_((mine - lse).exp_())
            weights = scores.div_(total)
            lse.add_(total.log_())
        else:
            weights = torch.ops.aten.silu.out(scores, out=work.buffer("weights", scores.shape, wide))
        torch.bmm(work.narrow(weights), v_block, out=work.part(outs, block))
    out = work.plan.from_blocks.take(outs).view(v_self.shape).to(wide)
    if not softmax:
        return out.add_(F.silu(own).unsqueeze(-1) * v_self), None
    lse = _restored(work.plan.from_blocks, lses, own)
    return out.add_((own - lse).exp_().unsqueeze(-1) * v_self), lse


def backward(
    gradient: Tensor,  # (R, H, d_v)
    out: Tensor | None,  # what `forward` gave; needed for the softmax alone
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    sight: Sight,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    alpha: float,
    softmax: bool = False,
) -> Gradients:
    """The gradients of q, k, v, k_self, v_self and both tables, each in its argument's dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    work = _Work(sight, q.shape[1], position_bias, time_bias, q.dtype, wide)
    own = alpha * (q.to(wide) * k_self).sum(-1) + work.own_bias  # (R, H)
    d_own = (gradient * v_self).sum(-1)  # of the own pair's weight, and then of its score
    common = None
    if softmax:
        assert out is not None
        assert lse is not None
        weight = (own - lse).exp_()
        common = (gradient * out).sum(-1)
        d_own.sub_(common).mul_(weight)
    else:
        weight = F.silu(own)
        d_own = torch.ops.aten.silu_backward(d_own, own)
    d_v_self = (weight.unsqueeze(-1) * gradient).to(v_self.dtype)
    d_scaled = (alpha * d_own).unsqueeze(-1)
    d_k_self = (d_scaled * q).to(k_self.dtype)
    d_q = d_scaled * k_self
    work.count_own(d_own)
    if not work.plan.blocks:
        return d_q.to(q.dtype), torch.zeros_like(k), torch.zeros_like(v), d_k_self, d_v_self, *work.tables()
    to_blocks = work.plan.to_blocks.source
    qs = _flat(q).index_select(0, to_blocks)
    ks, vs = (_flat(x).index_select(0, work.plan.to_groups.source) for x in (k, v))
    gs = work.plan.padded(_flat(gradient.to(q.dtype)), 0)
    lses = commons = None
    if lse is not None and common is not None:
        lses = work.plan.padded(lse.view(-1, 1), math.inf)  # repetitions weigh nothing, whatever they see
        commons = work.plan.padded(common.view(-1, 1), 0)
    d_qs = torch.empty_like(qs)
    d_ks, d_vs = ks.new_zeros(ks.shape, dtype=wide), vs.new_zeros(vs.shape, dtype=wide)
    for block, place, k_block, v_block in work.blocks(ks, vs):
        q_block, g_block = work.part(qs, block), work.part(gs, block)
        scores = work.scores(block, q_block, k_block, alpha)
        d_weights = work.product("d_weights", g_block, v_block.transpose(1, 2))
        if lses is not None and commons is not None:
            weights = scores.sub_(work.part(lses, block)).exp_()
            d_scores = d_weights.sub_(work.part(commons, block)).mul_(weights)
        else:
            weights = torch.ops.aten.silu.out(scores, out=work.buffer("weights", scores.shape, wide))
            d_scores = torch.ops.aten.silu_backward.grad_input(d_weights, scores, grad_input=d_weights)
        work.count(block, d_scores)
        n = d_scores.shape[2]
        work.add_into(d_vs, place, n, work.narrow(weights), g_block)
        d_scores = work.narrow(d_scores)
        work.add_into(d_ks, place, n, d_scores, q_block)
        torch.bmm(d_scores, k_block, out=work.part(d_qs, block))
    d_q.add_(work.plan.from_blocks.take(d_qs).view(q.shape), alpha=alpha)
    d_k = work.plan.from_groups.take(d_ks.mul_(alpha)).view(k.shape).to(k.dtype)
    d_v = work.plan.from_groups.take(d_vs).view(v.shape).to(v.dtype)
    return d_q.to(q.dtype), d_k, d_v, d_k_self, d_v_self, *work.tables()


def _flat(x: Tensor) -> Tensor:
    """(elements, H, width) as the plan's indices count them: (elements · H, width)."""
    return x.reshape(-1, x.shape[-1])


def _restored(index: Index, x: Tensor, otherwise: Tensor) -> Tensor:
    """Blocks' (rows, 1) to (R, H), rows without a block as in `otherwise`."""
    taken = x.view(-1).index_select(0, index.source)
    if index.missing is not None:
        taken.index_copy_(0, index.missing, otherwise.view(-1)[index.missing])
    return taken.view(otherwise.shape)


class _Work:
    """One pass over the blocks: the plan, the pair table, its gradient so far, and the buffers."""

    def __init__(
        self,
        sight: Sight,
        heads: int,
        position_bias: Tensor | None,
        time_bias: Tensor | None,
        dtype: torch.dtype,
        wide: torch.dtype,
    ) -> None:
        bits = 0 if position_bias is None else position_bits(len(position_bias))
        self.plan: Plan = sight.planned(plan, bits, time_bias is not None, heads)
        self.heads, self.dtype, self.wide = heads, dtype, wide
        self.position_bias, self.time_bias = position_bias, time_bias
        device = sight.row_prefix.device
        zero = torch.zeros(1, heads, dtype=wide, device=device)
        position = zero if position_bias is None else position_bias[: self.plan.position_rows].to(wide)
        time = zero if time_bias is None else time_bias.to(wide)
        self.shape = (len(position) + 1, len(time), heads)
        table = torch.cat((position.unsqueeze(1) + time, zero.new_full((1, *self.shape[1:]), UNSEEN)))
        self.table = table.flatten(0, 1).t().contiguous()  # (H, (P + 1) · T)
        self.own_bias = self.table[:, 0]
        self.counts = zero.new_zeros(self.table.shape, dtype=torch.float64)
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that the next block uses again."""
        size = 1
        for length in shape:
            size *= length
        held = self.buffers.get((name, dtype))
        if held is None or held.numel() < size:
            held = self.buffers[name, dtype] = self.table.new_empty(size, dtype=dtype)
        return held[:size].view(shape)

    def blocks(self, ks: Tensor, vs: Tensor) -> Iterator[tuple[Block, slice, Tensor, Tensor]]:
        """Each block with where its group's memory lies and the k and v that it sees: (H · b, n, width)."""
        for block in self.plan.blocks:
            group = self.plan.groups[block.group]
            shape, n = (self.heads * group.sequences, -1), block.pairs.shape[2]
            k, v = (x[group.memory].unflatten(0, shape)[:, :n] for x in (ks, vs))
            yield block, group.memory, k, v

    def part(self, x: Tensor, block: Block) -> Tensor:
        """A block's rows: (H · b, r, width)."""
        return x[block.rows].unflatten(0, (-1, block.pairs.shape[1]))

    def scores(self, block: Block, q: Tensor, k: Tensor, alpha: float) -> Tensor:
        """(H · b, r, n) in fp32 or wider, UNSEEN out of sight."""
        shape = (len(q), *block.pairs.shape[1:])
        scores = self.buffer("scores", shape, self.wide)
        shared = len(block.pairs) * self.heads < len(q)
        bias = self.buffer("bias", (self.heads, *block.pairs.shape), self.wide) if shared else scores
        for table, head in zip(self.table, bias.view(self.heads, -1), strict=True):
            torch.index_select(table, 0, block.pairs.view(-1), out=head)
        if self.dtype == self.wide:
            if shared:
                scores.view(self.heads, -1, *shape[1:]).copy_(bias)
            return scores.baddbmm_(q, k.transpose(1, 2), alpha=alpha)
        product = self.product("product", q, k.transpose(1, 2))
        by_head = (self.heads, -1, *shape[1:])
        torch.add(bias.view(by_head), product.view(by_head), alpha=alpha, out=scores.view(by_head))
        return scores

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a @ b in a buffer, made wide."""
        shape = (len(a), a.shape[1], b.shape[2])
        out = torch.bmm(a, b, out=self.buffer(name, shape, self.dtype))
        return out if self.dtype == self.wide else self.buffer(name, shape, self.wide).copy_(out)

    def narrow(self, x: Tensor) -> Tensor:
        """x as matrix products take it."""
        return x if self.dtype == self.wide else self.buffer("narrow", x.shape, self.dtype).copy_(x)

    def add_into(self, total: Tensor, place: slice, n: int, pairs: Tensor, rows: Tensor) -> None:
        """Adds each sequence's pairsᵀ @ rows to the first n memory tokens of its group's sum."""
        shape = (len(pairs), n, rows.shape[2])
        out = torch.bmm(pairs.transpose(1, 2), rows, out=self.buffer("sum", shape, self.dtype))
        total[place].unflatten(0, (len(pairs), -1))[:, :n].add_(out)

    def count(self, block: Block, d_scores: Tensor) -> None:
        """Adds a block's part of the pair table's gradient."""
        if self.position_bias is None and self.time_bias is None:
            return
        by_head = d_scores.view(self.heads, -1, block.pairs[0].numel())
        if by_head.shape[1] > len(block.pairs):
            by_head = by_head.sum(1, keepdim=True)
        for counts, weights in zip(self.counts, by_head, strict=True):
            size = len(counts)
            counts += torch.bincount(block.pairs.view(-1), weights.reshape(-1), minlength=size)

    def count_own(self, d_own: Tensor) -> None:
        """The same for rows' own pairs, which lie in the first bucket of both tables."""
        self.counts[:, 0] += d_own.sum(0)

    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of both tables."""
        counts = self.counts.t().view(self.shape)[:-1]  # (P, T, H)
        d_position, d_time = None, None
        if self.position_bias is not None:
            d_position = torch.zeros_like(self.position_bias)
            d_position[: len(counts)] = counts.sum(1)
        if self.time_bias is not None:
            d_time = counts.sum(0).to(self.time_bias.dtype)
        return d_position, d_time
