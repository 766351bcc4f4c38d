"""A model's prequential predictions beside others of the same events: running rates, or other models'."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from grstream.metrics import Floats, Predictions, entropy, gauc, log_loss, running_rates, user_aucs


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

    The stream begins where the action is configured. The running rates are computed over the same events in
    the same order, from the stream's beginning.
    """
    timely = predictions.where(~predictions.late & predictions.asked(action))
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
        margin_error=_clustered_error(gains, np.ones(len(gains)), timely.users[later]),
    )


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure that is a weighted mean, in its parts, so that two can be compared in pairs."""

    parts: Floats  # (n,)
    weights: Floats  # (n,)
    users: npt.NDArray[np.int64]  # (n,) whose parts belong together

    @property
    def mean(self) -> float:
        return float(np.average(self.parts, weights=self.weights)) if len(self.parts) else math.nan


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two measures, the second's minus the first's."""

    mean: float
    error: float  # standard error: of the events, those of one user taken together, and of the seeds

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of it."""
        return self.mean - 1.96 * self.error, self.mean + 1.96 * self.error


HITS = (10, 50)


def measures(predictions: Predictions, action: int) -> dict[str, Measure]:
    """The figures of one action, and of retrieval, over the second half of a stream in its order.

    `ne`: normalized entropy; `gauc`; `hr@k` and `mrr` over the events whose item was ranked. Those of another
    model on the same stream have the same parts.
    """
    later = predictions.where(np.arange(len(predictions)) >= len(predictions) // 2)
    later = later.where(~later.late)
    labels, said = later.labels[:, action], later.probabilities[:, action]
    base = entropy(float(labels.mean())) or math.nan
    users, aucs, events = user_aucs(later.users, labels, said)
    out = {
        "ne": Measure(log_loss(said, labels) / base, np.ones(len(later)), later.users),
        "gauc": Measure(aucs, events, users),
    }
    ranked = later.where(later.ranks >= 0)
    ones = np.ones(len(ranked))
    for k in HITS:
        out[f"hr@{k}"] = Measure((ranked.ranks < k).astype(np.float64), ones, ranked.users)
    out["mrr"] = Measure(1 / (1.0 + ranked.ranks), ones, ranked.users)
    return out


def difference(first: Sequence[Measure], second: Sequence[Measure]) -> Difference:
    """Of one figure of two models, a measure for each seed. Raises ValueError for those of other events."""
    reference = first[0]
    for measure in (*first, *second):
        if not np.array_equal(measure.users, reference.users):
            raise ValueError("measures of different events cannot be compared in pairs")
    a, b = (np.mean([m.parts for m in of], axis=0) for of in (first, second))
    error = _clustered_error(b - a, reference.weights, reference.users)
    several = [[m.mean for m in of] for of in (first, second) if len(of) > 1]
    between = sum(float(np.var(means, ddof=1)) / len(means) for means in several)
    mean = float(np.average(b - a, weights=reference.weights)) if len(a) else math.nan
    return Difference(mean, math.sqrt(error**2 + between))


def _clustered_error(values: Floats, weights: Floats, users: npt.NDArray[np.int64]) -> float:
    """Standard error of a weighted mean whose terms are independent between users only."""
    if not len(values):
        return math.nan
    _, owner = np.unique(users, return_inverse=True)
    sums = np.bincount(owner, weights * (values - np.average(values, weights=weights)))
    return math.sqrt(float((sums**2).sum())) / float(weights.sum())
