"""The training layer with its own backward passes is the layer that autograd would differentiate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grstream.config import ModelConfig
from grstream.layers import HSTULayer, Layer
from kernels import Sight, jagged
from kernels import layer as lean
from tests.attention_cases import case

Readers = list[tuple[Tensor | None, Sight]]


def layer(dtype: torch.dtype = torch.float32, **options: object) -> HSTULayer:
    """A layer whose gains, shifts and biases are not those of initialisation, which would hide mistakes."""
    torch.manual_seed(0)
    made = HSTULayer(ModelConfig(**{"dim": 6, "heads": 2, "qk_dim": 2, "v_dim": 3, **options}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(1, 0.5) if parameter.dim() == 1 else parameter.normal_(0, 0.5)
    return made.to(dtype)


def inputs(
    lengths: list[int], prefixes: list[list[int]], own: bool, dtype: torch.dtype, dim: int = 6
) -> tuple[Tensor, Readers]:
    """Memory of these lengths; rows that are the memory, if `own`, and rows of these prefixes."""
    sight = case(lengths, prefixes, times="some").sight
    random = torch.Generator().manual_seed(1)

    def rows(count: int) -> Tensor:
        return torch.randn(count, dim, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    readers: Readers = [(rows(sum(map(len, prefixes))), sight)]
    if own:
        times, lengths_ = sight.memory_times, sight.memory_lengths
        readers.insert(0, (None, Sight(lengths_, times, lengths_, jagged.positions(lengths_), times)))
    return rows(sum(lengths)), readers


def differentiated(module: Layer, forward: object, memory: Tensor, readers: Readers) -> dict[str, Tensor]:
    """The outputs and, under random weights, the gradients of everything."""
    outs = forward(module, memory, readers)  # type: ignore[operator]
    random = torch.Generator().manual_seed(2)
    weights = [torch.randn(out.shape, generator=random, dtype=torch.float64) for out in outs]
    loss = sum((out * w.to(out.dtype)).sum() for out, w in zip(outs, weights, strict=True))
    leaves = {"memory": memory, **{f"x{i}": x for i, (x, _) in enumerate(readers) if x is not None}}
    leaves |= dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = dict(zip(leaves, grads, strict=True))
    return {f"out{i}": out.detach() for i, out in enumerate(outs)} | named


@settings(max_examples=15)
@given(st.data())
@pytest.mark.parametrize("attention", ["silu", "softmax"])
def test_outputs_and_gradients_are_autograds(attention: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    prefixes = [data.draw(st.lists(st.integers(0, n), max_size=3)) for n in lengths]
    biases = {
        "position_bias": data.draw(st.sampled_from(["bucketed", "exact", "none"])),
        "time_bias": data.draw(st.booleans()),
    }
    module = layer(attention=attention, **biases)
    given_ = inputs(lengths, prefixes, data.draw(st.booleans()), torch.float32)
    ours = differentiated(module, HSTULayer.forward, *given_)
    theirs = differentiated(module, Layer.forward, *given_)
    for name, their in theirs.items():
        torch.testing.assert_close(ours[name], their, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_in_bf16_it_is_as_near_to_fp32_as_autograds_layer() -> None:
    """Errors relative to a tensor's largest figure, of outputs and gradients."""
    given_ = inputs([20, 0, 35], [[20, 3], [0], [35, 1]], True, torch.float32)
    exact = differentiated(layer(), HSTULayer.forward, *given_)
    reduced = layer()
    reduced.reduced = torch.bfloat16
    ours = differentiated(reduced, HSTULayer.forward, *given_)
    theirs = differentiated(reduced, Layer.forward, *given_)
    for name, expected in exact.items():
        our, their = ((x[name] - expected).abs().max() / expected.abs().max() for x in (ours, theirs))
        assert our < 1.5 * their + 2**-9, f"{name}: {our}, {their}"
        assert ours[name].dtype == torch.float32


@pytest.mark.parametrize("softmax", ["silu", "softmax"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_pass_gradcheck_also_through_dropout(softmax: str, dropout: float) -> None:
    module = layer(torch.float64, attention=softmax, dropout=dropout).train()
    memory, readers = inputs([3, 0, 4], [[3, 1], [0], [2]], True, torch.float64)
    leaves = [memory, readers[1][0], *module.parameters()]

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return module(memory, readers)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    module = layer(dim=64, heads=1, qk_dim=8, v_dim=8, dropout=0.25).train()
    memory, readers = inputs([200], [[]], True, torch.float32, dim=64)
    dropped = module(memory, readers)[0] - memory
    kept = module.eval()(memory, readers)[0] - memory
    share = float((dropped == 0).float().mean())
    assert abs(share - 0.25) < 0.02
    torch.testing.assert_close(dropped[dropped != 0], kept[dropped != 0] / 0.75, atol=1e-4, rtol=1e-3)
    assert not torch.equal(module.train()(memory, readers)[0] - memory, dropped)


def test_a_broken_user_stays_alone_with_its_nan() -> None:
    module = layer()
    memory, readers = inputs([5, 4], [[5], [4, 0]], True, torch.float32)
    before = differentiated(module, HSTULayer.forward, memory, readers)
    with torch.no_grad():
        memory[:5] = math.nan
    after = differentiated(module, HSTULayer.forward, memory, readers)
    for name, first in (("out0", 5), ("out1", 1), ("memory", 5), ("x1", 1)):
        torch.testing.assert_close(after[name][first:], before[name][first:])


def test_without_gradients_nothing_is_kept_and_the_serving_faces_run() -> None:
    module = layer()
    memory, readers = inputs([6], [[6]], True, torch.float32)
    with torch.no_grad():
        plain = module(memory, readers)
    for ours, theirs in zip(module(memory, readers), plain, strict=True):
        assert theirs.grad_fn is None
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_rows_need_not_be_projected_with_queries_when_nobody_reads_them_out() -> None:
    """The memory's z may be k's and v's columns alone."""
    module = layer()
    shape = lean.Shape(2, 2, 3, 1e-6, 1.0)
    memory, readers = inputs([6, 2], [[6], [2, 1]], False, torch.float32)
    weights = (module.norm.weight, module.norm.bias)
    whole, bias = module.project_in.weight, module.project_in.bias
    rows = lean.project(readers[0][0], *weights, whole, bias, shape)
    outs = []
    for columns in (len(whole), 2 * 2 + 2 * 3):
        z = lean.project(memory, *weights, whole[:columns], bias[:columns], shape)
        gate = (module.norm_out.weight, module.norm_out.bias, module.project_out.weight)
        reader = lean.Reader(readers[0][0], rows, readers[0][1])
        (out,) = lean.attend(z, [reader], module.position_bias, module.time_bias, *gate, shape)
        outs.append((out, torch.autograd.grad(out.sum(), memory, retain_graph=True)[0]))
    torch.testing.assert_close(outs[0], outs[1])
