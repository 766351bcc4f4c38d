"""Training tokens per second on this machine, beside a padded dense HSTU (`benchmarks.padded`).

    python -m benchmarks.training [--quick] [--threads 1] [--dtype float32] [--json FILE]

A step is the forward and backward pass of the encoder and of a loss over all positions (each action's, by the
ranking head), for a batch of 128 users; there is no optimizer in either's. Histories are as long as
MovieLens-1M's, cut at the window, and only their real tokens count. Both sides have the same weights, inputs,
loss and dtype, and outputs and gradients are compared before anything is timed.

    ratio, tokens_per_s, padded_tokens_per_s      window 200, d = 50, 2 layers of 1 head
    ratio_2_heads                                 the same with 2 heads
    ratio_1024                                    window 1024, d = 128, 2 layers of 1 head

Steps alternate and the median counts: with one thread of the processor's time, so that what else runs on the
machine matters little, otherwise of the clock's. The baseline's batch is cut to the number of sequences at
which it is fastest here. A padded sequence takes as long whatever its length, so where a step of the whole
batch takes many seconds the baseline is timed on some of its sequences and the rest is reckoned.

`padded_share` is the baseline's arithmetic a second over that of its matrix products alone, in their shapes
and dtype: how good a baseline it is.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import padded
from grstream.config import ModelConfig
from grstream.model import HSTU
from grstream.tokens import Kind, Tokens
from kernels import jagged

# Events of MovieLens-1M's users (6,040; `ratings.dat`): the quantiles 0, 5 %, …, 100 %. Mean 165.6.
LENGTHS = (20, 23, 27, 32, 38, 44, 51, 60, 70, 81, 96, 109, 126, 148, 173, 208, 253, 309, 400, 556, 2314)
BATCH = 128
LAYERS = 2
ACTIONS = 3
EQUAL = 1e-4  # of outputs and, relative to a tensor's largest, of gradients in fp32


@dataclasses.dataclass(frozen=True)
class Shape:
    window: int
    dim: int
    heads: int
    cuts: tuple[int, ...]  # numbers of sequences in which the baseline's batch may be cut
    timed: int = BATCH  # the baseline's sequences in a timed step


SHAPES = {
    "": Shape(200, 50, 1, (8, 16, 32, 64, 128)),
    "_2_heads": Shape(200, 50, 2, (8, 16, 32, 64, 128)),
    "_1024": Shape(1024, 128, 1, (1, 2, 4), 8),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    tokens: Tokens
    taken: Tensor  # (M, ACTIONS) what the loss asks for

    @classmethod
    def draw(cls, window: int, dim: int, seed: int = 0) -> "Batch":
        """128 users: lengths at even quantiles, times in sessions with pauses of minutes to months."""
        random = torch.Generator().manual_seed(seed)
        at = (torch.arange(BATCH) + 0.5) / BATCH * (len(LENGTHS) - 1)
        low, table = at.long(), torch.tensor(LENGTHS, dtype=torch.float64)
        lengths = (table[low] * (table[low + 1] / table[low]) ** (at - low)).long().clamp(max=window)
        lengths = lengths[torch.randperm(BATCH, generator=random)]
        total = int(lengths.sum())

        def uniform() -> Tensor:
            return torch.rand(total, generator=random, dtype=torch.float64)

        pause = torch.where(uniform() < 0.05, 10 ** (5 + 4.5 * uniform()), 1_000 + 60_000 * uniform() ** 3)
        owner = jagged.owners(lengths, total)
        times = torch.cumsum(pause.long(), 0) + 10**12 + 10**9 * owner
        actions = torch.randint(2**ACTIONS, (total,), generator=random)
        vectors = torch.randn(total, dim, generator=random) * dim**-0.5
        kinds = torch.full((total,), Kind.EVENT, dtype=torch.int64)
        tokens = Tokens.of_memory(lengths, vectors.requires_grad_(), kinds, actions, times)
        taken = torch.randint(2, (total, ACTIONS), generator=random, dtype=torch.float32)
        return cls(tokens, taken)

    def parts(self, sequences: int) -> "list[Batch]":
        """The same users, so many at a time."""
        t, parts, first = self.tokens, [], 0
        for lengths in t.memory_lengths.split(sequences):
            some = slice(first, first + int(lengths.sum()))
            first = some.stop
            columns = (t.memory_vectors, t.memory_kinds, t.memory_actions, t.memory_times)
            part = Tokens.of_memory(lengths, *(column[some] for column in columns))
            parts.append(Batch(part, self.taken[some]))
        return parts


Step = Callable[[], Tensor]


def ours(model: HSTU, batch: Batch) -> Step:
    def step() -> Tensor:
        return _learn(model, batch, model(batch.tokens).memory, len(batch.taken))

    return _fresh(model, batch, step)


def dense(model: HSTU, batch: Batch, window: int, cut: int) -> Step:
    parts, total = batch.parts(cut), len(batch.taken)

    def step() -> Tensor:
        outs = []
        for part in parts:
            t = part.tokens
            x = model._memory(t, jagged.positions(t.memory_lengths))
            out = padded.encode(model, padded.Padded.of(x, t.memory_times, t.memory_lengths, window))
            outs.append(_learn(model, part, out, total))
        return torch.cat(outs)

    return _fresh(model, batch, step)


def _learn(model: HSTU, batch: Batch, out: Tensor, total: int) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(model.action_logits(out), batch.taken, reduction="sum")
    (loss / total).backward()
    return out.detach()


def _fresh(model: HSTU, batch: Batch, step: Step) -> Step:
    def run() -> Tensor:
        model.zero_grad()
        batch.tokens.memory_vectors.grad = None
        return step()

    return run


def check(model: HSTU, batch: Batch, shape: Shape, bound: float) -> None:
    """Both sides' outputs and gradients on four users. Raises AssertionError where they differ."""
    few = next(iter(batch.parts(4)))
    tokens = dataclasses.replace(
        few.tokens, memory_vectors=few.tokens.memory_vectors.detach().requires_grad_()
    )
    few = Batch(tokens, few.taken)
    results = []
    for step in (ours(model, few), dense(model, few, shape.window, 2)):
        out = step()
        leaves = {"vectors": tokens.memory_vectors, **dict(model.named_parameters())}
        grads = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
        results.append({"out": out, **grads})
    for name, our in results[0].items():
        their = results[1][name]
        error = float((our - their).abs().max() / (1e-12 + their.abs().max()))
        assert error < bound, f"{name} differs from the baseline's by {error:.1e} of its largest figure"


def seconds(step: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return clock() - start


def arithmetic(shape: Shape) -> float:
    """Floating point operations of a padded sequence in a layer: forward once, backward twice."""
    products = padded.products(1, shape.window, shape.dim, shape.heads)
    return 3.0 * sum(2 * a.numel() * b.shape[-1] for a, b in _factors(products, torch.float32))


def ceiling(shape: Shape, cut: int, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Floating point operations a second of a layer's matrix products alone, forward and backward."""
    products = padded.products(cut, shape.window, shape.dim, shape.heads)
    factors = list(_factors(products, dtype))
    outs = [(a @ b, a @ b @ b.mT, a.mT @ (a @ b)) for a, b in factors]

    def multiply() -> None:
        for (a, b), (out, d_a, d_b) in zip(factors, outs, strict=True):
            torch.matmul(a, b, out=out)
            torch.matmul(out, b.mT, out=d_a)
            torch.matmul(a.mT, out, out=d_b)

    return arithmetic(shape) * cut / min(seconds(multiply, clock) for _ in range(5))


def _factors(products: list, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:  # type: ignore[type-arg]
    return [(torch.ones(a, dtype=dtype), torch.ones(b, dtype=dtype)) for a, b in products]


def compare(shape: Shape, dtype: str, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    torch.manual_seed(0)
    config = ModelConfig(dim=shape.dim, heads=shape.heads, layers=LAYERS, dtype=dtype)  # type: ignore[arg-type]
    model, batch = HSTU(config, ACTIONS), Batch.draw(shape.window, shape.dim)
    check(model, batch, shape, EQUAL if dtype == "float32" else 0.1)
    some = batch.parts(shape.timed)[0]
    leaf = some.tokens.memory_vectors.detach().requires_grad_()
    some = Batch(dataclasses.replace(some.tokens, memory_vectors=leaf), some.taken)
    cuts = {cut: dense(model, some, shape.window, cut) for cut in shape.cuts if cut <= shape.timed}
    cut = min(cuts, key=lambda cut: min(seconds(cuts[cut], clock) for _ in range(2)))
    ours_, theirs = ours(model, batch), cuts[cut]
    ours_()
    times = [(seconds(ours_, clock), seconds(theirs, clock) * BATCH / shape.timed) for _ in range(rounds)]
    our, their = (statistics.median(side) for side in zip(*times, strict=True))
    tokens = len(batch.taken)
    top = ceiling(shape, cut, getattr(torch, dtype), clock)
    return {
        "tokens_per_s": tokens / our,
        "padded_tokens_per_s": tokens / their,
        "ratio": statistics.median(t / o for o, t in times),
        "padded_share": BATCH * LAYERS * arithmetic(shape) / their / top,
        "padded_gflops": BATCH * LAYERS * arithmetic(shape) / their / 1e9,
        "ceiling_gflops": top / 1e9,
        "cut": cut,
        "tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="training tokens per second beside a padded dense HSTU")
    parser.add_argument("--quick", action="store_true", help="about three minutes")
    parser.add_argument("--threads", type=int, default=1, help="of torch; trainers have one a process")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    result: dict[str, object] = {
        "dtype": args.dtype,
        "threads": args.threads,
        "seconds": "process" if args.threads == 1 else "clock",
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    for name, shape in SHAPES.items():
        figures = compare(shape, args.dtype, (5 if args.quick else 15) if shape.window < 1024 else 3, clock)
        print(
            f"window {shape.window:4}, d {shape.dim:3}, {shape.heads} heads, {args.dtype}:"
            f" {figures['tokens_per_s']:9,.0f} tokens/s, padded {figures['padded_tokens_per_s']:8,.0f}"
            f" ({figures['padded_gflops']:.0f} of {figures['ceiling_gflops']:.0f} GFLOP/s,"
            f" {figures['padded_share']:.0%}; {figures['cut']} sequences at a time),"
            f" ratio {figures['ratio']:.2f}",
            flush=True,
        )
        result |= {key + name: round(value, 4) for key, value in figures.items()}
    line = json.dumps(result)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
