"""A model's prequential predictions beside the running rates that any recommender must beat."""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from grstream.metrics import Predictions, entropy, gauc, log_loss, running_rates


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Log losses over the later part of one stream, in nats per event; divide by `base` for entropies."""

    events: int
    rate: float  # of the action, among those events
    model: float
    rates: dict[str, float]  # the running rates, by name
    gauc: float
    margin: float  # of the best running rate over the model: positive is better than all of them
    margin_error: float  # standard error of the margin, events of one user taken together

    @property
    def base(self) -> float:
        """Entropy of the action's rate, which normalizes."""
        return entropy(self.rate)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the margin."""
        return self.margin - 1.96 * self.margin_error, self.margin + 1.96 * self.margin_error


def compare(predictions: Predictions, action: int, skip: float = 0.5) -> Comparison:
    """Score the predictions of one action after the first `skip` of the stream, in the order of the stream.

    The running rates are computed over the same events in the same order, from the stream's beginning.
    """
    timely = predictions.where(~predictions.late)
    later = slice(int(len(timely) * skip), None)
    labels = timely.labels[:, action]
    losses = {
        name: log_loss(said, labels)[later]
        for name, said in running_rates(timely.users, timely.items, labels).items()
    }
    model = log_loss(timely.probabilities[:, action], labels)[later]
    best = min(losses, key=lambda name: losses[name].mean())
    gains = losses[best] - model
    return Comparison(
        events=len(model),
        rate=float(labels[later].mean()),
        model=float(model.mean()),
        rates={name: float(loss.mean()) for name, loss in losses.items()},
        gauc=gauc(timely.users[later], labels[later], timely.probabilities[later, action]),
        margin=float(gains.mean()),
        margin_error=_clustered_error(gains, timely.users[later]),
    )


def _clustered_error(values: npt.NDArray[np.float64], users: npt.NDArray[np.int64]) -> float:
    """Standard error of a mean whose terms are independent between users only."""
    _, owner = np.unique(users, return_inverse=True)
    sums = np.bincount(owner, values - values.mean())
    return math.sqrt(float((sums**2).sum())) / len(values)
