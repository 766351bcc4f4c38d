"""What the ranks of a training group tell each other; a single rank talks to nobody.

Objects and arrays go between hosts, tensors between the devices that they are on: with a backend for each
(`cpu:gloo,cuda:nccl`) no GPU waits for what hosts say.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

T = TypeVar("T")
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The group as one rank sees it. Every method is called by all ranks together, in the same order."""

    rank: int = 0
    world: int = 1

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.world == 1:
            return [value]
        out: list[T | None] = [None] * self.world
        dist.all_gather_object(out, value)
        return out  # type: ignore[return-value]

    def collect(self, value: T) -> list[T] | None:
        """Every rank's value at rank 0, None at the others."""
        if self.world == 1:
            return [value]
        out: list[T | None] | None = None if self.rank else [None] * self.world
        dist.gather_object(value, out)
        return out  # type: ignore[return-value]

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Sum these tensors over the ranks, in place, as one message."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1).float() for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def exchange(self, parts: Sequence[Ints]) -> list[Ints]:
        """Part r goes to rank r; what came from each rank. Their lengths are told first."""
        if self.world == 1:
            return list(parts)
        sent = [len(part) for part in parts]
        lengths = torch.empty(self.world, dtype=torch.int64)
        dist.all_to_all_single(lengths, torch.tensor(sent))
        received = lengths.tolist()
        out = torch.empty(sum(received), dtype=torch.int64)
        dist.all_to_all_single(out, torch.from_numpy(np.concatenate(parts)), received, sent)
        return [part.numpy() for part in out.split(received)]

    def exchange_rows(
        self,
        rows: torch.Tensor,  # (sum of sent, d), those for rank 0 first
        sent: Sequence[int],  # to each rank
        received: Sequence[int],  # from each rank
    ) -> torch.Tensor:
        """What came, in the order of the ranks: (sum of received, d)."""
        if self.world == 1:
            return rows
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent))
        return out
