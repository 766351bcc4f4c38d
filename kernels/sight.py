"""The one rule of sight (law 1), as data: which memory tokens each row of queries may see.

Row i of a sequence sees the first `prefix_i` memory tokens of its own sequence, and itself. A memory token is
the row whose prefix is its own index; a candidate is a row whose prefix is the whole history. Training,
prefill, extending a cache and scoring differ in nothing but these numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")


@dataclasses.dataclass(frozen=True, eq=False)
class Sight:
    """S sequences with M memory tokens and R rows, each packed sequence after sequence. All int64."""

    memory_lengths: Tensor  # (S,) memory tokens of each sequence
    memory_times: Tensor  # (M,) milliseconds
    row_lengths: Tensor  # (S,) rows of each sequence
    row_prefix: Tensor  # (R,) memory tokens of its own sequence that the row sees; also its position
    row_times: Tensor  # (R,) milliseconds
    _plans: dict[tuple[Callable[..., Any], int], Any] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[:5]:
            tensor = getattr(self, field.name)
            if tensor.dtype != torch.int64 or tensor.dim() != 1:
                raise ValueError(
                    f"{field.name} must be int64 of one dimension: {tensor.dtype} {tensor.shape}"
                )
        for one, other in (("memory_lengths", "row_lengths"), ("row_prefix", "row_times")):
            if len(getattr(self, one)) != len(getattr(self, other)):
                raise ValueError(f"{one} and {other} must be equally long")

    def planned(self, build: Callable[["Sight", int], Plan], heads: int) -> Plan:
        """What an implementation derives from this sight, derived once for all layers of a pass."""
        if (build, heads) not in self._plans:
            self._plans[build, heads] = build(self, heads)
        return self._plans[build, heads]
