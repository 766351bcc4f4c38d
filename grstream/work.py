"""What is still to be done for a request: the rows that it asks the encoder for, and its answer from them."""

import abc
import dataclasses
import time
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from grstream.histories import History
from grstream.keys import ABSENT, Keys
from grstream.scores import (
    Encoded,
    NonFiniteScores,
    Rank,
    Ranked,
    Recommend,
    Recommended,
    Retrieve,
    Retrieved,
    WrongFeatures,
)
from grstream.sequences import Sequence
from grstream.served import Served, as_trained, candidate_vectors, require_finite_scores
from grstream.shelf import Shelf
from grstream.tokens import Kind, candidate_kind

Answer = TypeVar("Answer", Ranked, Retrieved, Recommended)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Query tokens of one request, each of which sees the whole of its history."""

    vectors: Tensor  # (r, d)
    kind: Kind


class Work(abc.ABC, Generic[Answer]):
    """One request under one version, `history` and `context` being in the columns of its weights."""

    history: History
    context: Keys  # (C,)

    def __init__(self, served: Served, shelf: Shelf) -> None:
        self.served, self.shelf = served, shelf
        self._begun = time.monotonic()
        self._encoded: float | None = None  # when the first rows were asked for, which is once all is encoded

    def began_to_score(self) -> None:
        self._encoded = self._encoded or time.monotonic()

    def timed(self, encoded: Encoded) -> Encoded:
        """With the time that went before the first rows."""
        took = 0.0 if self._encoded is None else self._encoded - self._begun
        return dataclasses.replace(encoded, encode_ms=1e3 * took)

    def names_of(self, items: Keys) -> dict[int, str]:
        return self.shelf.names_of(items) | self.served.names_of(items)

    @property
    @abc.abstractmethod
    def left(self) -> int:
        """Rows that are wanted next; 0 when there is an answer."""

    @abc.abstractmethod
    def rows(self, most: int) -> Rows:
        """The next rows, at most so many."""

    @abc.abstractmethod
    def take(self, outputs: Tensor, sequence: Sequence) -> None:
        """The encoder's outputs (r, d) for them."""

    @abc.abstractmethod
    def answer(self, sequence: Sequence, encoded: Encoded) -> Answer: ...


class Ranking(Work[Ranked]):
    """Raises WrongFeatures."""

    def __init__(self, served: Served, shelf: Shelf, ask: Rank) -> None:
        super().__init__(served, shelf)
        self.history, self._features = as_trained(served, ask.history, ask.features, len(ask.items))
        self.context = np.full(served.schema.contexts, ABSENT, np.int64)
        if len(ask.items):
            self.context = self._features[0, : served.schema.contexts]
        self._items, self._asked = ask.items, 0
        self._known: list[np.ndarray] = []
        self._logits: list[Tensor] = []

    @property
    def left(self) -> int:
        return len(self._items) - self._asked

    def rows(self, most: int) -> Rows:
        self.began_to_score()
        at = slice(self._asked, self._asked + most)
        vectors, known = candidate_vectors(self.served, self._items[at], self._features[at])
        self._asked += len(vectors)
        self._known.append(known)
        return Rows(vectors, candidate_kind(self.served.interleaved))

    def take(self, outputs: Tensor, sequence: Sequence) -> None:
        self._logits.append(self.served.model.action_logits(outputs).float())

    def probabilities(self) -> np.ndarray:
        """Of all candidates: (C, A)."""
        actions = len(self.served.schema.actions)
        logits = torch.cat(self._logits) if self._logits else torch.empty(0, actions)
        require_finite_scores(self.served, logits)
        return torch.sigmoid(logits).cpu().numpy()

    def answer(self, sequence: Sequence, encoded: Encoded) -> Ranked:
        known = np.concatenate(self._known) if self._known else np.zeros(0, np.bool_)
        told = (self.served.number, sequence.reuse, self.served.schema.actions, self.timed(encoded))
        return Ranked(self.probabilities(), known, *told)


class Retrieval(Work[Retrieved]):
    """Raises WrongFeatures."""

    def __init__(self, served: Served, shelf: Shelf, ask: Retrieve) -> None:
        super().__init__(served, shelf)
        contexts = served.given.contexts
        asked = np.full((1, len(served.given.features)), ABSENT, np.int64)
        if ask.context is not None:
            if len(ask.context) != contexts:
                raise WrongFeatures(f"expected {contexts} features of context, got {len(ask.context)}")
            asked[0, :contexts] = ask.context
        self.history, features = as_trained(served, ask.history, asked, 1)
        self.context = features[0, : served.schema.contexts]
        self._ask = ask
        self._user: Tensor | None = None  # (1, d)

    @property
    def left(self) -> int:
        return int(self._user is None)

    def rows(self, most: int) -> Rows:
        self.began_to_score()
        return Rows(self.served.model.start.new_zeros(1, len(self.served.model.start)), Kind.REQUEST)

    def take(self, outputs: Tensor, sequence: Sequence) -> None:
        assert sequence.newest is not None
        self._user = self.served.model.user_vectors(sequence.newest + outputs)

    def found(self) -> tuple[Keys, np.ndarray]:
        """Keys and scores of the best items: (k,) and (k,)."""
        assert self._user is not None
        if not bool(torch.isfinite(self._user).all()):
            raise NonFiniteScores(f"version {self.served.number} gave a user vector that is not finite")
        return self.shelf.search(self._user.float(), self._ask.k, self._ask.exclude, self._ask.allow)

    def answer(self, sequence: Sequence, encoded: Encoded) -> Retrieved:
        items, scores = self.found()
        names = self.names_of(items)
        return Retrieved(items, names, scores, self.served.number, sequence.reuse, self.timed(encoded))


class Recommendation(Work[Recommended]):
    """Retrieves, then ranks what it found, over one encoded history. Raises WrongFeatures."""

    def __init__(self, served: Served, shelf: Shelf, ask: Recommend) -> None:
        super().__init__(served, shelf)
        self._ask = ask
        self._retrieval = Retrieval(served, shelf, ask)
        self.history, self.context = self._retrieval.history, self._retrieval.context
        self._ranking: Ranking | None = None
        self._items = np.zeros(0, np.int64)

    @property
    def left(self) -> int:
        return self._retrieval.left if self._ranking is None else self._ranking.left

    def rows(self, most: int) -> Rows:
        return (self._ranking or self._retrieval).rows(most)

    def take(self, outputs: Tensor, sequence: Sequence) -> None:
        if self._ranking is not None:
            self._ranking.take(outputs, sequence)
            return
        self._retrieval.take(outputs, sequence)
        self._items, _ = self._retrieval.found()
        given = self.served.given
        features = self.shelf.features(self._items, len(given.features), given.contexts)
        if self._ask.context is not None:
            features[:, : given.contexts] = self._ask.context
        ask = Rank(history=self._ask.history, at_ms=self._ask.at_ms, items=self._items, features=features)
        self._ranking = Ranking(self.served, self.shelf, ask)

    def answer(self, sequence: Sequence, encoded: Encoded) -> Recommended:
        assert self._ranking is not None
        probabilities, actions = self._ranking.probabilities(), self.served.schema.actions
        weights = dict(self._ask.weights)
        scores = probabilities @ np.array([weights.get(name, 0.0) for name in actions], np.float32)
        order = np.argsort(-scores, kind="stable")
        items = self._items[order]
        return Recommended(
            items=items,
            names=self.names_of(items),
            probabilities=probabilities[order],
            scores=scores[order],
            actions=actions,
            version=self.served.number,
            reuse=sequence.reuse,
            encoded=self._retrieval.timed(encoded),
        )


def work_for(served: Served, shelf: Shelf, ask: Rank | Retrieve) -> Work:
    """Raises WrongFeatures."""
    if isinstance(ask, Rank):
        return Ranking(served, shelf, ask)
    if isinstance(ask, Recommend):
        return Recommendation(served, shelf, ask)
    return Retrieval(served, shelf, ask)
