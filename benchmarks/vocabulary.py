"""The vocabulary under a budget: keys a second through lookup, admission, eviction, gather and update.

    python -m benchmarks.vocabulary [--quick] [--json FILE]

2 million keys stream in with Zipf's frequencies (exponent 1.05) and drift: the frequent ones of the beginning
are not those of the end. A budget of 500,000 rows of 64 numbers, micro-batches of 65,536 keys. A step finds
the distinct keys of its micro-batch, admits them (and evicts what must go), gathers a row for each key and
applies rowwise Adagrad to the distinct rows.

    keys_per_s                              keys through whole steps, once the budget is full
    lookup_keys_per_s, dict_lookup_keys_per_s, ratio     finding rows of the same keys, beside a dict of all
    kept_share                              of the keys of a micro-batch, those that had a row when it came
"""

import argparse
import json
import pathlib
import statistics
import time

import numpy as np
import torch

from grstream.vocabulary import Vocabulary

KEYS, BUDGET, DIM, BATCH = 2_000_000, 500_000, 64, 65_536
EXPONENT = 1.05


def drawn(random: np.random.Generator, cumulated: np.ndarray, keys: np.ndarray, along: float) -> np.ndarray:
    """A micro-batch of keys: ranks by Zipf, laid on the keys a bit further on the longer the stream runs."""
    ranks = np.searchsorted(cumulated, random.random(BATCH))
    return keys[(ranks + int(along * len(keys))) % len(keys)]


def main() -> None:
    parser = argparse.ArgumentParser(description="keys a second through a vocabulary under a budget")
    parser.add_argument("--quick", action="store_true", help="half a minute")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result there")
    args = parser.parse_args()
    steps = 150 if args.quick else 1000
    random = np.random.default_rng(0)
    keys = random.integers(-(2**63), 2**63 - 1, KEYS)
    weights = np.arange(1, KEYS + 1) ** -EXPONENT
    cumulated = np.cumsum(weights / weights.sum())
    vocabulary = Vocabulary(DIM, budget=BUDGET)
    for part in np.array_split(keys[:BUDGET], 16):
        vocabulary.admit(np.unique(part), np.ones(len(part), np.bool_))
    whole, finding, by_dict, kept = [], [], [], []
    for step in range(steps):
        batch = drawn(random, cumulated, keys, step / steps)
        start = time.perf_counter()
        distinct, inverse = np.unique(batch, return_inverse=True)
        rows = vocabulary.admit(distinct, np.ones(len(distinct), np.bool_))
        vectors = vocabulary.gather(rows[inverse])
        vocabulary.update(rows, vectors[: len(rows)] * 1e-3, 0.05)
        whole.append(time.perf_counter() - start)
        kept.append(1 - len(vocabulary.fresh) / len(distinct))
        if step % 10 == 0:
            every = np.arange(len(vocabulary))
            held = dict(zip(vocabulary.keys_of(every).tolist(), every.tolist(), strict=True))
            start = time.perf_counter()
            found = vocabulary.lookup(batch)
            middle = time.perf_counter()
            expected = np.fromiter((held[key] for key in batch.tolist()), np.int64, len(batch))
            by_dict.append(time.perf_counter() - middle)
            finding.append(middle - start)
            assert (found == expected).all()
    result = {
        "keys_per_s": round(BATCH / statistics.median(whole)),
        "lookup_keys_per_s": round(BATCH / statistics.median(finding)),
        "dict_lookup_keys_per_s": round(BATCH / statistics.median(by_dict)),
        "ratio": round(statistics.median(d / f for d, f in zip(by_dict, finding, strict=True)), 2),
        "kept_share": round(statistics.mean(kept), 4),
        "rows": len(vocabulary),
        "evicted": vocabulary.evicted,
        "threads": torch.get_num_threads(),
    }
    for name, value in result.items():
        print(f"{name:24} {value:14,}")
    line = json.dumps(result)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
