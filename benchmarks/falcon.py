"""Scoring candidates with and without the cache (M-FALCON, paper section 3.4): times, shares, the peer.

    [PYTHONPATH=generative-recommenders] python -m benchmarks.falcon [--quick] [--threads 2]

Model: 4 layers, d = 128, 4 heads of 32, both biases. For n events of history and m candidates:

- full_ms: the causal encoder over the history and all candidates in one go. cold_ms: the history into pages,
  then the candidates against them in micro-batches. cached_ms: the candidates alone.
- flop_ratio: what full computes over what cached does, counted: 10 d² a row and layer, 4 d a pair in sight.
- gflops, share: of cached. share is the time that the same products (of the same shapes, by the faster of two
  libraries) and as many SiLUs take alone, each measured in this run, over cached_ms. full_share: the same of
  full, with products at the rate of a large one.
- peer_ms: Meta's STUStack.cached_forward (PyTorch path) where it can be imported. It has no biases.
  The allocator is the process' own for both: set GLIBC_TUNABLES as grstream's launchers do.

Without --quick also throughput at m = 1,024 … 16,384 with and without micro-batches and cache.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peer import module, operators
from grstream.config import ModelConfig
from grstream.cost import Cost
from grstream.kv_cache import KVCache
from grstream.model import HSTU
from grstream.pages import PagedCache, page_bytes
from grstream.tokens import Kind, Tokens
from kernels.cpu_paged import CACHED_WEIGHTS
from kernels.matmul import matmul

DIM, LAYERS, HEADS = 128, 4, 4
WIDTH = DIM // HEADS
ACTIONS = 3
PAGE = 32
STEP_S = 0.1  # nobody else is waiting
SHAPES = ((512, 512), (2048, 1024), (4096, 256), (4096, 4096))
CURVE = (1024, 2048, 4096, 8192, 16384)


@dataclasses.dataclass
class Case:
    """A history of n tokens in pages, and m candidates at one time behind it."""

    model: HSTU
    n: int
    m: int
    micro_batch: int

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.n + self.m)
        dtype = "bfloat16" if self.model.layers[0].reduced else "float32"
        self.times = torch.randint(0, 10**8, (self.n,), generator=draw).cumsum(0)
        self.now = int(self.times[-1]) + 3_600_000
        self.vectors = torch.randn(self.n, DIM, generator=draw)
        self.actions = torch.randint(0, 1 << ACTIONS, (self.n,), generator=draw)
        self.candidates = torch.randn(self.m, DIM, generator=draw)
        pages = -(-self.n // PAGE)
        self.pool = KVCache(self.model, pages * page_bytes(self.model, PAGE, dtype), PAGE, dtype)
        self.pages = self.pool.take(pages)
        self.lengths = torch.tensor([self.n])
        self.prefill()

    def memory(self) -> Tokens:
        return Tokens.of_events(self.lengths, self.vectors, self.actions, self.times)

    def queries(self, rows: Tensor) -> Tokens:
        count = torch.tensor([len(rows)])
        prefix, times = count.new_full((len(rows),), self.n), count.new_full((len(rows),), self.now)
        return Tokens.of_candidates(count, rows, prefix, times, Kind.CANDIDATE)

    def paged(self) -> PagedCache:
        return self.pool.cache([self.n], [self.pages])

    def prefill(self) -> None:
        self.model.grow(self.paged(), self.memory(), torch.tensor([self.n - 1]))

    def cached(self, micro_batch: int | None = None) -> Tensor:
        parts = self.candidates.split(micro_batch or self.micro_batch)
        return torch.cat([self.model.score(self.paged(), self.queries(part)) for part in parts])

    def cold(self) -> Tensor:
        self.prefill()
        return self.cached()

    def full(self) -> Tensor:
        queries = self.queries(self.candidates)
        tokens = dataclasses.replace(
            self.memory(),
            query_lengths=queries.query_lengths,
            query_vectors=queries.query_vectors,
            query_kinds=queries.query_kinds,
            query_prefix=queries.query_prefix,
            query_times=queries.query_times,
        )
        return self.model(tokens).query

    @property
    def flops(self) -> dict[str, float]:
        """Of all layers."""
        row, pair = 10 * DIM * DIM, 4 * DIM
        pairs = self.m * (self.n + 1)
        cached = self.m * row + pairs * pair
        whole = (self.n + self.m) * row + (self.n * (self.n + 1) // 2 + pairs) * pair
        return {"cached": LAYERS * cached, "full": LAYERS * whole}

    @property
    def silus(self) -> dict[str, float]:
        columns, pairs = 4 * DIM, self.m * (self.n + 1)
        cached = self.m * columns + pairs * HEADS
        whole = (self.n + self.m) * columns + (self.n * (self.n + 1) // 2 + pairs) * HEADS
        return {"cached": LAYERS * cached, "full": LAYERS * whole}


def milliseconds(work: Callable[[], Any], rounds: int) -> list[float]:
    out = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        out.append(1e3 * (time.perf_counter() - began))
    return out


def least(work: Callable[[], Any], rounds: int = 5) -> float:
    work()
    return min(milliseconds(work, rounds))


def products_ms(m: int, n: int, dtype: torch.dtype) -> float:
    """The products of cached scoring alone, in blocks of rows that a cache holds, by the faster library."""
    x, w, o = (torch.randn(*s).to(dtype) for s in ((m, DIM), (DIM, 4 * DIM), (DIM, DIM)))
    q, k, v = (torch.randn(HEADS, r, WIDTH).to(dtype) for r in (m, n, n))
    rows = max(32, min(m, CACHED_WEIGHTS // n))
    weights = torch.randn(rows, n).to(dtype)

    def by(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        def once() -> None:
            product(x, w)
            product(x, o)
            for head in range(HEADS):
                for part in q[head].split(rows):
                    product(part, k[head].t())
                    product(weights[: len(part)], v[head])

        return least(once)

    return LAYERS * min(by(matmul), by(torch.matmul))


def silu_rate(dtype: torch.dtype) -> float:
    """SiLUs a millisecond, of numbers that a cache holds."""
    x = torch.randn(1 << 17).to(dtype)
    return len(x) / least(lambda: torch.ops.aten.silu.out(x, out=x), 50)


def product_rate(dtype: torch.dtype) -> float:
    """FLOP a millisecond of a large product, by the faster of two libraries."""
    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    return 2 * 1024**3 / min(least(lambda: matmul(a, b)), least(lambda: a @ b))


def peer(case: Case, dtype: torch.dtype) -> Callable[[], Any] | None:
    """Meta's stack over as long a history, ready to score as many candidates; None where it is not there."""
    if importlib.util.find_spec("generative_recommenders") is None:
        return None
    module()
    stu: Any = importlib.import_module("generative_recommenders.modules.stu")
    attention = stu.delta_hstu_mha  # of one sequence its result is a view that the next line cannot take
    stu.delta_hstu_mha = lambda **of: attention(**of).contiguous()
    common: Any = importlib.import_module("generative_recommenders.common")
    config = stu.STULayerConfig(
        embedding_dim=DIM, num_heads=HEADS, hidden_dim=WIDTH, attention_dim=WIDTH, output_dropout_ratio=0.0
    )
    stack = stu.STUStack([stu.STULayer(config, is_inference=True) for _ in range(LAYERS)], is_inference=True)
    stack.set_hammer_kernel(common.HammerKernel.PYTORCH)
    stack = stack.to(dtype).eval()
    n, m = case.n, case.m
    lengths, targets = torch.tensor([n + m]), torch.tensor([m])
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    x = torch.cat((case.vectors, case.candidates)).to(dtype)
    kept = {"max_kv_caching_len": n, "kv_caching_lengths": torch.tensor([n])}
    stack(x=x, x_lengths=lengths, x_offsets=offsets, max_seq_len=n + m, num_targets=targets, **kept)
    return lambda: stack.cached_forward(delta_x=x[n:], num_targets=targets)


def measured(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row of the table: everything by turns."""
    works: dict[str, Callable[[], Any]] = {"full": case.full, "cold": case.cold, "cached": case.cached}
    theirs = peer(case, dtype)
    if theirs is not None:
        works["peer"] = theirs
    difference = (case.full() - case.cached()).abs().max().item()
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name] += milliseconds(work, 1)
    best = {name: min(of) for name, of in times.items()}
    middle = {f"{name}_ms": round(statistics.median(of), 2) for name, of in times.items()}
    silu, rate = silu_rate(torch.float32), product_rate(dtype)
    alone = products_ms(case.m, case.n, dtype) + case.silus["cached"] / silu
    full_alone = case.flops["full"] / rate + case.silus["full"] / silu
    row: dict[str, Any] = {"n": case.n, "m": case.m, "dtype": str(dtype).removeprefix("torch.")}
    row |= middle
    row |= {
        "flop_ratio": round(case.flops["full"] / case.flops["cached"], 2),
        "speedup": round(best["full"] / best["cached"], 2),
        "gflops": round(case.flops["cached"] / best["cached"] / 1e6, 1),
        "share": round(alone / best["cached"], 3),
        "full_share": round(full_alone / best["full"], 3),
        "max_abs_diff": float(f"{difference:.2e}"),
        "micro_batch": case.micro_batch,
        "product_gflops": round(rate / 1e6, 1),
        "silu_g": round(silu / 1e6, 2),
    }
    if "peer" in best:
        row["peer_ratio"] = round(best["peer"] / best["cached"], 2)
    return row


def curve(models: dict[torch.dtype, tuple[HSTU, Cost]]) -> list[dict[str, Any]]:
    """Candidates a second behind a history of 4,096, as many more are asked for."""
    rows = []
    model, cost = models[torch.float32]
    for m in CURVE:
        case = Case(model, 4096, m, cost.micro_batch(4096))
        rows.append(
            {
                "m": m,
                "cached_and_micro_batches": round(m / least(case.cached, 2) * 1e3),
                "cached_at_once": round(m / least(lambda c=case: c.cached(c.m), 2) * 1e3),  # type: ignore[misc]
                "micro_batches_each_encoding_anew": round(m / least(lambda c=case: anew(c), 1) * 1e3),  # type: ignore[misc]
                "all_in_one_go": round(m / least(case.full, 1) * 1e3),
            }
        )
    return rows


def anew(case: Case) -> None:
    """Without a cache every micro-batch encodes the history again."""
    for part in case.candidates.split(case.micro_batch):
        case.prefill()
        case.model.score(case.paged(), case.queries(part))


def main() -> None:
    parser = argparse.ArgumentParser(description="scoring candidates with and without the cache")
    parser.add_argument(
        "--quick", action="store_true", help="without the curve over the number of candidates"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    library = operators() if importlib.util.find_spec("generative_recommenders") else None
    rows: list[dict[str, Any]] = []
    models: dict[torch.dtype, tuple[HSTU, Cost]] = {}
    with torch.inference_mode():
        for name in args.dtypes:
            torch.manual_seed(0)
            model = HSTU(ModelConfig(layers=LAYERS, dim=DIM, heads=HEADS, dtype=name), ACTIONS).eval()
            dtype = getattr(torch, name)
            models[dtype] = model, Cost.measured(model, STEP_S, None, PAGE, name)
            for n, m in SHAPES:
                case = Case(model, n, m, models[dtype][1].micro_batch(n))
                rows.append(measured(case, dtype, args.rounds))
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        result: dict[str, Any] = {"rows": rows, "threads": args.threads}
        if not args.quick and torch.float32 in models:
            result["curve"] = curve(models)
            for point in result["curve"]:
                print("  ".join(f"{key} {value}" for key, value in point.items()))
    del library
    print(json.dumps(result))


if __name__ == "__main__":
    main()
