"""A training step and a scoring step on one device: tokens/s, utilisation, and pages against fp32.

    python -m benchmarks.gpu_steps [--device cuda] [--json FILE]
    python -m benchmarks.gpu_steps --device cpu --quick      # the same code, small

Training is what a trainer does for a micro-batch: gather embedding rows, encode, ranking and sampled
retrieval loss, backward, AdamW for the dense parameters, rowwise Adagrad for the rows. Utilisation is the
step's arithmetic (projections of every token and attention of every visible pair, three times for forward
and backward) over what a large matmul of the same dtype reaches in the same run.

Scoring is M-FALCON over keys and values in pages: users with candidates of their own against their
histories, in bf16, and how far its probabilities lie from those of an fp32 model with the same weights over
a plain cache.

Needs torch and triton alone: neither Ray nor pydantic.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from grstream.model import HSTU
from grstream.pages import PagedCache
from grstream.retrieval import sampled_softmax
from grstream.tokens import Events, Tokens, training_tokens
from kernels import embedding

ACTIONS = 4
NEGATIVES = 512
TEMPERATURE = 0.05


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of `grstream.config.ModelConfig` the model reads, and the sizes of a step."""

    layers: int
    dim: int
    heads: int
    window: int
    users: int
    items: int
    candidates: int
    new: int = 8  # events of each user that a step learns from
    dtype: str = "bfloat16"
    qk_dim: int | None = None
    v_dim: int | None = None
    dropout: float = 0.0
    encoder: str = "hstu"
    softmax: bool = False
    position_bias: str = "bucketed"
    time_bias: bool = True
    absolute_positions: int = 0
    feedforward: int | None = None
    popularity_days: tuple[float, ...] = ()


FULL = Shape(layers=8, dim=512, heads=4, window=4096, users=32, items=1_000_000, candidates=512)
QUICK = Shape(layers=2, dim=64, heads=2, window=128, users=8, items=5_000, candidates=64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, few steps")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here as well")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_steps: this machine has no CUDA device; --device cpu runs the same code", file=sys.stderr)
        return 1
    shape, device = QUICK if options.quick else FULL, torch.device(options.device)
    torch.manual_seed(0)
    repeats = 3 if options.quick else 10
    figures = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "shape": dataclasses.asdict(shape),
        **training(shape, device, repeats),
        **scoring(shape, device, repeats),
    }
    line = json.dumps(figures)
    if options.json:
        options.json.write_text(line + "\n")
    print(line)
    return 0


def history(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lengths (S,) from an eighth of the window up, items (E,) and times (E,) in bursts, as sessions are."""
    lengths = torch.randint(shape.window // 8, shape.window + 1, (shape.users,))
    total = int(lengths.sum())
    gaps = torch.where(torch.rand(total) < 0.9, torch.rand(total) * 60_000, torch.rand(total) * 10**9)
    times = torch.cumsum(gaps.long(), 0) + 1_700_000_000_000
    items = torch.randint(shape.items, (total,))
    return lengths.to(device), items.to(device), times.to(device)


def training(shape: Shape, device: torch.device, repeats: int) -> dict[str, float]:
    model = HSTU(shape, ACTIONS).to(device).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    table = torch.randn(shape.items, shape.dim, device=device) * 0.1
    squares = torch.zeros(shape.items, device=device)
    lengths, items, times = history(shape, device)
    stops = torch.cumsum(lengths, 0)
    new = (stops[:, None] - shape.new + torch.arange(shape.new, device=device)).flatten()
    actions = torch.randint(1, 2**ACTIONS, items.shape, device=device)
    labels = (actions[new, None] >> torch.arange(ACTIONS, device=device) & 1).float()
    nothing = torch.empty(0, dtype=torch.int64, device=device)

    def step() -> Tokens:
        negatives = torch.randint(shape.items, (NEGATIVES,), device=device)
        used, place = torch.unique(torch.cat((items, negatives)), return_inverse=True)
        rows = embedding.gather(table, used).requires_grad_()
        events = Events(lengths, rows[place[: len(items)]], actions, times, rows[:0], nothing)
        tokens, asked = training_tokens(events, new, interleaved=False)
        encoded = model(tokens, asked.readout)
        ranking = F.binary_cross_entropy_with_logits(
            model.action_logits(asked.ranking(encoded)).float(), labels
        )
        users = model.user_vectors(asked.retrieval(encoded)).float() / TEMPERATURE
        vectors = model.item_vectors(rows)
        retrieval = sampled_softmax(
            users,
            vectors[place[new]],
            vectors[place[len(items) :]],
            items[new],
            negatives,
            users.new_full((NEGATIVES,), NEGATIVES / shape.items).log(),
        )
        optimizer.zero_grad()
        (ranking + 0.02 * retrieval.mean()).backward()
        optimizer.step()
        assert rows.grad is not None
        embedding.rowwise_adagrad_(table, squares, used, rows.grad, 0.05)
        return tokens

    tokens = step()
    seconds = timed(step, device, repeats)
    encoded = len(tokens.memory_times) + len(tokens.query_times)
    achieved = 3 * arithmetic(shape, tokens) / seconds
    ceiling = matmul_ceiling(device, getattr(torch, shape.dtype))
    return {
        "step_ms": 1000 * seconds,
        "tokens_per_s": encoded / seconds,
        "tflops": achieved / 1e12,
        "matmul_ceiling_tflops": ceiling / 1e12,
        "mfu": achieved / ceiling,
    }


def arithmetic(shape: Shape, tokens: Tokens) -> float:
    """Floating-point operations of a forward pass: projections and visible pairs."""
    rows = len(tokens.memory_times) + len(tokens.query_times)
    pairs = int((tokens.memory_lengths * (tokens.memory_lengths + 1) // 2).sum() + tokens.query_prefix.sum())
    return shape.layers * (2 * 5 * rows * shape.dim**2 + 4 * pairs * shape.dim)


@torch.inference_mode()
def scoring(shape: Shape, device: torch.device, repeats: int) -> dict[str, float]:
    model = HSTU(shape, ACTIONS).to(device).eval()  # type: ignore[arg-type]
    exact = HSTU(dataclasses.replace(shape, dtype="float32"), ACTIONS).to(device).eval()  # type: ignore[arg-type]
    for layer in model.layers:
        for bias in (layer.position_bias, layer.time_bias):
            assert bias is not None
            bias.normal_(std=0.3)
    exact.load_state_dict(model.state_dict())
    lengths, items, times = history(shape, device)
    vectors = torch.randn(len(items), shape.dim, device=device) * 0.1
    actions = torch.randint(1, 2**ACTIONS, items.shape, device=device)
    tokens = Tokens.of_events(lengths, vectors, actions, times)
    ends = times[torch.cumsum(lengths, 0) - 1] + 5_000
    each = torch.full_like(lengths, shape.candidates)
    asked = Tokens.of_candidates(
        each,
        torch.randn(shape.users * shape.candidates, shape.dim, device=device) * 0.1,
        lengths.repeat_interleave(shape.candidates),
        ends.repeat_interleave(shape.candidates),
    )
    pages = PagedCache.of(model.extend(None, tokens), 64)

    def score() -> torch.Tensor:
        return torch.sigmoid(model.action_logits(model.score(pages, asked)).float())

    got, seconds = score(), timed(score, device, repeats)
    wanted = torch.sigmoid(exact.action_logits(exact.score(exact.extend(None, tokens), asked)).float())
    return {
        "score_ms": 1000 * seconds,
        "candidates_per_s": len(asked.query_times) / seconds,
        "largest_difference_from_fp32": float((got - wanted).abs().max()),
        "mean_difference_from_fp32": float((got - wanted).abs().mean()),
        "spread_of_probabilities": float(wanted.std()),
    }


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, the device's queue drained around each."""
    seconds = []
    for _ in range(repeats):
        wait(device)
        begin = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[len(seconds) // 2]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matmul."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / timed(lambda: a @ b, device, 5)


if __name__ == "__main__":
    sys.exit(main())
