"""The one rule of sight (law 1), as data: which memory tokens each row of queries may see.

Row i of a sequence sees the first `prefix_i` memory tokens of its own sequence, and itself. A memory token is
the row whose prefix is its own index; a candidate is a row whose prefix is the whole history. Training,
prefill, extending a cache and scoring differ in nothing but these numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels.buckets import UNKNOWN_TIME

Plan = TypeVar("Plan")


@dataclasses.dataclass(frozen=True, eq=False)
class Sight:
    """S sequences with M memory tokens and R rows, each packed sequence after sequence. All int64."""

    memory_lengths: Tensor  # (S,) memory tokens of each sequence
    memory_times: Tensor  # (M,) milliseconds, UNKNOWN_TIME where not known
    row_lengths: Tensor  # (S,) rows of each sequence
    row_prefix: Tensor  # (R,) memory tokens of its own sequence that the row sees; also its position
    row_times: Tensor  # (R,) milliseconds, UNKNOWN_TIME where not known
    _plans: dict[tuple[Any, ...], Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

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

    @functools.cached_property
    def row_clock(self) -> Tensor:
        """The rows' times as buckets want them, (R,): unknown ones as far ahead as memory's lie behind."""
        return torch.where(self.row_times == UNKNOWN_TIME, -UNKNOWN_TIME, self.row_times)

    def planned(self, build: Callable[..., Plan], *options: Any) -> Plan:
        """`build(self, *options)`: what an implementation derives, once for all layers of a pass."""
        key = (build, *options)
        if key not in self._plans:
            self._plans[key] = build(self, *options)
        return self._plans[key]
