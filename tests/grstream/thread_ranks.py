"""Ranks that are threads of this process, so that a test may have many groups of them."""

import concurrent.futures
import copy
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from grstream.ranks import Ints, Ranks

T = TypeVar("T")


class Meeting:
    """Where ranks put what they bring and see what all have brought."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world, timeout=60)
        self._brought: list[Any] = [None] * world

    def swap(self, rank: int, value: T) -> list[T]:
        self._brought[rank] = copy.deepcopy(value)
        self._barrier.wait()
        everything = copy.deepcopy(self._brought)
        self._barrier.wait()
        return everything

    def leave(self) -> None:
        self._barrier.abort()


@dataclasses.dataclass(frozen=True)
class ThreadRanks(Ranks):
    """As `Ranks`, by way of a meeting."""

    meeting: Meeting = dataclasses.field(default_factory=lambda: Meeting(1))

    def gather(self, value: T) -> list[T]:
        return self.meeting.swap(self.rank, value)

    def collect(self, value: T) -> list[T] | None:
        brought = self.meeting.swap(self.rank, value)
        return None if self.rank else brought

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        everyone = self.meeting.swap(self.rank, [t.detach() for t in tensors])
        for tensor, parts in zip(tensors, zip(*everyone, strict=True), strict=True):
            tensor.copy_(torch.stack(list(parts)).sum(0))

    def exchange(self, parts: Sequence[Ints]) -> list[Ints]:
        return [theirs[self.rank] for theirs in self.meeting.swap(self.rank, list(parts))]

    def exchange_rows(self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        parts = [
            theirs.split(to)[self.rank]
            for theirs, to in self.meeting.swap(self.rank, (rows.detach(), list(sent)))
        ]
        assert [len(part) for part in parts] == list(received)
        return torch.cat(parts)


def together(world: int, run: Callable[[Ranks], T]) -> list[T]:
    """What each of so many ranks returns; the first error of one, if any."""
    meeting = Meeting(world)

    def one(rank: int) -> T:
        try:
            return run(ThreadRanks(rank, world, meeting) if world > 1 else Ranks())
        except threading.BrokenBarrierError:
            raise
        except BaseException:
            meeting.leave()
            raise

    with concurrent.futures.ThreadPoolExecutor(world) as pool:
        running = [pool.submit(one, rank) for rank in range(world)]
        errors = [error for r in running if (error := r.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [r.result() for r in running]
