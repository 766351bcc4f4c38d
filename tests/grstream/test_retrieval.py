"""The retrieval losses are the softmax over all items, whole or in expectation."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from grstream.retrieval import CHUNK_ROWS, expected_counts, full_softmax, sampled_softmax, stratified


def world(users: int, items: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Unit vectors with temperature .05, as the retrieval head has them, and a target each."""
    random = torch.Generator().manual_seed(users * items)
    u = F.normalize(torch.randn(users, dim, generator=random, dtype=dtype), dim=1) / 0.05
    table = F.normalize(torch.randn(items, dim, generator=random, dtype=dtype), dim=1)
    return u.requires_grad_(), table.requires_grad_(), torch.randint(items, (users,), generator=random)


def by_autograd(users: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    losses = F.cross_entropy(users @ table.T, targets, reduction="none")
    return losses, *torch.autograd.grad(losses.mean(), (users, table))


@pytest.mark.parametrize("users", [1, CHUNK_ROWS, 2 * CHUNK_ROWS + 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_full_softmax_and_its_gradients_are_those_of_cross_entropy(
    users: int, dtype: torch.dtype, bound: float
) -> None:
    u, table, targets = world(users, 301, 10, dtype)
    expected = by_autograd(u, table, targets)
    losses = full_softmax(u, table, targets, dtype)
    found = (losses, *torch.autograd.grad(losses.mean(), (u, table)))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=bound, atol=bound)


def test_in_bf16_the_full_softmax_is_off_by_its_rounding_and_not_by_more() -> None:
    u, table, targets = world(3000, 500, 16, torch.float32)
    expected, of_users, of_table = by_autograd(u, table, targets)
    losses = full_softmax(u, table, targets, torch.bfloat16)
    assert (losses - expected).abs().max() < 0.15
    assert (losses - expected).mean().abs() < 0.003
    found = torch.autograd.grad(losses.mean(), (u, table))
    for f, e in zip(found, (of_users, of_table), strict=True):
        assert (f - e).norm() < 0.01 * e.norm()


def test_logits_of_any_size_overflow_nothing() -> None:
    u, table, targets = world(5, 20, 4, torch.float32)
    losses = full_softmax(1000 * u, table, targets)
    torch.testing.assert_close(losses, F.cross_entropy(1000 * u @ table.T, targets, reduction="none"))


def test_rows_that_weigh_differently_are_refused_and_not_summed_wrongly() -> None:
    u, table, targets = world(5, 20, 4)
    losses = full_softmax(u, table, targets, torch.float64)
    with pytest.raises(RuntimeError, match="weighs all rows alike"):
        (losses * torch.arange(5)).sum().backward()


def test_no_rows_have_no_loss_and_no_gradient() -> None:
    u, table, targets = world(0, 20, 4)
    full_softmax(u, table, targets, torch.float64).sum().backward()
    assert table.grad is not None
    assert not table.grad.any()


def samples(popularity: Tensor, in_batch: int, uniform: int) -> list[tuple[float, Tensor]]:
    """Every sample of a tiny vocabulary with its probability."""
    items = len(popularity)
    out = []
    for drawn in itertools.product(range(items), repeat=in_batch + uniform):
        probability = float(popularity[list(drawn[:in_batch])].prod()) / items**uniform
        out.append((probability, torch.tensor(drawn)))
    return out


@pytest.mark.parametrize(("in_batch", "uniform"), [(4, 0), (0, 4), (2, 2), (1, 3)])
def test_over_all_samples_the_sampled_sum_is_the_sum_over_all_items(in_batch: int, uniform: int) -> None:
    u, table, targets = world(3, 5, 4)
    u = u / 10  # enumerated exactly, any logits do
    popularity = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64)
    for probability, sampled in samples(popularity, in_batch, uniform):
        counts = expected_counts(popularity[sampled], in_batch, uniform, len(popularity))
        losses = sampled_softmax(u, table[targets], table[sampled], targets, sampled, counts.log())
        mean += probability * (losses + (u * table[targets]).sum(1)).exp()  # the estimate of Z
    torch.testing.assert_close(mean, (u @ table.T).exp().sum(1))


@pytest.mark.parametrize("own", [[2], [0, 2, 2], [2, 4, 1, 1, 1, 0, 3]])
@pytest.mark.parametrize("drawn", [1, 3])
def test_over_all_draws_the_sum_over_a_stratified_sample_is_that_over_all_items(
    own: list[int], drawn: int
) -> None:
    """However often an item is in the batch, and without a word of how popular it is."""
    u, table, _ = world(3, 5, 4)
    u, targets = u / 10, torch.full((3,), 2)
    mean = torch.zeros(3, dtype=torch.float64)
    draws = list(itertools.product(range(5), repeat=drawn))
    for draw in draws:
        sampled, logs = stratified(torch.tensor(own), torch.tensor(draw), 5)
        losses = sampled_softmax(u, table[targets], table[sampled], targets, sampled, logs)
        mean += (losses + (u * table[targets]).sum(1)).exp() / len(draws)
    torch.testing.assert_close(mean, (u @ table.T).exp().sum(1), rtol=1e-6, atol=0)


def test_the_more_is_sampled_the_nearer_loss_and_gradients_come_to_the_full_softmax() -> None:
    u, table, targets = world(8, 6, 4)
    u = (u.detach() / 5).requires_grad_()
    popularity = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.05], dtype=torch.float64)
    exact = by_autograd(u, table, targets)
    random = torch.Generator().manual_seed(0)
    errors = []
    for size in (8, 128, 2048):
        error = torch.zeros(3)
        for _ in range(20):
            sampled = torch.cat(
                (
                    torch.multinomial(popularity, size // 2, replacement=True, generator=random),
                    torch.randint(6, (size // 2,), generator=random),
                )
            )
            counts = expected_counts(popularity[sampled], size // 2, size // 2, len(popularity))
            losses = sampled_softmax(u, table[targets], table[sampled], targets, sampled, counts.log())
            found = (losses, *torch.autograd.grad(losses.mean(), (u, table)))
            error += torch.stack([(f - e).norm() / e.norm() for f, e in zip(found, exact, strict=True)]) / 20
        errors.append(error)
    assert (errors[2] < 0.1).all()
    assert (errors[1] < errors[0] / 2).all()
    assert (errors[2] < errors[1] / 2).all()


def test_without_the_correction_what_is_popular_weighs_too_much() -> None:
    u, table, targets = world(8, 6, 4)
    u = u / 5
    popularity = torch.tensor([0.9, 0.02, 0.02, 0.02, 0.02, 0.02], dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    sampled = torch.multinomial(popularity, 8192, replacement=True, generator=random)
    full = by_autograd(u, table, targets)[0]

    def error(counts: Tensor) -> float:
        losses = sampled_softmax(u, table[targets], table[sampled], targets, sampled, counts.log())
        return (losses - full).abs().max().item()

    assert error(expected_counts(popularity[sampled], len(sampled), 0, len(popularity))) < 0.15
    assert error(torch.full((len(sampled),), len(sampled) / 6, dtype=torch.float64)) > 1
