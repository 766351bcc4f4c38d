"""What an engine is asked, what it answers, and why it would not.

Apart from the engine so that a process which only passes answers on, like the gateway, need not import torch.
"""

import dataclasses
import enum
from typing import Literal

import numpy as np
import numpy.typing as npt

from grstream.histories import History
from grstream.keys import Keys


class EngineNotReady(RuntimeError):
    """No weights version has been swapped in yet: wait until the trainer has published one."""


class UnusableWeights(RuntimeError):
    """A version that is intact but must not serve: not finite, or not what its recipe describes."""


class WrongFeatures(ValueError):
    """Feature columns of a history or of candidates are not as many as there should be."""


class NonFiniteScores(RuntimeError):
    """Finite weights gave a score that is not a number. Nothing is answered."""


class DeadlineExceeded(TimeoutError):
    """A request's time was over before its turn came: no work was spent on it, or no more."""


class EngineStopped(RuntimeError):
    """The engine was closed, or its thread ended, while it held a request."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ask:
    """A question about a user's history at a time.

    With `user` the history is what is remembered of that user: its unfilled last page is kept, and it is
    encoded anew for the next version. Not so one that the request brought itself.
    """

    history: History
    at_ms: int
    user: int | None = None
    brought: bool = False
    deadline: float | None = None  # of time.monotonic()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rank(Ask):
    """The probability of each action for each candidate.

    The columns of context are the request's, so they must be the same for all candidates.
    """

    items: Keys  # (C,)
    features: Keys | None = None  # (C, F) feature keys, ABSENT where there is none


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Retrieve(Ask):
    """The k items of the highest score, by exact search: user · item vector + prior."""

    k: int
    context: Keys | None = None  # (C,) feature keys, ABSENT where there is none
    exclude: Keys | None = None
    allow: Keys | None = None  # only these


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recommend(Retrieve):
    """The k items retrieved, ranked by the sum over actions of weight · probability."""

    weights: tuple[tuple[str, float], ...]  # of actions


Arm = Literal["a", "b"]  # of an A/B test: all others, and those who are served by the version beside


class Reuse(enum.StrEnum):
    """What the cache of keys and values spared a request."""

    HIT = "hit"  # everything: the history is the one that was cached
    EXTEND = "extend"  # all but the newest events
    MISS = "miss"  # nothing


@dataclasses.dataclass(frozen=True)
class Encoded:
    """How a request's history came to be encoded."""

    tokens: int  # of the history
    cached: int  # of them, found in the cache
    waited_ms: float  # until the first step that worked on it
    took_ms: float  # from the asking to the answer
    encode_ms: float = 0.0  # of that, from that first step until all of the history was encoded

    @property
    def score_ms(self) -> float:
        """From then on to the answer."""
        return max(0.0, self.took_ms - self.waited_ms - self.encode_ms)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """C candidates scored, in the order given, for the A actions that the version was trained with."""

    probabilities: npt.NDArray[np.float32]  # (C, A)
    known: npt.NDArray[np.bool_]  # (C,) whether the weights have a row for the item
    version: int
    reuse: Reuse
    actions: tuple[str, ...]  # (A,) their names
    encoded: Encoded | None = None
    arm: Arm | None = None


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """The best items for a user, best first; fewer than asked for where there are no more."""

    items: Keys  # (k,)
    names: dict[int, str]  # ids of those items whose id is a string
    scores: npt.NDArray[np.float32]  # (k,)
    version: int
    reuse: Reuse
    encoded: Encoded | None = None
    arm: Arm | None = None


@dataclasses.dataclass(frozen=True)
class Recommended:
    """Retrieved items in the order of their weighted probabilities, best first."""

    items: Keys  # (k,)
    names: dict[int, str]  # ids of those items whose id is a string
    probabilities: npt.NDArray[np.float32]  # (k, A)
    scores: npt.NDArray[np.float32]  # (k,) weighted sums
    actions: tuple[str, ...]  # (A,)
    version: int
    reuse: Reuse
    encoded: Encoded | None = None
    arm: Arm | None = None
