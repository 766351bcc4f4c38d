"""Retrieval: milliseconds a query of the exact and the approximate index, beside one plain product and topk.

    python -m benchmarks.retrieval [--quick] [--json FILE]

Unit vectors in clusters, 64 numbers each, with priors; k = 100; one thread. The plain peer keeps all scores.

    ms, plain_ms                            a query (a batch of `users` at once), the median
    faiss_ms, recall, build_s               the same by faiss; its share of the exact k best
    after_ms                                a version in which one item in a thousand has changed (exact)
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from grstream.item_index import ExactIndex, FaissIndex

DIM, K, CLUSTERS = 64, 100, 500


def around(centres: torch.Tensor, count: int) -> torch.Tensor:
    """Unit vectors near some centres."""
    noise = torch.randn(count, DIM) * (0.5 / DIM**0.5)
    return F.normalize(centres[torch.randint(len(centres), (count,))] + noise, dim=1)


def median_ms(run: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return round(1000 * statistics.median(taken[1:]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="milliseconds a retrieval query")
    parser.add_argument("--quick", action="store_true", help="200,000 items instead of a million for faiss")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    times = 7 if args.quick else 25
    centres = F.normalize(torch.randn(CLUSTERS, DIM), dim=1)
    vectors, prior = around(centres, 1_000_000), 0.05 * torch.randn(1_000_000)
    rows = []
    for items in (200_000, 1_000_000):
        some, own = vectors[:items], prior[:items]
        exact = ExactIndex(some, own)
        places = np.arange(0, items, 1000)
        at = torch.from_numpy(places)
        after_ms = median_ms(lambda: exact.after(places, some[at], own[at]), 3)  # noqa: B023
        faiss, build_s = None, None
        if not args.quick or items == 200_000:
            start = time.perf_counter()
            faiss = FaissIndex(exact, cells=1024)
            build_s = round(time.perf_counter() - start, 2)
        for count in (1, 8):
            users = around(centres, count)
            row: dict[str, float | int | None] = {"items": items, "users": count, "after_ms": after_ms}
            row["plain_ms"] = median_ms(lambda: torch.topk(users @ some.T + own, K), times)  # noqa: B023
            row["ms"] = median_ms(lambda: exact.search(users, K), times)  # noqa: B023
            row["build_s"] = build_s
            if faiss is not None:
                row["faiss_ms"] = median_ms(lambda: faiss.search(users, K), times)  # noqa: B023
                row["recall"] = round(faiss.recall(around(centres, 64), K), 4)
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    result = {"rows": rows, "load": round(os.getloadavg()[0], 2)}
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
