"""Training steps on a CPU beside Meta's research HSTU (github.com/meta-recsys/generative-recommenders).

    PYTHONPATH=generative-recommenders python -m benchmarks.peer [--window 200 --dim 50] [--rounds 7]

The peer is its SequentialTransductionUnitJagged as its HSTU builds it: 2 layers of one head, fp32, no
dropout, relative bias by position and time. Batch and loss are those of `benchmarks.training`; weights are
each one's own. The two fbgemm operators it calls are PyTorch's indexing here where fbgemm_gpu is not
installed. One thread; its own time counts.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import statistics
import sys
import time
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training import ACTIONS, LAYERS, Batch, Step, ours, seconds
from grstream.config import ModelConfig
from grstream.model import HSTU
from kernels import jagged


def operators() -> torch.library.Library | None:
    """fbgemm's, or the same written here, which last as long as what is returned."""
    if importlib.util.find_spec("fbgemm_gpu"):
        importlib.import_module("fbgemm_gpu")
        return None
    library = torch.library.Library("fbgemm", "DEF")
    library.define(
        "jagged_to_padded_dense(Tensor values, Tensor[] offsets, int[] max_lengths, float padding_value=0)"
        " -> Tensor"
    )
    library.define("dense_to_jagged(Tensor dense, Tensor[] offsets, int? total_L=None) -> (Tensor, Tensor[])")

    def places(offsets: Tensor, longest: int) -> Tensor:
        lengths = offsets.diff()
        return jagged.owners(lengths) * longest + jagged.positions(lengths)

    def pad(
        values: Tensor, offsets: list[Tensor], max_lengths: list[int], padding_value: float = 0
    ) -> Tensor:
        (offset,), (longest,) = offsets, max_lengths
        out = values.new_full(((len(offset) - 1) * longest, values.shape[1]), padding_value)
        return out.index_copy(0, places(offset, longest), values).view(-1, longest, values.shape[1])

    def pack(dense: Tensor, offsets: list[Tensor], total: int | None = None) -> tuple[Tensor, list[Tensor]]:
        return dense.flatten(0, 1).index_select(0, places(offsets[0], dense.shape[1])), offsets

    library.define("asynchronous_complete_cumsum(Tensor lengths) -> Tensor")
    library.impl(
        "asynchronous_complete_cumsum",
        lambda lengths: F.pad(lengths.cumsum(0), (1, 0)),
        "CompositeImplicitAutograd",
    )
    library.impl("jagged_to_padded_dense", pad, "CompositeImplicitAutograd")
    library.impl("dense_to_jagged", pack, "CompositeImplicitAutograd")
    return library


def module() -> None:
    """torchrec's one function that the peer's PyTorch path imports, where torchrec is not installed."""
    name = "torchrec.modules.sorted_index_select"
    if name in sys.modules or importlib.util.find_spec("torchrec"):
        return
    written = types.ModuleType(name)
    written.maybe_sorted_index_select = lambda values, indices, **_: values[indices]  # type: ignore[attr-defined]
    for made in (types.ModuleType("torchrec"), types.ModuleType("torchrec.modules"), written):
        sys.modules[made.__name__] = made


def metas(batch: Batch, window: int, dim: int) -> Step:
    """A step of the peer's. Raises ModuleNotFoundError where it is not on the path."""
    hstu: Any = importlib.import_module("generative_recommenders.research.modeling.sequential.hstu")
    layers = [
        hstu.SequentialTransductionUnitJagged(
            embedding_dim=dim,
            linear_hidden_dim=dim,
            attention_dim=dim,
            dropout_ratio=0.0,
            attn_dropout_ratio=0.0,
            num_heads=1,
            linear_activation="silu",
            relative_attention_bias_module=hstu.RelativeBucketedTimeAndPositionBasedBias(
                max_seq_len=window,
                num_buckets=128,
                bucketization_fn=lambda x: (torch.log(torch.abs(x).clamp(min=1)) / 0.301).long(),
            ),
        )
        for _ in range(LAYERS)
    ]
    encoder, head = hstu.HSTUJagged(layers, None), nn.Linear(dim, ACTIONS)
    t = batch.tokens
    offsets = F.pad(torch.cumsum(t.memory_lengths, 0), (1, 0))
    place = jagged.owners(t.memory_lengths) * window + jagged.positions(t.memory_lengths)
    seconds_of = torch.zeros(len(t.memory_lengths) * window, dtype=torch.int64)
    seconds_of[place] = t.memory_times // 1000
    mask = torch.ones(window, window).tril()

    def step() -> Tensor:
        encoder.zero_grad()
        head.zero_grad()
        t.memory_vectors.grad = None
        out, _ = encoder.jagged_forward(t.memory_vectors, offsets, seconds_of.view(-1, window), mask)
        loss = F.binary_cross_entropy_with_logits(head(out), batch.taken)
        loss.backward()
        return loss.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="training steps beside Meta's research HSTU")
    parser.add_argument("--window", type=int, default=200, help="histories are cut there")
    parser.add_argument("--dim", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7, help="of either's steps, by turns")
    parser.add_argument("--sequences", type=int, default=128, help="of the batch that both are given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    library = operators()
    batch = Batch.draw(args.window, args.dim).parts(args.sequences)[0]
    leaf = batch.tokens.memory_vectors.detach().requires_grad_()
    batch = Batch(dataclasses.replace(batch.tokens, memory_vectors=leaf), batch.taken)
    model = HSTU(ModelConfig(dim=args.dim, heads=1, layers=LAYERS, dtype="float32"), ACTIONS)
    steps = {"grstream": ours(model, batch), "meta_research": metas(batch, args.window, args.dim)}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, time.process_time))
    tokens = len(batch.taken)
    result: dict[str, Any] = {name: round(tokens / statistics.median(t)) for name, t in times.items()}
    pairs = zip(times["meta_research"], times["grstream"], strict=True)
    result |= {"unit": "tokens/s", "ratio": round(statistics.median(their / our for their, our in pairs), 2)}
    result |= {"window": args.window, "dim": args.dim, "tokens": tokens}
    del library
    print(json.dumps(result))


if __name__ == "__main__":
    main()
