"""What a step costs on this machine, measured, and from it how much goes into one (the paper's b_m)."""

import dataclasses
import functools
import time
from collections.abc import Callable

import numpy as np
import torch

from grstream.kv_cache import KVCache
from grstream.model import HSTU
from grstream.pages import page_bytes
from grstream.tokens import Kind, Tokens

OVERHEAD = 0.03  # of a micro-batch's time: what it costs beyond its candidates
LEAST, MOST = 16, 8192  # candidates of a micro-batch
# (rows, memory tokens) that are measured, for scoring and for encoding behind so many.
SCORED = ((1, 64), (64, 64), (512, 64), (64, 512), (512, 512))
ENCODED = ((1, 64), (64, 64), (256, 64), (64, 448), (256, 256))
ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds of a call: some for itself, some for each row, some for each row and token that it sees."""

    call: float
    row: float
    pair: float

    def seconds(self, rows: int, n: int) -> float:
        return self.call + rows * (self.row + self.pair * n)

    def rows(self, seconds: float, n: int) -> int:
        """How many rows that see n tokens take so long, at least one."""
        return max(1, int((seconds - self.call) / (self.row + self.pair * n)))

    @classmethod
    def fitted(cls, cases: tuple[tuple[int, int], ...], seconds: list[float]) -> "Line":
        """The line that misses measured times by the least share of each."""
        a = np.array([[1.0, rows, rows * n] for rows, n in cases]) / np.array(seconds)[:, None]
        call, row, pair = np.linalg.lstsq(a, np.ones(len(cases)), rcond=None)[0].tolist()
        least = min(seconds) / 100
        return cls(max(call, least), max(row, least / 1000), max(pair, 1e-12))


@dataclasses.dataclass(frozen=True)
class Cost:
    """How long a step may take, and what goes into it."""

    step_s: float
    scoring: Line
    encoding: Line
    own_micro_batch: int | None = None  # instead of the measured one
    most_tokens: int | None = None  # encoded in a step, whatever they cost

    @classmethod
    def assumed(cls, step_s: float, micro_batch: int | None) -> "Cost":
        """Before anything was measured: a small model on a core."""
        return cls(step_s, Line(1e-3, 2e-6, 8e-9), Line(2e-3, 5e-6, 2e-8), micro_batch)

    @classmethod
    @torch.inference_mode()
    def measured(
        cls,
        model: HSTU,
        step_s: float,
        micro_batch: int | None,
        page_tokens: int = 32,
        dtype: str = "float32",
    ) -> "Cost":
        """By running the model, which also warms its kernels up. It takes some tenths of a second."""
        longest = max(n + rows for rows, n in ENCODED)
        pages = -(-longest // page_tokens)
        cache = KVCache(model, pages * page_bytes(model, page_tokens, dtype), page_tokens, dtype)
        held, device = cache.take(pages), model.start.device

        def encode(rows: int, n: int) -> None:
            times = torch.arange(n, n + rows, device=device) * 60_000
            vectors = torch.randn(rows, len(model.start), device=device)
            tokens = Tokens.of_events(torch.tensor([rows], device=device), vectors, times % 2, times)
            paged = cache.cache([n + rows], [held[: -(-(n + rows) // page_tokens)]])
            model.grow(paged, tokens, torch.tensor([rows - 1], device=device)).sum().item()

        def score(rows: int, n: int) -> None:
            count = torch.tensor([rows], device=device)
            prefix, times = count.new_full((rows,), n), count.new_full((rows,), n * 60_000)
            vectors = torch.randn(rows, len(model.start), device=device)
            tokens = Tokens.of_candidates(count, vectors, prefix, times, Kind.CANDIDATE)
            paged = cache.cache([n], [held[: -(-n // page_tokens)]])
            model.action_logits(model.score(paged, tokens)).sum().item()

        encode(longest, 0)
        scoring = Line.fitted(SCORED, [_least(functools.partial(score, *case)) for case in SCORED])
        encoding = Line.fitted(ENCODED, [_least(functools.partial(encode, *case)) for case in ENCODED])
        return cls(step_s, scoring, encoding, micro_batch)

    def micro_batch(self, n: int) -> int:
        """Candidates of a request that sees n tokens in one step.

        As many as make what a call costs by itself small, but no more than a step has time for.
        """
        if self.own_micro_batch is not None:
            return self.own_micro_batch
        enough = self.scoring.call / (OVERHEAD * (self.scoring.row + self.scoring.pair * n))
        power = 1 << max(0, int(np.ceil(np.log2(max(1.0, enough)))))
        return max(LEAST, min(power, MOST, self.scoring.rows(self.step_s, n)))

    def tokens(self, seconds: float, n: int) -> int:
        """How many tokens can be encoded behind n others in so long, at least one."""
        count = self.encoding.rows(seconds, n)
        return count if self.most_tokens is None else min(count, self.most_tokens)


def _least(work: Callable[[], None]) -> float:
    work()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)
