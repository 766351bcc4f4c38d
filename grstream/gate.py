"""Whether a model in training is fit to be served: the gate before publishing and checkpoints.

Prequential entropy says it without held-out data: while the newest events are predicted much worse than those
before them, the weights are neither published nor saved, and if that lasts, training goes back to the newest
checkpoint, which is from before.
"""

import collections

import numpy as np

from grstream.config import TrainConfig
from grstream.metrics import Floats, Predictions, entropy, log_loss

SHORT = 10  # the newest events are the recent ones divided by this
SMOOTHING = 100.0  # pseudo-events of the long window's rates: in a short one a rare action may be missing


class Diverged(RuntimeError):
    """Predictions got much worse than they were, and stayed so."""

    def __init__(self, now: float, before: float, steps: int) -> None:
        super().__init__(now, before, steps)
        self.now, self.before, self.steps = now, before, steps

    def __str__(self) -> str:
        return (
            f"for {self.steps} steps the normalized entropy is {self.now:.3f}, and it was {self.before:.3f} "
            "before: the weights have diverged, or the stream has changed; look at what came, lower "
            "train.learning_rate, or raise train.max_entropy_jump to accept it"
        )


class EntropyGate:
    """Compares the normalized entropy of the newest events with that of the recent ones before.

    Both are sums over all actions of log loss by that of the entropy of the events' own rates, so that a
    change in how frequent actions are is no jump. What is judged bad does not become what the next events are
    compared with. Every rank that is given the same predictions judges the same.
    """

    def __init__(self, actions: int, config: TrainConfig) -> None:
        self._max_jump, self._patience = config.max_entropy_jump, config.bad_steps
        self._long = _Window(actions, config.recent_events)
        self._short = _Window(actions, max(1, config.recent_events // SHORT))
        self.bad_steps = 0  # in a row, so far

    @property
    def open(self) -> bool:
        """Whether the weights may be published and saved."""
        return self.bad_steps == 0

    def update(self, predictions: Predictions) -> None:
        """Judge a step by what was said of its events. Raises Diverged after too many bad ones."""
        timely = predictions.where(~predictions.late) if predictions.late.any() else predictions
        if not len(timely) or self._max_jump is None:
            return
        self._short.add(timely)
        if self._long.full:
            before = self._long.normalized_entropy(self._long.rates)
            weight = SMOOTHING / (SMOOTHING + self._short.events)
            rates = weight * self._long.rates + (1 - weight) * self._short.rates
            now = self._short.normalized_entropy(rates)
            # A model that is worse than the base rates is also more erratic.
            if now - before > self._max_jump * max(1, before):
                self.bad_steps += 1
                if self.bad_steps >= self._patience:
                    raise Diverged(now, before, self.bad_steps)
                return
        self.bad_steps = 0
        self._long.add(timely)

    def seed(self, recent: Predictions) -> None:
        """Begin with what is known of the recent events: a resumed trainer judges as it did.

        Where actions are new, with those from which on all were asked about. How a new action is predicted at
        first says nothing of the weights, so that it takes a whole window again until they are judged.
        """
        asked = np.isfinite(recent.probabilities.sum(1))
        if asked.any():
            self._long.add(recent.where(asked))


class _Window:
    """Sums over the newest events, a step at a time."""

    def __init__(self, actions: int, size: int) -> None:
        self._size = size
        self._steps: collections.deque[tuple[int, Floats]] = collections.deque()
        self._sums = np.zeros((2, actions))  # log loss, positives
        self.events = 0

    @property
    def full(self) -> bool:
        return self.events >= self._size

    @property
    def rates(self) -> Floats:
        """Of each action: (A,)"""
        return self._sums[1] / self.events

    def add(self, predictions: Predictions) -> None:
        sums = np.stack(
            [log_loss(predictions.probabilities, predictions.labels).sum(0), predictions.labels.sum(0)]
        )
        self._steps.append((len(predictions), sums))
        self._sums += sums
        self.events += len(predictions)
        while self.events - self._steps[0][0] >= self._size:
            events, sums = self._steps.popleft()
            self._sums -= sums
            self.events -= events

    def normalized_entropy(self, rates: Floats) -> float:
        """Log loss by what predicting these rates would cost events that have them."""
        base = sum(map(entropy, rates.tolist())) * self.events
        return float(self._sums[0].sum() / base) if base else 1.0
