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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.buckets import position_bits
from kernels.cpu_blocks import Block, Order, Plan, plan, rows_are_memory
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
    qs, ks, vs = work.taken("q", q), work.taken("k", k), work.taken("v", v)
    outs = work.places("out", plan.rows, v.shape[2], v.dtype)
    lses = work.places("lse", plan.rows, 1, wide) if softmax else None
    owns = work.taken("own", own.unsqueeze(-1)) if softmax and own is not None else None
    for at, block in enumerate(plan.blocks):
        scores = work.scores(block, qs.plain[at], ks.turned[at], alpha)
        if lses is not None:
            lse = lses.plain[at]
            mine = None if owns is None else owns.plain[at]
            torch.amax(scores, 2, keepdim=True, out=lse)
            if mine is not None:
                torch.maximum(lse, mine, out=lse)
            total = scores.sub_(lse).exp_().sum(2, keepdim=True)
            if mine is not None:
                total += (mine - lse).exp_()
            scores.div_(total)
            lse.add_(total.log_())
        else:
            torch.ops.aten.silu.out(scores, out=scores)
        torch.bmm(work.narrow("scores", block).plain, vs.plain[at], out=outs.plain[at])
    out = plan.rows.give_back(outs.whole).view(v_self.shape).to(wide)
    if not softmax:
        return out if own is None else out.add_(F.silu(own).unsqueeze(-1) * v_self), None
    assert lses is not None
    lse = plan.rows.give_back(lses.whole, None if own is None else own.view(-1, 1)).view(q.shape[:2])
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
    qs, ks, vs = work.taken("q", q), work.taken("k", k), work.taken("v", v)
    gs = work.taken("gradient", gradient.to(q.dtype), 0)
    lses = commons = None
    if lse is not None and common is not None:
        # Repetitions weigh nothing, whatever they see.
        lses = work.taken("lse", lse.unsqueeze(-1), math.inf)
        commons = work.taken("common", common.unsqueeze(-1), 0)
    d_qs = work.places("d_q", plan.rows, q.shape[2], q.dtype)
    d_ks = work.places("d_k", plan.memory, k.shape[2], wide)
    d_vs = work.places("d_v", plan.memory, v.shape[2], wide)
    for at, block in enumerate(plan.blocks):
        scores = work.scores(block, qs.plain[at], ks.turned[at], alpha)
        d_scores = work.product("d_scores", block, gs.plain[at], vs.turned[at])
        if lses is not None and commons is not None:
            weights = "scores"
            scores.sub_(lses.plain[at]).exp_()
            d_scores.sub_(commons.plain[at]).mul_(scores)
        else:
            weights = "weights"
            torch.ops.aten.silu.out(scores, out=work.buffer(weights, block, wide).plain)
            torch.ops.aten.silu_backward.grad_input(d_scores, scores, grad_input=d_scores)
        work.count(block)
        work.add_into(d_vs.plain[at], block, work.narrow(weights, block).turned, gs.plain[at])
        narrow = work.narrow("d_scores", block)
        work.add_into(d_ks.plain[at], block, narrow.turned, qs.plain[at])
        torch.bmm(narrow.plain, ks.plain[at], out=d_qs.plain[at])
    d_q = plan.rows.give_back(d_qs.whole).view(q.shape)
    d_k = plan.memory.give_back(d_ks.whole).view(k.shape).mul_(alpha)
    d_v = plan.memory.give_back(d_vs.whole).view(v.shape)
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
        self.counts_by_head = self.counts.unbind()
        self.scratch = self.plan.scratch
        self.index: Tensor  # of the pairs of the block at hand

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

    def buffer(self, name: str, block: Block, dtype: torch.dtype) -> "_Buffer":
        """Memory for a number a pair of a block, which other blocks and passes use again."""
        key = (name, block.batch, block.rows, block.seen, dtype)
        held: _Buffer | None = self.scratch.get(key)
        if held is None:
            whole = self.scratch.get((name, dtype))
            if whole is None:
                largest = max(b.batch * b.rows * b.seen for b in self.plan.blocks)
                whole = self.scratch[name, dtype] = torch.empty(largest, dtype=dtype)
            held = self.scratch[key] = _Buffer.of(whole, block, self.heads)
        return held

    def places(self, name: str, order: Order, width: int, dtype: torch.dtype) -> "_Places":
        """Memory for rows, or for the memory, in places, which other passes use again."""
        key = (name, width, dtype)
        held: _Places | None = self.scratch.get(key)
        if held is None:
            whole = torch.empty(len(order.source), width, dtype=dtype)
            of = _Places.of_rows if order is self.plan.rows else _Places.of_memory
            held = self.scratch[key] = of(whole, self.plan)
        return held

    def taken(self, name: str, x: Tensor, padding: float | None = None) -> "_Places":
        """x (R or M, H, ·) in places, as `Order.take` has it: the memory's are those named k and v."""
        order = self.plan.memory if name in ("k", "v") else self.plan.rows
        held = self.places(name, order, x.shape[2], x.dtype)
        order.take(x, held.whole, padding)
        return held

    def scores(self, block: Block, q: Tensor, k: Tensor, alpha: float) -> Tensor:
        """(H · b, r, n) in fp32 or wider, UNSEEN out of sight, from (H · b, r, ·) and (H · b, ·, n)."""
        self.index = index = block.pairs
        scores = self.buffer("scores", block, self.wide)
        if index.numel() * self.heads == scores.plain.numel():
            for table, out in zip(self.by_head, scores.heads, strict=True):
                torch.index_select(table, 0, index.view(-1), out=out)
            bias = scores.by_head
        else:  # sequences, or rows, share theirs
            some = [table.index_select(0, index.view(-1)) for table in self.by_head]
            bias = torch.stack(some).view(self.heads, *index.shape)
            if self.dtype == self.wide:
                scores.by_head.copy_(bias)
        if self.dtype == self.wide:
            return scores.plain.baddbmm_(q, k, alpha=alpha)
        product = self.buffer("product", block, self.dtype)
        torch.bmm(q, k, out=product.plain)
        torch.add(bias, product.by_head, alpha=alpha, out=scores.by_head)
        return scores.plain

    def product(self, name: str, block: Block, a: Tensor, b: Tensor) -> Tensor:
        """a @ b in a buffer, in a wide dtype."""
        out = self.buffer(name, block, self.wide).plain
        if self.dtype == self.wide:
            return torch.bmm(a, b, out=out)
        return out.copy_(torch.bmm(a, b, out=self.buffer("product", block, self.dtype).plain))

    def narrow(self, name: str, block: Block) -> "_Buffer":
        """A wide buffer as matrix products take it."""
        wide = self.buffer(name, block, self.wide)
        if self.dtype == self.wide:
            return wide
        narrow = self.buffer("product", block, self.dtype)
        narrow.plain.copy_(wide.plain)
        return narrow

    def add_into(self, into: Tensor, block: Block, pairs: Tensor, rows: Tensor) -> None:
        """Adds each sequence's pairs (H · b, n, r) @ rows to what the block sees of a sum over blocks."""
        if not block.first:
            into.add_(torch.bmm(pairs, rows))
        elif self.dtype == self.wide:
            torch.bmm(pairs, rows, out=into)
        else:
            into.copy_(torch.bmm(pairs, rows))

    def count(self, block: Block) -> None:
        """Adds a block's d_scores to the pair table's gradient."""
        if self.position_bias is None and self.time_bias is None:
            return
        index, size = self.index, self.counts.shape[1]
        buffer = self.buffer("d_scores", block, self.wide)
        shared = [at for at, size in enumerate(index.shape, 1) if size < buffer.by_head.shape[at]]
        by_head = buffer.by_head.sum(shared).flatten(1).unbind() if shared else buffer.heads
        for counts, weights in zip(self.counts_by_head, by_head, strict=True):
            counts.add_(torch.bincount(index.view(-1), weights, size))

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


class _Buffer(NamedTuple):
    """One memory seen in several ways."""

    plain: Tensor  # (H · b, r, n)
    turned: Tensor  # (H · b, n, r)
    by_head: Tensor  # (H, b, r, n)
    heads: tuple[Tensor, ...]  # H times (b · r · n,)

    @classmethod
    def of(cls, memory: Tensor, block: Block, heads: int) -> "_Buffer":
        shape = (block.batch, block.rows, block.seen)
        plain = memory[: math.prod(shape)].view(shape)
        by_head = plain.unflatten(0, (heads, -1))
        return cls(plain, plain.transpose(1, 2), by_head, by_head.flatten(1).unbind())


class _Places(NamedTuple):
    """Rows, or the memory, in places, and what of them each block has."""

    whole: Tensor  # (places, ·)
    plain: list[Tensor]  # (H · b, r, ·), or what it sees of the memory: (H · b, n, ·)
    turned: list[Tensor]  # with the last two dimensions changed about

    @classmethod
    def of_rows(cls, whole: Tensor, plan: Plan) -> "_Places":
        width = whole.shape[1]
        plain = [
            whole.as_strided((b.batch, b.rows, width), (b.rows * width, width, 1), b.start * width)
            for b in plan.blocks
        ]
        return cls(whole, plain, [x.transpose(1, 2) for x in plain])

    @classmethod
    def of_memory(cls, whole: Tensor, plan: Plan) -> "_Places":
        width = whole.shape[1]
        plain = []
        for b in plan.blocks:
            padded, start = plan.groups[b.group]
            shape, strides = (b.batch, b.seen, width), (padded * width, width, 1)
            plain.append(whole.as_strided(shape, strides, start * width))
        return cls(whole, plain, [x.transpose(1, 2) for x in plain])


def _same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
