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
from kernels.cpu_blocks import Block, Plan, plan, rows_are_memory
from kernels.sight import Sight

UNSEEN = -1e30  # bias of a pair out of sight: SiLU, exp and their derivatives are 0 there in every float type

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


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
    work = _Work(q, k, v, k_self, v_self, sight, position_bias, time_bias)
    wide, plan = work.wide, work.plan
    own = None if work.itself else work.own_scores(q, k_self, alpha)  # (R, H)
    if not plan.blocks:
        own = work.own_scores(q, k_self, alpha)
        return (v_self.to(wide), own) if softmax else (F.silu(own).unsqueeze(-1) * v_self, None)
    qs, ks, vs = plan.rows.take(q), plan.memory.take(k), plan.memory.take(v)
    outs = vs.new_empty(len(qs), v.shape[2])
    lses = outs.new_empty(len(qs), 1, dtype=wide) if softmax else None
    owns = plan.rows.take(own.unsqueeze(-1)) if softmax and own is not None else None
    for block, q_block, k_block, v_block, out, lse, mine in work.blocks(ks, vs, qs, outs, lses, owns):
        scores = work.scores(block, q_block, k_block, alpha)
        if softmax:
            torch.amax(scores, 2, keepdim=True, out=lse)
            if mine is not None:
                torch.maximum(lse, mine, out=lse)
            total = scores.sub_(lse).exp_().sum(2, keepdim=True)
            if mine is not None:
                total += (mine - lse).exp_()
            weights = scores.div_(total)
            lse.add_(total.log_())
        else:
            weights = torch.ops.aten.silu.out(scores, out=scores)
        torch.bmm(work.narrow(weights), v_block, out=out)
    out = plan.rows.give_back(outs).view(v_self.shape).to(wide)
    if not softmax:
        return out if own is None else out.add_(F.silu(own).unsqueeze(-1) * v_self), None
    assert lses is not None
    lse = plan.rows.give_back(lses, None if own is None else own.view(-1, 1)).view(q.shape[:2])
    return out if own is None else out.add_((own - lse).exp_().unsqueeze(-1) * v_self), lse


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
    """The gradients of q, k, v, k_self, v_self and both tables, each in its argument's dtype.

    Those of k_self and v_self are None where these are k and v themselves: then the latters' have all of it.
    """
    work = _Work(q, k, v, k_self, v_self, sight, position_bias, time_bias)
    wide, plan = work.wide, work.plan
    common = None
    if softmax:
        assert out is not None
        common = (gradient * out).sum(-1)
    own_pairs = (
        work.own_gradients(gradient, q, k_self, v_self, alpha, common, lse) if not work.itself else None
    )
    if not plan.blocks:
        d_q, d_k_self, d_v_self = own_pairs or (torch.zeros_like(q), None, None)
        return d_q.to(q.dtype), torch.zeros_like(k), torch.zeros_like(v), d_k_self, d_v_self, *work.tables()
    qs, ks, vs = plan.rows.take(q), plan.memory.take(k), plan.memory.take(v)
    gs = plan.rows.take(gradient.to(q.dtype), 0)
    lses = commons = None
    if lse is not None and common is not None:
        lses = plan.rows.take(lse.unsqueeze(-1), math.inf)  # repetitions weigh nothing, whatever they see
        commons = plan.rows.take(common.unsqueeze(-1), 0)
    d_qs = torch.empty_like(qs)
    d_ks, d_vs = (torch.empty_like(x, dtype=wide) for x in (ks, vs))
    k_sums, v_sums = work.by_group(d_ks), work.by_group(d_vs)
    for block, q_block, k_block, v_block, g_block, d_q_block, lse_block, common_block in work.blocks(
        ks, vs, qs, gs, d_qs, lses, commons
    ):
        scores = work.scores(block, q_block, k_block, alpha)
        d_weights = work.product(g_block, v_block.transpose(1, 2))
        if softmax:
            weights = scores.sub_(lse_block).exp_()
            d_scores = d_weights.sub_(common_block).mul_(weights)
        else:
            weights = torch.ops.aten.silu.out(scores, out=work.buffer("weights", scores.shape, wide))
            d_scores = torch.ops.aten.silu_backward.grad_input(d_weights, scores, grad_input=d_weights)
        work.count(block, d_scores)
        work.add_into(v_sums[block.group], block, work.narrow(weights), g_block)
        d_scores = work.narrow(d_scores)
        work.add_into(k_sums[block.group], block, d_scores, q_block)
        torch.bmm(d_scores, k_block, out=d_q_block)
    d_q = plan.rows.give_back(d_qs).view(q.shape)
    d_k = plan.memory.give_back(d_ks).view(k.shape).mul_(alpha)
    d_v = plan.memory.give_back(d_vs).view(v.shape)
    d_k_self = d_v_self = None
    if own_pairs is None:
        d_q = d_q.mul_(alpha)
    else:
        own_d_q, d_k_self, d_v_self = own_pairs
        d_q = own_d_q.add_(d_q, alpha=alpha)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_k_self, d_v_self, *work.tables()


class _Work:
    """One pass over the blocks: the plan, the pair table, its gradient so far, and the buffers."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_self: Tensor,
        v_self: Tensor,
        sight: Sight,
        position_bias: Tensor | None,
        time_bias: Tensor | None,
    ) -> None:
        self.heads = heads = q.shape[1]
        self.dtype = q.dtype
        self.wide = wide = torch.promote_types(q.dtype, torch.float32)
        self.position_bias, self.time_bias = position_bias, time_bias
        # Whether the rows are the memory, so that a row's own pair is one among the others.
        self.itself = _same(k, k_self) and _same(v, v_self) and sight.planned(rows_are_memory)
        bits = 0 if position_bias is None else position_bits(len(position_bias))
        self.plan: Plan = sight.planned(plan, bits, time_bias is not None, heads, self.itself)
        zero = torch.zeros(1, heads, dtype=wide)
        position = zero if position_bias is None else position_bias[: self.plan.position_rows].to(wide)
        time = zero if time_bias is None else time_bias.to(wide)
        self.shape = (len(position) + 1, len(time), heads)
        table = torch.cat((position.unsqueeze(1) + time, zero.new_full((1, *self.shape[1:]), UNSEEN)))
        self.table = table.flatten(0, 1).t().contiguous()  # (H, (P + 1) · T)
        self.by_head = self.table.unbind()
        self.counts = torch.zeros(self.table.shape, dtype=torch.float64)
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        largest = max((b.sequences * b.rows * b.seen for b in self.plan.blocks), default=0)
        self.largest = largest * heads

    def own_scores(self, q: Tensor, k_self: Tensor, alpha: float) -> Tensor:
        """The scores of rows' own pairs: (R, H). They lie in the first bucket of both tables."""
        return alpha * (q.to(self.wide) * k_self).sum(-1) + self.table[:, 0]

    def own_gradients(
        self,
        gradient: Tensor,
        q: Tensor,
        k_self: Tensor,
        v_self: Tensor,
        alpha: float,
        common: Tensor | None,
        lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What rows' own pairs add to the gradients of q (in a wide dtype), k_self and v_self."""
        own = self.own_scores(q, k_self, alpha)
        d_own = (gradient * v_self).sum(-1)  # of the own pair's weight, and then of its score
        if common is not None and lse is not None:
            weight = (own - lse).exp_()
            d_own.sub_(common).mul_(weight)
        else:
            weight = F.silu(own)
            d_own = torch.ops.aten.silu_backward(d_own, own)
        self.counts[:, 0] += d_own.sum(0)
        d_scaled = (alpha * d_own).unsqueeze(-1)
        d_v_self = (weight.unsqueeze(-1) * gradient).to(v_self.dtype)
        return d_scaled * k_self, (d_scaled * q).to(k_self.dtype), d_v_self

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that the next block uses again."""
        held = self.buffers.get((name, dtype))
        if held is None:
            held = self.buffers[name, dtype] = torch.empty(self.largest, dtype=dtype)
        _, rows, columns = shape
        return held.as_strided(shape, (rows * columns, columns, 1))

    def by_group(self, memory: Tensor) -> list[Tensor]:
        """Memory in places, by group: (H · b, width, ·)."""
        parts = memory.split(self.plan.group_places)
        return [x.view(-1, n, x.shape[1]) for x, n in zip(parts, self.plan.widths, strict=True)]

    def blocks(self, ks: Tensor, vs: Tensor, *rows: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Each block, its rows of the first of `rows`, the k and v that they see, and its other rows.

        All (H · b, r or n, ·).
        """
        k_groups, v_groups = self.by_group(ks), self.by_group(vs)
        parts = [None if x is None else x.split(self.plan.block_places) for x in rows]
        for at, block in enumerate(self.plan.blocks):
            k, v = k_groups[block.group], v_groups[block.group]
            if block.seen < k.shape[1]:
                k, v = k[:, : block.seen], v[:, : block.seen]
            shape = (-1, block.rows)
            first, *others = (None if x is None else x[at].view(*shape, x[at].shape[1]) for x in parts)
            yield block, first, k, v, *others

    def scores(self, block: Block, q: Tensor, k: Tensor, alpha: float) -> Tensor:
        """(H · b, r, n) in fp32 or wider, UNSEEN out of sight."""
        shape = (len(q), block.rows, block.seen)
        scores = self.buffer("scores", shape, self.wide)
        pairs = len(block.pairs)
        copies = scores.numel() // self.heads // pairs
        bias = scores if copies == 1 else self.buffer("bias", (self.heads, 1, pairs), self.wide)
        for head, table in enumerate(self.by_head):
            torch.index_select(table, 0, block.pairs, out=bias.as_strided((pairs,), (1,), head * pairs))
        by_head = (self.heads, copies, pairs)
        if self.dtype == self.wide:
            if copies > 1:
                scores.view(by_head).copy_(bias)
            return scores.baddbmm_(q, k.transpose(1, 2), alpha=alpha)
        product = torch.bmm(q, k.transpose(1, 2), out=self.buffer("product", shape, self.dtype))
        bias = bias.view(self.heads, -1, pairs)
        torch.add(bias, product.view(by_head), alpha=alpha, out=scores.view(by_head))
        return scores

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b in a buffer, in a wide dtype."""
        shape = (len(a), a.shape[1], b.shape[2])
        out = torch.bmm(a, b, out=self.buffer("product", shape, self.dtype))
        return out if self.dtype == self.wide else self.buffer("product", shape, self.wide).copy_(out)

    def narrow(self, x: Tensor) -> Tensor:
        """x as matrix products take it."""
        return x if self.dtype == self.wide else self.buffer("narrow", x.shape, self.dtype).copy_(x)

    def add_into(self, total: Tensor, block: Block, pairs: Tensor, rows: Tensor) -> None:
        """Adds each sequence's pairsᵀ @ rows to its sum (H · b, width, ·)."""
        pairs = pairs.transpose(1, 2)
        if not block.first:
            total[:, : block.seen].add_(torch.bmm(pairs, rows))
        elif self.dtype == self.wide:
            torch.bmm(pairs, rows, out=total)
        else:
            total.copy_(torch.bmm(pairs, rows))

    def count(self, block: Block, d_scores: Tensor) -> None:
        """Adds a block's part of the pair table's gradient."""
        if self.position_bias is None and self.time_bias is None:
            return
        pairs = len(block.pairs)
        by_head = d_scores.view(self.heads, -1, pairs)
        by_head = by_head.view(self.heads, pairs) if by_head.shape[1] == 1 else by_head.sum(1)
        size = self.counts.shape[1]
        for counts, weights in zip(self.counts.unbind(), by_head.unbind(), strict=True):
            counts.add_(torch.bincount(block.pairs, weights, size))

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


def _same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
