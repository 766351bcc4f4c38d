"""What an engine answers, and why it would not.

Apart from the engine so that a process which only passes answers on, like the gateway, need not import torch.
"""

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from grstream.keys import Keys


class EngineNotReady(RuntimeError):
    """No weights version has been swapped in yet: wait until the trainer has published one."""


class UnusableWeights(RuntimeError):
    """A version that is intact but must not serve: not finite, or not what its recipe describes."""


class WrongFeatures(ValueError):
    """Feature columns of a history or of candidates are not as many as there should be."""


class NonFiniteScores(RuntimeError):
    """Finite weights gave a score that is not a number. Nothing is answered."""


class Reuse(enum.StrEnum):
    """What the cache of keys and values spared a request."""

    HIT = "hit"  # everything: the history is the one that was cached
    EXTEND = "extend"  # all but the newest events
    MISS = "miss"  # nothing


@dataclasses.dataclass(frozen=True)
class Ranked:
    """C candidates scored, in the order given, for the A actions that the version was trained with."""

    probabilities: npt.NDArray[np.float32]  # (C, A)
    known: npt.NDArray[np.bool_]  # (C,) whether the weights have a row for the item
    version: int
    reuse: Reuse
    actions: tuple[str, ...]  # (A,) their names


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """The best items for a user, best first; fewer than asked for where there are no more."""

    items: Keys  # (k,)
    names: dict[int, str]  # ids of those items whose id is a string
    scores: npt.NDArray[np.float32]  # (k,)
    version: int
    reuse: Reuse
