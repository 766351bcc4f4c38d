"""The embedding of one weights version, for serving: keys to rows that never change."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from grstream.keys import Keys
from grstream.keytable import KeyTable
from grstream.vocabulary import vectors_of
from grstream.weights import Weights


@dataclasses.dataclass(frozen=True)
class EmbeddingTable:
    """Row and key of each place of a version. A key without a row has its initial vector."""

    seed: int
    places: KeyTable
    keys: Keys  # (n,)
    rows: torch.Tensor  # (n, d), on a CPU the version's own memory

    @classmethod
    def of(cls, weights: Weights, seed: int, device: torch.device | str = "cpu") -> "EmbeddingTable":
        places = KeyTable(len(weights.keys))
        places.insert(weights.keys)
        return cls(seed, places, weights.keys, torch.from_numpy(weights.rows).to(device))

    def after(self, weights: Weights, changed: npt.NDArray[np.int64]) -> "EmbeddingTable":
        """The table of later weights that differ at these places (ascending) alone; this one stays."""
        n = len(self.keys)
        held = changed[changed < n]
        renamed = held[self.keys[held] != weights.keys[held]]
        places = self.places.copy()
        # A table gives slots again last freed first, and then the next ones: so slots go on being places.
        places.remove(renamed[::-1])
        places.insert(np.concatenate([weights.keys[renamed], weights.keys[n:]]))
        rows = torch.from_numpy(weights.rows)
        if self.rows.device.type != "cpu":  # only what changed goes there
            at = torch.from_numpy(changed)
            rows = torch.cat([self.rows, self.rows.new_empty(len(rows) - n, rows.shape[1])]).index_copy_(
                0, at.to(self.rows.device), rows[at].to(self.rows.device)
            )
        return EmbeddingTable(self.seed, places, weights.keys, rows)

    def vectors(self, keys: Keys) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """The vector of each key, and whether it has a row: (n, d) and (n,)."""
        return vectors_of(keys, self.places.find(keys), self.rows, self.seed)
