"""A learner's files in a checkpoint: one of what all ranks hold alike, and a part of the vocabulary each.

Parts are of as many ranks as there were. Checkpoints of before the vocabulary was dealt out to ranks hold all
of it in the first file, and are read as one part.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import torch

from grstream.candidates import CandidatesState
from grstream.vocabulary import VocabularyState
from grstream.weights import NonFiniteWeights

LEARNER = "learner.pt"


@dataclasses.dataclass(frozen=True)
class LearnerState:
    """One rank's part of a learner as it was after a step, to be written while that goes on."""

    rank: int
    world: int
    common: dict[str, Any] | None  # tensors, at rank 0
    vocabulary: VocabularyState

    def save(self, directory: pathlib.Path) -> None:
        """Write it into an existing directory. Raises NonFiniteWeights: nobody could go on from those."""
        if self.common is not None:
            for name, tensor in self.common["model"].items():
                self._require_finite(name, tensor)
            torch.save({**self.common, "ranks": self.world}, directory / LEARNER)
        part = to_tensors(dataclasses.asdict(self.vocabulary))
        self._require_finite("the embedding rows", part["rows"])
        torch.save(part, directory / _part(self.rank, self.world))

    def _require_finite(self, name: str, tensor: torch.Tensor) -> None:
        if not torch.isfinite(tensor).all():
            raise NonFiniteWeights(f"the weights are not saved: {name} is not finite")

    @staticmethod
    def read(directory: pathlib.Path) -> tuple[dict[str, Any], list[VocabularyState]]:
        """What all ranks hold alike, in arrays, and every rank's part of the vocabulary."""
        common = _load(directory / LEARNER, mmap=False)
        if "vocabulary" in common:
            return common, [_before_parts({**common["vocabulary"]})]
        world = common.pop("ranks")
        return common, [_vocabulary(_load(directory / _part(r, world), mmap=True)) for r in range(world)]


def copied(value: Any) -> Any:
    """Tensors as copies in main memory, and arrays, which are copies already, as tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(v) for v in value)
    return to_tensors(value)


def to_tensors(value: Any) -> Any:
    """Arrays as tensors, so that a checkpoint loads with weights_only."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {k: to_tensors(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_tensors(v) for v in value)
    return value


def _part(rank: int, world: int) -> str:
    return f"vocabulary-{rank}-of-{world}.pt"


def _load(path: pathlib.Path, mmap: bool) -> dict[str, Any]:
    """In arrays, with `mmap` views of the file."""
    loaded: dict[str, Any] = _to_arrays(torch.load(path, "cpu", weights_only=True, mmap=mmap))
    return loaded


def _vocabulary(held: dict[str, Any]) -> VocabularyState:
    candidates = held.pop("candidates")
    return VocabularyState(**held, candidates=candidates and CandidatesState(**candidates))


def _before_parts(held: dict[str, Any]) -> VocabularyState:
    """Of a checkpoint that held all in one; before rows had a budget it did not say when they were used."""
    used = held.pop("used", np.zeros(len(held["keys"]), np.int64))
    squares, counted = held.pop("squares"), held.pop("counts", None)
    if counted is not None:  # without times, before retrieval had a prior
        held |= {"levels": np.empty((len(counted), 0)), "clock_ms": 0}
    return VocabularyState(
        **held,
        used=used,
        optimizer={"squares": squares},
        admissions=int(used.max(initial=0)),
        budget=None,
    )


def _to_arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {k: _to_arrays(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_arrays(v) for v in value)
    return value
