"""Prequential quality: what the model said of each event before it learned from it (law 6).

Normalized entropy (He et al. 2014): mean log loss over the entropy of the mean label, so that 1 is what the
base rate alone achieves. GAUC: AUC within each user, averaged with the user's events as weights. Calibration:
predicted positives over actual ones. HR@k: share of events whose item is among the k first retrieved.
"""

import collections
import dataclasses
import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
EPSILON = 1e-7  # probabilities are kept this far from 0 and 1: one certain mistake must not be infinite


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What was said of N events for A actions, before they were learned from."""

    users: npt.NDArray[np.int64]  # (N,) user keys
    items: npt.NDArray[np.int64]  # (N,) item keys
    times: npt.NDArray[np.int64]  # (N,) ms
    partitions: npt.NDArray[np.int32]  # (N,)
    offsets: npt.NDArray[np.int64]  # (N,)
    late: npt.NDArray[np.bool_]  # (N,) placed in the middle of its history
    history: npt.NDArray[np.int32]  # (N,) events of its user that it was predicted from
    labels: npt.NDArray[np.bool_]  # (N, A)
    probabilities: npt.NDArray[np.float32]  # (N, A) nan where the action was not configured yet
    ranks: npt.NDArray[np.int64]  # (N,) 0 is first among all items; -1 where retrieval was not asked

    def __len__(self) -> int:
        return len(self.users)

    @classmethod
    def concat(cls, parts: list["Predictions"]) -> "Predictions":
        fields = [f.name for f in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in fields})

    def where(self, mask: npt.NDArray[np.bool_]) -> "Predictions":
        return Predictions(**{f.name: getattr(self, f.name)[mask] for f in dataclasses.fields(self)})

    def of_actions(self, count: int) -> "Predictions":
        """With columns for so many actions; of those that were not configured yet, nothing was said."""
        more = ((0, 0), (0, count - self.labels.shape[1]))
        return dataclasses.replace(
            self,
            labels=np.pad(self.labels, more),
            probabilities=np.pad(self.probabilities, more, constant_values=np.nan),
        )

    def asked(self, action: int) -> npt.NDArray[np.bool_]:
        """The events of which something was said for an action: (N,)."""
        return ~np.isnan(self.probabilities[:, action])


def log_loss(probabilities: npt.NDArray, labels: npt.NDArray[np.bool_]) -> Floats:
    """Per element, in nats."""
    p = np.clip(probabilities.astype(np.float64), EPSILON, 1 - EPSILON)
    return -np.log(np.where(labels, p, 1 - p))


def entropy(rate: float) -> float:
    """Of a Bernoulli rate, in nats."""
    if not 0 < rate < 1:
        return 0.0
    return -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))


def gauc(users: npt.NDArray[np.int64], labels: npt.NDArray[np.bool_], scores: npt.NDArray) -> float:
    """AUC within each user that has both labels, weighted by the user's events; nan where nobody has."""
    _, aucs, events = user_aucs(users, labels, scores)
    return float(np.average(aucs, weights=events)) if len(aucs) else math.nan


def user_aucs(
    users: npt.NDArray[np.int64], labels: npt.NDArray[np.bool_], scores: npt.NDArray
) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """The users that have both labels, ascending, the AUC within each and its number of events: (U,) each."""
    order = np.lexsort((scores, users))
    users, labels, scores = users[order], labels[order].astype(np.float64), scores[order]
    if not len(users):
        return users, np.empty(0), np.empty(0)
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
    group = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(users)]))
    # Mid-ranks within the user: ties of a score share the mean of their places.
    run = np.cumsum(np.r_[True, (users[1:] != users[:-1]) | (scores[1:] != scores[:-1])]) - 1
    place = np.arange(len(users)) - starts[group] + 1.0
    mid = (np.bincount(run, place) / np.bincount(run))[run]
    events = np.bincount(group).astype(np.float64)
    positives = np.bincount(group, labels)
    rank_sum = np.bincount(group, labels * mid)
    mixed = (positives > 0) & (positives < events)
    n, p, r = events[mixed], positives[mixed], rank_sum[mixed]
    return users[starts][mixed], (r - p * (p + 1) / 2) / (p * (n - p)), n


class StreamMetrics:
    """The figures over everything since the start, and over the last `recent` events."""

    def __init__(self, actions: list[str], recent: int = 20_000, hit_at: int = 10) -> None:
        self._actions = actions
        self._recent = recent
        self._hit_at = hit_at
        self._window: collections.deque[Predictions] = collections.deque()
        self._in_window = 0
        self._sums = np.zeros((len(actions), 3))  # log loss, label, probability
        self._before = np.zeros(len(actions), np.int64)  # events before the action was configured
        self.events = 0
        self.late = 0

    def update(self, predictions: Predictions) -> None:
        self.late += int(predictions.late.sum())
        timely = predictions.where(~predictions.late) if predictions.late.any() else predictions
        if not len(timely):
            return
        self.events += len(timely)
        self._sums += self._sum(timely)
        self._window.append(timely)
        self._in_window += len(timely)
        while self._in_window - len(self._window[0]) >= self._recent:
            self._in_window -= len(self._window.popleft())

    @staticmethod
    def _sum(p: Predictions) -> Floats:
        loss = np.nansum(log_loss(p.probabilities, p.labels), 0)
        return np.stack([loss, p.labels.sum(0), np.nansum(p.probabilities, 0, dtype=np.float64)], axis=1)

    def figures(self) -> dict[str, float]:
        """By name: ne, calibration and gauc per action (recent), ne_total (since the start), hit rate."""
        out: dict[str, float] = {"events": self.events, "late": self.late}
        if not self._window:
            return out
        recent = Predictions.concat(list(self._window))
        sums = self._sum(recent)
        for a, name in enumerate(self._actions):
            said = recent.asked(a)
            events, ever = int(said.sum()), self.events - int(self._before[a])
            if not events:
                continue
            loss, positives, predicted = sums[a]
            base = entropy(positives / events) * events
            out[f"ne/{name}"] = loss / base if base else math.nan
            out[f"calibration/{name}"] = predicted / positives if positives else math.nan
            out[f"gauc/{name}"] = gauc(
                recent.users[said], recent.labels[said, a], recent.probabilities[said, a]
            )
            total_base = entropy(self._sums[a, 1] / ever) * ever
            out[f"ne_total/{name}"] = self._sums[a, 0] / total_base if total_base else math.nan
        asked = recent.ranks >= 0
        if asked.any():
            out[f"hr@{self._hit_at}"] = float((recent.ranks[asked] < self._hit_at).mean())
        return out

    def recent(self) -> Predictions | None:
        """What was said of the recent events, in stream order; None before the first."""
        return Predictions.concat(list(self._window)) if self._window else None

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps: the totals, and the window as arrays."""
        window = self.recent()
        return {
            "events": self.events,
            "late": self.late,
            "sums": self._sums.tolist(),
            "before": self._before.tolist(),
            "window": None if window is None else dataclasses.asdict(window),
        }

    def load(self, state: dict) -> None:
        """Become what had that state. It may know only the first of the actions: the others begin here."""
        self.events, self.late = state["events"], state["late"]
        known = len(state["sums"])
        self._sums = np.zeros((len(self._actions), 3))
        self._sums[:known] = state["sums"]
        self._before = np.full(len(self._actions), self.events, np.int64)
        self._before[:known] = state.get("before", 0)  # states of before schemas grew do not say
        self._window.clear()
        if state["window"] is not None:
            # Checkpoints of before do not say how much an event was predicted from; nothing here asks.
            history = np.zeros(len(state["window"]["users"]), np.int32)
            window = Predictions(**{"history": history, **state["window"]})
            self._window.append(window.of_actions(len(self._actions)))
        self._in_window = sum(map(len, self._window))


def running_rates(
    users: npt.NDArray[np.int64],
    items: npt.NDArray[np.int64],
    labels: npt.NDArray[np.bool_],
    smoothing: float = 10.0,
) -> dict[str, Floats]:
    """The predictors to beat, each from the events before the one it predicts, in stream order: (N,) each.

    `global`: the running mean. `item`: the item's running mean, smoothed towards the global one. `user_item`:
    the sum of the user's and the item's smoothed deviations from the global rate in log-odds. `smoothing` is
    in pseudo-events of the global rate.
    """
    out = {name: np.empty(len(labels)) for name in ("global", "item", "user_item")}
    counts: dict[tuple[str, int], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    positives, events = 1.0, 2.0

    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    stream = zip(users.tolist(), items.tolist(), labels.tolist(), strict=True)
    for i, (user, item, label) in enumerate(stream):
        rate = positives / events
        of_item, of_user = counts["item", item], counts["user", user]
        item_rate = (of_item[0] + smoothing * rate) / (of_item[1] + smoothing)
        user_rate = (of_user[0] + smoothing * rate) / (of_user[1] + smoothing)
        out["global"][i] = rate
        out["item"][i] = item_rate
        out["user_item"][i] = 1 / (1 + math.exp(logit(rate) - logit(item_rate) - logit(user_rate)))
        for tally in (of_item, of_user):
            tally[0] += label
            tally[1] += 1
        positives += label
        events += 1
    return out


def popularity_ranks(
    items: npt.NDArray[np.int64], times: npt.NDArray[np.int64], within_ms: int
) -> npt.NDArray[np.int64]:
    """Each event's item's place among those by events of the last `within_ms`, before the event: (N,).

    In stream order. 0 is first; ties go to the item that was taken last, and one that was not taken before
    stands behind all that were.
    """
    _, number = np.unique(items, return_inverse=True)
    recent, latest = np.zeros(number.max(initial=-1) + 1, np.int64), np.full(number.max(initial=-1) + 1, -1)
    out, oldest = np.empty(len(items), np.int64), 0
    clock = np.maximum.accumulate(times) if len(times) else times
    for i, item in enumerate(number.tolist()):
        while clock[oldest] < clock[i] - within_ms:
            recent[number[oldest]] -= 1
            oldest += 1
        better = (recent > recent[item]) | ((recent == recent[item]) & (latest > latest[item]))
        out[i] = np.count_nonzero(better)
        recent[item] += 1
        latest[item] = i
    return out
