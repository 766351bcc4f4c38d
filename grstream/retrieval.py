"""The retrieval losses: which item comes next, over all items or over a sample of them.

Users and items are vectors, their product is a logit; with unit vectors divided by a temperature it is the
paper's retrieval head (section 4, and the public code's L2-normalised output). The softmax over all items is
exact and, on a CPU, cheaper than gathering negatives up to some thousands of items; beyond, a sample stands
for all of them, without bias towards what is popular.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.matmul import matmul

# Rows whose logits are held at once: 256 rows of 4,000 bf16 logits are 2 MB, which a core's caches hold.
CHUNK_ROWS = 256
LEAST_LOGARITHM = 80.0  # -log of the smallest share that fp32 and bf16 hold with all their bits, and less


def full_softmax(
    users: Tensor,  # (N, d), temperature included
    table: Tensor,  # (V, d)
    targets: Tensor,  # (N,) int64, rows of the table
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """-log softmax(users · tableᵀ) at each row's target: (N,) in fp32, or float64 where users are.

    Logits exist for CHUNK_ROWS rows at a time: the gradients are computed with the loss, once, and kept as
    (N, d) and (V, d) instead of (N, V). So the rows' losses can be weighed only as a whole: the gradient
    that comes back must be the same for all rows (a sum or a mean), or the result is a RuntimeError. `dtype`
    is that of logits and products; bf16 takes a third of the time, and a loss is off by some hundredths of a
    nat at a logit of 20, the mean of many by far less.
    """
    losses: Tensor = _FullSoftmax.apply(users, table, targets, dtype)
    return losses


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, users: Tensor, table: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(users.dtype, torch.float32)
        items, columns = table.to(dtype), table.to(dtype).t().contiguous()
        losses = users.new_empty(len(users), dtype=wide)
        learning = any(ctx.needs_input_grad[:2])
        of_users = torch.empty_like(users) if learning else users
        of_columns = torch.zeros_like(table.t()) if learning else table
        for first in range(0, len(users), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            u = users[rows].to(dtype)
            shares = torch.softmax(matmul(u, columns), 1)  # (rows, V)
            losses[rows] = -shares.gather(1, targets[rows].unsqueeze(1)).squeeze(1).to(wide).log()
            if learning:
                of_users[rows] = matmul(shares, items).to(users.dtype)
                of_columns += matmul(u.t(), shares)  # this way round: it is faster than its transpose
        lost = (losses > LEAST_LOGARITHM).nonzero().squeeze(1)  # a share too small to have a logarithm
        if len(lost):
            losses[lost] = F.cross_entropy(
                users[lost].to(wide) @ table.to(wide).T, targets[lost], reduction="none"
            )
        if learning:
            of_users -= table.index_select(0, targets)
            of_table = of_columns.t().index_add(0, targets, users, alpha=-1)
            ctx.save_for_backward(of_users, of_table)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_users, of_table = ctx.saved_tensors
        if not len(gradient):
            return of_users, of_table, None, None
        weight = gradient[0]
        if bool((gradient != weight).any()):
            raise RuntimeError("full_softmax weighs all rows alike: take the sum or the mean of its losses")
        return of_users * weight, of_table * weight, None, None


def sampled_softmax(
    users: Tensor,  # (N, d), temperature included
    positives: Tensor,  # (N, d) the targets' vectors
    candidates: Tensor,  # (K, d) the sampled items' vectors
    targets: Tensor,  # (N,) ids
    sampled: Tensor,  # (K,) ids
    log_counts: Tensor,  # (K,) log of the expected number of times that the item stands in a sample
) -> Tensor:
    """-log softmax at each row's target, the sum over all items estimated from a sample: (N,).

    Z ≈ exp(positive) + Σ_{k: sampled_k ≠ target} exp(logit_k) / E[count of k's item in the sample]

    which has no bias: the positive stands in the sum once, for itself, with probability one, and every other
    item, however often it is drawn, counts once on average (the logQ correction; Bengio & Senécal 2008). A
    sample may be drawn from several distributions: `expected_counts` adds up those that are known, as a data
    set's are, `stratified` needs to know none.
    """
    positive = (users * positives).sum(1, keepdim=True)
    logits = users @ candidates.T - log_counts
    logits = logits.masked_fill(targets.unsqueeze(1) == sampled, -torch.inf)
    return torch.logsumexp(torch.cat((positive, logits), 1), 1) - positive.squeeze(1)


def stratified(
    own: Tensor,  # (B,) ids of items that are candidates whatever is drawn, targets' among them
    drawn: Tensor,  # (K,) ids drawn uniformly from all items
    items: int,  # how many these are
) -> tuple[Tensor, Tensor]:
    """A sample for `sampled_softmax` and the log of its counts: (C,) ids and (C,).

    The own items are a stratum without a remainder: each stands there once and counts once. The draws that
    fall outside it stand for all the others. So it matters to no item how popular it is. On a stream that is
    not known: popularity up to now makes today's items, which are in every batch, weigh seventy times too
    much as negatives, and what is read most is retrieved last.
    """
    own = torch.unique(own)
    others = drawn[~torch.isin(drawn, own)]
    share = math.log(len(drawn) / items) if len(others) else 0.0
    logs = torch.zeros(len(own) + len(others), device=own.device)
    logs[len(own) :] = share
    return torch.cat((own, others)), logs


def expected_counts(
    shares: Tensor,  # (K,) the probability of each item as the target of an event
    in_batch: int,  # candidates that are the targets of other events
    uniform: int,  # candidates drawn uniformly from all items
    items: int,  # that there are in all
) -> Tensor:
    """How often each item is to be expected in such a sample: (K,)."""
    return in_batch * shares + uniform / items
