"""What the ranks of a training group tell each other; a single rank talks to nobody."""

import dataclasses
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from grstream.keys import Keys

T = TypeVar("T")


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

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Sum these tensors over the ranks, in place, as one message."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1).float() for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def union(self, keys: Keys, items: npt.NDArray[np.bool_]) -> tuple[Keys, npt.NDArray[np.bool_]]:
        """The distinct keys of all ranks in ascending order, each with its flag."""
        if self.world > 1:
            parts = self.gather((keys, items))
            keys = np.concatenate([k for k, _ in parts])
            items = np.concatenate([i for _, i in parts])
        keys, first = np.unique(keys, return_index=True)
        return keys, items[first]
