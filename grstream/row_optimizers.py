"""The rowwise optimizers of embedding rows, and what each keeps of a row (kernels/embedding.py says how)."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels import embedding

Columns = Mapping[str, npt.NDArray]


class RowOptimizer:
    """Columns beside a table of rows, which grow, are cleared and are saved with it."""

    name: ClassVar[str]

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns  # each (rows held, ...)

    def update(self, table: Tensor, rows: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """Change these distinct rows (n,) of the table by their gradient (n, d)."""
        raise NotImplementedError

    def grow(self, size: int) -> None:
        """Hold so many rows; what a new one holds is undefined until it is cleared."""
        for name, column in self.columns.items():
            grown = column.new_empty(size, *column.shape[1:])
            grown[: len(column)] = column
            self.columns[name] = grown

    def clear(self, rows: Tensor) -> None:
        """Forget what these rows have been through."""
        for column in self.columns.values():
            column[rows] = 0

    def state(self, count: int) -> dict[str, npt.NDArray]:
        """A copy of the columns' first `count` rows, in main memory."""
        return {name: column[:count].cpu().numpy().copy() for name, column in self.columns.items()}

    def load(self, state: Columns) -> None:
        """Take these columns over as the first rows. Raises ValueError for another optimizer's."""
        if state.keys() != self.columns.keys():
            raise ValueError(
                f"embedding rows with {', '.join(sorted(state))} are not those of {self.name}, which keeps "
                f"{', '.join(sorted(self.columns))}: train.row_optimizer must stay what it was"
            )
        for name, column in self.columns.items():
            column[: len(state[name])] = torch.from_numpy(np.array(state[name]))


class RowAdagrad(RowOptimizer):
    """One accumulator a row, of the mean squared gradient."""

    name = "adagrad"

    def __init__(self, dim: int, device: torch.device) -> None:
        super().__init__({"squares": torch.empty(0, device=device)})

    def update(self, table: Tensor, rows: Tensor, gradient: Tensor, learning_rate: float) -> None:
        embedding.rowwise_adagrad_(table, self.columns["squares"], rows, gradient, learning_rate)


class RowAdamW(RowOptimizer):
    """A first moment an element, a second one a row, and each row's own count of steps."""

    name = "adamw"

    def __init__(self, dim: int, device: torch.device) -> None:
        super().__init__(
            {
                "means": torch.empty(0, dim, device=device),
                "squares": torch.empty(0, device=device),
                "steps": torch.empty(0, dtype=torch.int32, device=device),
            }
        )

    def update(self, table: Tensor, rows: Tensor, gradient: Tensor, learning_rate: float) -> None:
        of = self.columns
        embedding.rowwise_adamw_(
            table, of["means"], of["squares"], of["steps"], rows, gradient, learning_rate
        )


OPTIMIZERS: dict[str, type[RowAdagrad] | type[RowAdamW]] = {o.name: o for o in (RowAdagrad, RowAdamW)}
