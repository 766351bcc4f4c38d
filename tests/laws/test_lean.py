"""A layer keeps 14·d bytes a token for the backward pass in bf16, the paper's figure (section 3.3).

d is the width of the residual stream and of queries, keys, values and gate alike. Counted twice: what the
layer hands to autograd, and what is in memory after the forward pass that was not before.
"""

import pytest
import torch
from torch import Tensor

from grstream.config import ModelConfig
from grstream.model import HSTU
from grstream.tokens import Kind, Tokens

DIM = 256
LENGTHS = [50, 0, 1, 30, 111]


def model(layers: int, dtype: str, dropout: float = 0.1) -> HSTU:
    torch.manual_seed(0)
    return HSTU(ModelConfig(dim=DIM, heads=4, layers=layers, dtype=dtype, dropout=dropout), actions=3).train()


def tokens() -> Tokens:
    lengths, total = torch.tensor(LENGTHS), sum(LENGTHS)
    numbers = torch.arange(total)
    vectors = torch.randn(total, DIM).requires_grad_()
    return Tokens.of_memory(
        lengths, vectors, torch.full((total,), Kind.EVENT), numbers % 8, numbers**2 * 1_000
    )


def saved_bytes(model: HSTU) -> int:
    """Bytes of all storages saved for backward, each once; parameters and integers left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.is_floating_point() and storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = model(tokens())
    assert kept.memory.requires_grad
    return sum(storages.values())


def live_bytes(model: HSTU) -> int:
    """Bytes that the forward pass took from the allocator and had not given back at its end."""
    batch = tokens()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        kept = model(batch)
    assert kept.memory.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.events())


def a_layer(count: object, dtype: str) -> float:
    """Bytes a token that one layer more makes."""
    three, one = (count(model(layers, dtype)) for layers in (3, 1))  # type: ignore[operator]
    return (three - one) / 2 / sum(LENGTHS)


@pytest.mark.parametrize("count", [saved_bytes, live_bytes])
def test_a_layer_keeps_14_bytes_a_token_and_dimension_in_bf16(count: object) -> None:
    assert 0 < a_layer(count, "bfloat16") <= 14 * DIM


@pytest.mark.parametrize("count", [saved_bytes, live_bytes])
def test_and_24_in_fp32(count: object) -> None:
    assert 0 < a_layer(count, "float32") <= 24 * DIM


def test_live_bytes_would_show_what_is_hidden_from_autograd() -> None:
    """The second count sees a tensor that a layer keeps to itself."""
    honest, hiding = model(1, "bfloat16"), model(1, "bfloat16")
    hidden: list[Tensor] = []
    hiding.layers[0].register_forward_hook(lambda _, inputs, out: hidden.append(out[0].clone()))
    total = sum(LENGTHS)
    assert live_bytes(hiding) - live_bytes(honest) >= 4 * DIM * total
