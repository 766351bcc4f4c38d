"""Test, then train: one step of streaming training, and everything of it that a checkpoint must hold.

The learner knows no Ray and no Kafka: it is given micro-batches. With several ranks each holds all weights;
gradients of dense parameters and of the embedding rows in use are summed, and every rank applies the same
update, so that the ranks stay equal bit for bit.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from grstream.config import Config, TrainConfig
from grstream.keys import ABSENT
from grstream.metrics import Predictions, StreamMetrics
from grstream.microbatch import MicroBatch, Role
from grstream.model import HSTU, Encoded
from grstream.ranks import Ranks
from grstream.tokens import NewEvents, Tokens, fused
from grstream.vocabulary import Vocabulary, VocabularyState
from grstream.weights import Weights

RETRIEVAL_TEMPERATURE = 0.05
GRADIENT_NORM = 1.0  # dense gradients are clipped here: one odd batch must not throw the model off
PROBES = 64  # new events a step whose item is ranked among all items, which costs a pass over the table


class NonFiniteLoss(RuntimeError):
    """The loss is not a number; the weights are as they were before the step."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step, as all ranks together saw it."""

    step: int
    predictions: Predictions  # of all ranks
    ranking_loss: float  # nats per event, summed over actions
    retrieval_loss: float  # nats per event that had an action
    tokens: int  # memory and query tokens encoded


class Learner:
    """A model in training. All ranks call `step` together, an idle one with an empty batch."""

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        torch.manual_seed(config.train.seed)
        self.config = config
        self.ranks = ranks or Ranks()
        self.model = HSTU(config.model, actions=len(config.events.actions))
        self.vocabulary = Vocabulary(config.model.dim, config.train.seed)
        self.metrics = StreamMetrics(config.events.actions, config.train.recent_events)
        self.steps = 0
        self._optimizer = _optimizer(self.model, config.train)

    def step(self, batch: MicroBatch) -> StepReport:
        """Predict the new events, then learn from them. Raises NonFiniteLoss, having changed nothing."""
        held = len(self.vocabulary)
        rows = self._admit(batch)
        negatives = self._negatives()
        used = np.unique(np.concatenate([rows.shared, negatives]))
        table = self.vocabulary.gather(used).requires_grad_()
        tokens, new = fused(batch, _event_vectors(batch, rows, used, table))
        encoded = self._forward(tokens, new, train=True)
        logits = self.model.action_logits(encoded.query)  # (N, A)
        labels = self._labels(batch)
        counts = torch.tensor(
            [batch.new_events, int(labels.any(1).sum()), len(tokens.memory_times) + batch.new_events],
            dtype=torch.float64,
        )
        total = np.sum(self.ranks.gather(counts.numpy()), axis=0)

        ranking = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
        targets = torch.from_numpy(np.searchsorted(used, rows.items))[new.events]
        users = self.model.user_vectors(encoded.memory)
        retrieval = self._retrieval_loss(
            users, self.model.item_vectors(table), targets, np.searchsorted(used, negatives), labels.any(1)
        )
        losses = torch.stack([ranking / max(total[0], 1), retrieval / max(total[1], 1)])
        predictions = self._predictions(batch, tokens, new, rows.items, held, logits, users)
        self._learn(losses, table, used)
        self.metrics.update(predictions)
        self.steps += 1
        shown = np.sum(self.ranks.gather(losses.detach().double().numpy()), axis=0)
        return StepReport(self.steps, predictions, float(shown[0]), float(shown[1]), int(total[2]))

    # -- parts of a step --------------------------------------------------------------------------------

    def _admit(self, batch: MicroBatch) -> "_Rows":
        """Rows for every key of the batch, and of the other ranks' batches."""
        keys = np.concatenate([batch.items, batch.features.reshape(-1)])
        kinds = np.arange(len(keys)) < len(batch.items)
        present = kinds | (keys != ABSENT)
        shared_keys, shared_kinds = self.ranks.union(keys[present], kinds[present])
        shared = self.vocabulary.admit(shared_keys, shared_kinds)
        for names in self.ranks.gather(batch.item_names):
            self.vocabulary.item_names.update(names)
        rows = np.full(len(keys), -1, np.int64)
        rows[present] = shared[np.searchsorted(shared_keys, keys[present])]
        return _Rows(shared, rows[: len(batch.items)], rows[len(batch.items) :].reshape(batch.features.shape))

    def _negatives(self) -> npt.NDArray[np.int64]:
        """Rows drawn uniformly from the vocabulary, the same on every rank and on a replay."""
        if not self.config.train.retrieval_weight:
            return np.empty(0, np.int64)
        items = self.vocabulary.item_rows()
        if not len(items):
            return items
        random = np.random.default_rng((self.config.train.seed, self.steps))
        return items[random.integers(len(items), size=self.config.train.negatives)]

    def _forward(self, tokens: Tokens, new: NewEvents, train: bool) -> Encoded:
        """Outputs at the queries, and at the memory token before each of them, whence items are retrieved."""
        self.model.train(train)
        encoded: Encoded = self.model(tokens, new.before)
        return encoded

    def _labels(self, batch: MicroBatch) -> torch.Tensor:
        bits = batch.actions[batch.roles != Role.CONTEXT]
        return torch.from_numpy((bits[:, None] >> np.arange(len(self.config.events.actions))) & 1 > 0)

    def _retrieval_loss(
        self,
        users: torch.Tensor,  # (N, d)
        table: torch.Tensor,  # (U, d) item vectors of the rows in use
        targets: torch.Tensor,  # (N,) into table
        negatives: npt.NDArray[np.int64],  # (K,) into table
        acted: torch.Tensor,  # (N,) an event without an action is no positive
    ) -> torch.Tensor:
        """Sampled softmax over uniform negatives, summed over events."""
        if not len(negatives) or not acted.any():
            return users.sum() * 0
        users, targets = users[acted], targets[acted]
        sampled = torch.from_numpy(negatives)
        positive = (users * table[targets]).sum(1, keepdim=True)
        logits = torch.cat([positive, users @ table[sampled].T], dim=1) / RETRIEVAL_TEMPERATURE
        hits = F.pad(sampled == targets[:, None], (1, 0))  # a negative that is the positive counts once
        return -F.log_softmax(logits.masked_fill(hits, -torch.inf), dim=1)[:, 0].sum()

    @torch.no_grad()
    def _predictions(
        self,
        batch: MicroBatch,
        tokens: Tokens,
        new: NewEvents,
        items: npt.NDArray[np.int64],  # (E,) rows
        held: int,  # rows before this step
        logits: torch.Tensor,
        users: torch.Tensor,
    ) -> Predictions:
        if self.config.model.dropout:
            # Law 6: the model is judged as it would serve.
            encoded = self._forward(tokens, new, train=False)
            logits, users = self.model.action_logits(encoded.query), self.model.user_vectors(encoded.memory)
        at = new.events.numpy()
        sequence = np.repeat(np.arange(len(batch.users)), batch.lengths)
        return Predictions.concat(
            self.ranks.gather(
                Predictions(
                    users=batch.users[sequence[at]],
                    items=batch.items[at],
                    times=batch.times[at],
                    partitions=batch.partitions,
                    offsets=batch.offsets,
                    late=batch.roles[at] == Role.NEW_LATE,
                    labels=self._labels(batch).numpy(),
                    probabilities=torch.sigmoid(logits.float()).numpy(),
                    ranks=self._ranks_of_items(users, items[at], held),
                )
            )
        )

    def _ranks_of_items(
        self, users: torch.Tensor, rows: npt.NDArray[np.int64], held: int
    ) -> npt.NDArray[np.int64]:
        """The place of each event's item among the `held` first rows' items, for the first PROBES events.

        An item that had no row before this step could not have been retrieved: it comes last.
        """
        out = np.full(len(rows), -1, np.int64)
        items = self.vocabulary.item_rows()
        items = items[items < held]
        if not self.config.train.retrieval_weight or not len(items):
            return out
        rows = rows[:PROBES]
        table = self.model.item_vectors(self.vocabulary.gather(items))
        scores = users[:PROBES] @ table.T  # (P, items)
        at = torch.from_numpy(np.minimum(np.searchsorted(items, rows), len(items) - 1))
        places = (scores > scores.gather(1, at[:, None])).sum(1).numpy()
        out[:PROBES] = np.where(rows < held, places, len(items))
        return out

    def _learn(self, losses: torch.Tensor, table: torch.Tensor, used: npt.NDArray[np.int64]) -> None:
        loss = losses[0] + self.config.train.retrieval_weight * losses[1]
        self._optimizer.zero_grad(set_to_none=False)
        loss.backward()
        parameters = [p for p in self.model.parameters()]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradient = torch.zeros_like(table) if table.grad is None else table.grad
        self.ranks.sum_([p.grad for p in parameters if p.grad is not None] + [gradient])
        norm = torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        if not (torch.isfinite(norm) and torch.isfinite(gradient).all()):
            raise NonFiniteLoss(f"step {self.steps + 1}: ranking and retrieval loss {losses.tolist()}")
        self._optimizer.step()
        self.vocabulary.update(used, gradient, self.config.train.row_learning_rate)

    def weights(self) -> Weights:
        """A copy of what serving needs."""
        held = self.vocabulary.state()
        dense = {name: t.detach().cpu().numpy().copy() for name, t in self.model.state_dict().items()}
        return Weights(dense, held.keys, held.rows, held.items, held.item_names)

    # -- state ------------------------------------------------------------------------------------------

    def save(self, directory: pathlib.Path) -> None:
        """Write everything but the position in the stream into an existing directory."""
        vocabulary = dataclasses.asdict(self.vocabulary.state())
        state = {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "vocabulary": vocabulary,
            "metrics": self.metrics.state(),
        }
        torch.save(_to_tensors(state), directory / "learner.pt")

    def load(self, directory: pathlib.Path) -> None:
        """Become what `save` wrote, on this and every other rank."""
        state = _to_arrays(torch.load(directory / "learner.pt", weights_only=True))
        self.steps = state["steps"]
        self.model.load_state_dict(_to_tensors(state["model"]))
        self._optimizer.load_state_dict(_to_tensors(state["optimizer"]))
        self.vocabulary = Vocabulary.from_state(
            VocabularyState(**state["vocabulary"]), self.config.train.seed
        )
        self.metrics.load(state["metrics"])


@dataclasses.dataclass(frozen=True)
class _Rows:
    shared: npt.NDArray[np.int64]  # distinct rows of all ranks' batches
    items: npt.NDArray[np.int64]  # (E,)
    features: npt.NDArray[np.int64]  # (E, F), -1 where absent


def _optimizer(model: HSTU, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a rate of its own for the bias tables.

    An entry of a table weighs every pair at its distance, and says how soon history stops to matter. Adam
    moves it by the learning rate a step at most, and from zero that takes a stream too long at the rate that
    suits matrices: at twenty times that, Deskdrop's log loss in one pass is .212 instead of .259.
    """
    tables: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (tables if name.endswith(("position_bias", "time_bias")) else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": tables, "lr": config.bias_learning_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups)


def _event_vectors(
    batch: MicroBatch, rows: _Rows, used: npt.NDArray[np.int64], table: torch.Tensor
) -> torch.Tensor:
    """Item vector plus those of the event's features: (E, d)."""
    vectors = F.embedding(torch.from_numpy(np.searchsorted(used, rows.items)), table)
    for column in range(batch.features.shape[1]):
        present = rows.features[:, column] >= 0
        at = torch.from_numpy(np.searchsorted(used, rows.features[present, column]))
        vectors = vectors.index_add(0, torch.from_numpy(np.flatnonzero(present)), F.embedding(at, table))
    return vectors


def _to_tensors(value: Any) -> Any:
    """Arrays as tensors, so that a checkpoint loads with weights_only."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {k: _to_tensors(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_tensors(v) for v in value)
    return value


def _to_arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {k: _to_arrays(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_arrays(v) for v in value)
    return value
