"""Test, then train: one step of streaming training, and everything of it that a checkpoint must hold.

The learner knows no Ray and no Kafka: it is given micro-batches. With several ranks each holds all weights;
gradients of dense parameters and of the embedding rows in use are summed, and every rank applies the same
update, so that the ranks stay equal bit for bit.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from grstream import migration
from grstream.config import Config, TrainConfig
from grstream.keys import ABSENT
from grstream.metrics import Predictions, StreamMetrics
from grstream.microbatch import MicroBatch, Role
from grstream.model import HSTU, Model
from grstream.quality import WindowedQuality
from grstream.ranks import Ranks
from grstream.retrieval import expected_counts, full_softmax, sampled_softmax
from grstream.stochastic_length import kept_events
from grstream.tokens import Events, changed_context, context_before, training_tokens
from grstream.vocabulary import Mark, Vocabulary, VocabularyState
from grstream.weights import Delta, NonFiniteWeights, Recipe, Weights

LEARNER = "learner.pt"  # a checkpoint's file
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
    sparsity: float  # share of the events that Stochastic Length left out of the step


class Outputs(NamedTuple):
    """What a model makes of N events before it knows their actions."""

    ranking: torch.Tensor  # (N, d) what `action_logits` reads
    retrieval: torch.Tensor  # (N, d) what `user_vectors` reads
    tokens: int  # encoded for it


class Taken(NamedTuple):
    """What a version is made from. Once it is durable, `vocabulary.carried(mark, number)` is due."""

    weights: Weights | None  # all there is, where it is to be a base
    delta: Delta | None  # None where no version carries the rest
    vocabulary: Vocabulary
    mark: Mark


class Learner:
    """A model in training. All ranks call `step` together, an idle one with an empty batch."""

    def __init__(
        self, config: Config, ranks: Ranks | None = None, device: torch.device | str = "cpu"
    ) -> None:
        torch.manual_seed(config.train.seed)
        self.config = config
        self.ranks = ranks or Ranks()
        self.device = torch.device(device)
        self.model = self._build().to(self.device)
        self.vocabulary = Vocabulary(
            config.model.dim, config.train.seed, self.device, config.train.vocabulary_rows
        )
        self.metrics = StreamMetrics(config.events.actions, config.train.recent_events)
        self.quality = WindowedQuality(config.events.actions, config.quality)
        self.steps = 0
        self._optimizer = _optimizer(self.model, config.train)
        weights = config.train.action_weights
        self._action_weights = torch.tensor(
            [weights.get(name, 1.0) for name in config.events.actions], device=self.device
        )

    def _build(self) -> Model:
        return HSTU(self.config.model, actions=len(self.config.events.actions))

    def step(self, batch: MicroBatch) -> StepReport:
        """Predict the new events, then learn from them. Raises NonFiniteLoss, having changed nothing."""
        shared, rows = self._admit(batch)
        sampled = self._sampled_rows()
        used = np.unique(np.concatenate([shared, sampled]))
        table = self.vocabulary.gather(used).requires_grad_()
        places = rows.among(used)
        kept = self._kept(batch)
        outputs = self._encode(batch, places, kept, table, train=True)
        logits = self.model.action_logits(outputs.ranking)  # (N, A)
        labels = self._labels(batch)
        acted = labels.any(1)
        counts = [
            batch.new_events,
            int(acted.sum()),
            outputs.tokens,
            len(batch.items),
            len(batch.items) if kept is None else int(kept.sum()),
        ]
        total = np.sum(self.ranks.gather(np.array(counts, np.float64)), axis=0)

        of_actions = F.binary_cross_entropy_with_logits(
            logits.float(), labels.float().to(self.device), reduction="none"
        )
        ranking = (of_actions * self._action_weights).sum()
        targets = rows.items[batch.roles != Role.CONTEXT]
        retrieval = self._retrieval_loss(outputs.retrieval, table, used, targets, acted, sampled)
        losses = torch.stack([ranking / max(total[0], 1), retrieval / max(total[1], 1)])
        if self.config.model.dropout or kept is not None:
            # Law 6: the model is judged as it would serve.
            with torch.no_grad():
                outputs = self._encode(batch, places, None, table, train=False)
                logits = self.model.action_logits(outputs.ranking)
        said = self._predictions(batch, logits, outputs.retrieval, targets, self._retrievable())
        predictions = Predictions.concat(self.ranks.gather(said))
        self._learn(losses, table, used)
        self.vocabulary.count(self._of_all_ranks(targets))
        self.metrics.update(predictions)
        self.quality.update(predictions)
        self.steps += 1
        shown = np.sum(self.ranks.gather(losses.detach().double().cpu().numpy()), axis=0)
        return StepReport(
            step=self.steps,
            predictions=predictions,
            ranking_loss=float(shown[0]),
            retrieval_loss=float(shown[1]),
            tokens=int(total[2]),
            sparsity=float(1 - total[4] / max(total[3], 1)),
        )

    @torch.no_grad()
    def predict(self, batch: MicroBatch) -> Predictions:
        """What the model, as it is, says of the new events. Nothing changes; other ranks are not asked."""
        keys = np.concatenate([batch.items, batch.features.reshape(-1)])
        distinct, place = np.unique(keys, return_inverse=True)
        table, _ = self.vocabulary.vectors(distinct)
        absent = (np.arange(len(keys)) >= len(batch.items)) & (keys == ABSENT)
        places = _Rows.of(batch, np.where(absent, -1, place))
        outputs = self._encode(batch, places, None, table, train=False)
        logits = self.model.action_logits(outputs.ranking)
        asked = self.vocabulary.lookup(batch.items[batch.roles != Role.CONTEXT])
        return self._predictions(batch, logits, outputs.retrieval, asked, self.vocabulary.item_rows())

    # -- parts of a step --------------------------------------------------------------------------------

    def _admit(self, batch: MicroBatch) -> "tuple[npt.NDArray[np.int64], _Rows]":
        """Rows for every key of the batch, and of the other ranks' batches: all of these, and the batch's."""
        keys = np.concatenate([batch.items, batch.features.reshape(-1)])
        kinds = np.arange(len(keys)) < len(batch.items)
        present = kinds | (keys != ABSENT)
        shared_keys, shared_kinds = self.ranks.union(keys[present], kinds[present])
        shared = self.vocabulary.admit(shared_keys, shared_kinds)
        for names in self.ranks.gather(batch.item_names):
            self.vocabulary.item_names.update(names)
        rows = np.full(len(keys), -1, np.int64)
        rows[present] = shared[np.searchsorted(shared_keys, keys[present])]
        return shared, _Rows.of(batch, rows)

    def _sampled_rows(self) -> npt.NDArray[np.int64]:
        """What the retrieval loss sets against a step's own items, the same on every rank and on a replay.

        Every item's row, ascending, where there are few enough; otherwise rows drawn uniformly.
        """
        if not self.config.train.retrieval_weight:
            return np.empty(0, np.int64)
        items = self.vocabulary.item_rows()
        if len(items) <= self.config.train.full_softmax_items:
            return items
        random = np.random.default_rng((self.config.train.seed, self.steps))
        return items[random.integers(len(items), size=self.config.train.negatives)]

    def _tensor(self, array: npt.NDArray) -> torch.Tensor:
        """A copy as int64 on the device: Arrow's arrays are read-only, and narrow."""
        return torch.tensor(array, dtype=torch.int64, device=self.device)

    def _of_all_ranks(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.concatenate(self.ranks.gather(rows))

    def _kept(self, batch: MicroBatch) -> npt.NDArray[np.bool_] | None:
        """Which events Stochastic Length leaves in the step, None for all."""
        alpha = self.config.train.stochastic_length
        if alpha is None:
            return None
        kept = kept_events(batch, self.config.histories.window, alpha, self.config.train.seed)
        return None if all(self.ranks.gather(bool(kept.all()))) else kept

    def _encode(
        self,
        batch: MicroBatch,
        places: "_Rows",  # of `table`
        kept: npt.NDArray[np.bool_] | None,
        table: torch.Tensor,
        train: bool,
    ) -> Outputs:
        self.model.train(train)
        if kept is not None:
            batch, places = batch.where(kept), places.where(kept)
        events = self._events(batch, places, table)
        return self._outputs(events, self._tensor(np.flatnonzero(batch.roles != Role.CONTEXT)))

    def _outputs(self, events: Events, new: torch.Tensor) -> Outputs:
        """What the model makes of the events `new` (N,), each from those of its sequence before it."""
        tokens, asked = training_tokens(events, new, self.config.model.layout == "interleaved")
        encoded = self.model(tokens, asked.readout)
        count = len(tokens.memory_times) + len(tokens.query_times)
        return Outputs(asked.ranking(encoded), asked.retrieval(encoded), count)

    def _events(self, batch: MicroBatch, places: "_Rows", table: torch.Tensor) -> Events:
        """The events' vectors: that of the item plus those of its features, and of what context changed."""
        contexts = len(self.config.events.context)
        vectors = F.embedding(self._tensor(places.items), table)
        for column in range(contexts, batch.features.shape[1]):
            present = places.features[:, column] >= 0
            at = self._tensor(places.features[present, column])
            vectors = vectors.index_add(0, self._tensor(np.flatnonzero(present)), F.embedding(at, table))
        context = batch.features[:, :contexts]
        event, which = changed_context(context, context_before(context, batch.lengths))
        return Events(
            lengths=self._tensor(batch.lengths),
            items=vectors,
            actions=self._tensor(batch.actions),
            times=self._tensor(batch.times),
            contexts=F.embedding(self._tensor(places.features[event, which]), table),
            context_of=self._tensor(event),
        )

    def _labels(self, batch: MicroBatch) -> torch.Tensor:
        return torch.from_numpy((batch.labels[:, None] >> np.arange(len(self.config.events.actions))) & 1 > 0)

    def _retrieval_loss(
        self,
        users: torch.Tensor,  # (N, d)
        table: torch.Tensor,  # (U, d) of the rows in use
        used: npt.NDArray[np.int64],  # (U,) those rows
        targets: npt.NDArray[np.int64],  # (N,) rows
        acted: torch.Tensor,  # (N,) an event without an action is no positive
        sampled: npt.NDArray[np.int64],  # (K,) rows, all items' or a uniform sample
    ) -> torch.Tensor:
        """Softmax over all items or over a sample, summed over events.

        The sample is the items of the step's own events on all ranks, which are popular ones, and the
        uniform ones, which also reach what nobody takes; logQ corrects for how often each is drawn.
        """
        if not len(sampled):
            return users.sum() * 0
        if len(sampled) <= self.config.train.full_softmax_items:
            candidates, logs = sampled, None
        else:
            in_batch = self._of_all_ranks(targets[acted.numpy()])
            candidates = np.concatenate([in_batch, sampled])
            among = torch.from_numpy(np.searchsorted(self.vocabulary.item_rows(), candidates))
            counts = expected_counts(self.vocabulary.popularity(), among, len(in_batch), len(sampled))
            logs = counts.log().to(self.device)
        if not acted.any():
            return users.sum() * 0
        asking = self.model.user_vectors(users[acted.to(self.device)]) / RETRIEVAL_TEMPERATURE
        vectors = self.model.item_vectors(table[self._tensor(np.searchsorted(used, candidates))])
        wanted = targets[acted.numpy()]
        if logs is None:
            return full_softmax(asking, vectors, self._tensor(np.searchsorted(candidates, wanted))).sum()
        positives = self.model.item_vectors(table[self._tensor(np.searchsorted(used, wanted))])
        return sampled_softmax(
            asking, positives, vectors, self._tensor(wanted), self._tensor(candidates), logs
        ).sum()

    @torch.no_grad()
    def _predictions(
        self,
        batch: MicroBatch,
        logits: torch.Tensor,  # (N, A)
        users: torch.Tensor,  # (N, d)
        asked: npt.NDArray[np.int64],  # (N,) the items' rows, -1 of one without
        retrievable: npt.NDArray[np.int64],  # (R,) rows, ascending
    ) -> Predictions:
        at = np.flatnonzero(batch.roles != Role.CONTEXT)
        sequence = np.repeat(np.arange(len(batch.users)), batch.lengths)
        starts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
        return Predictions(
            users=batch.users[sequence[at]],
            items=batch.items[at],
            times=batch.times[at],
            partitions=batch.partitions,
            offsets=batch.offsets,
            late=batch.roles[at] == Role.NEW_LATE,
            history=(at - starts[sequence[at]]).astype(np.int32),
            labels=self._labels(batch).numpy(),
            probabilities=torch.sigmoid(logits.float()).cpu().numpy(),
            ranks=self._ranks_of_items(self.model.user_vectors(users), asked, retrievable),
        )

    def _retrievable(self) -> npt.NDArray[np.int64]:
        """The rows of all items but those that this step met first, which could not have been retrieved."""
        items = self.vocabulary.item_rows()
        return items[~np.isin(items, self.vocabulary.fresh)]

    def _ranks_of_items(
        self, users: torch.Tensor, rows: npt.NDArray[np.int64], items: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """The place of each event's item among `items`, for the first PROBES events; last if it is none."""
        out = np.full(len(rows), -1, np.int64)
        if not self.config.train.retrieval_weight or not len(items):
            return out
        rows = rows[:PROBES]
        table = self.model.item_vectors(self.vocabulary.gather(items))
        scores = users[:PROBES] @ table.T  # (P, items)
        at = self._tensor(np.minimum(np.searchsorted(items, rows), len(items) - 1))
        places = (scores > scores.gather(1, at[:, None])).sum(1).cpu().numpy()
        out[:PROBES] = np.where(items[at.cpu().numpy()] == rows, places, len(items))
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
        return Weights(self._dense(), held.keys, held.rows, held.items, held.item_names)

    def taken(self, whole: bool) -> Taken:
        """What the next version is to carry, copied: all if it must, else no more rows than were touched."""
        held = self.vocabulary
        rows, names, mark = held.touched()
        delta = None
        if held.version is not None:
            delta = Delta(
                previous=held.version,
                size=len(held),
                dense=self._dense(),
                places=rows,
                keys=held.keys_of(rows),
                rows=held.gather(rows).cpu().numpy(),
                items=held.are_items(rows),
                item_names=names,
            )
        return Taken(self.weights() if whole or delta is None else None, delta, held, mark)

    def _dense(self) -> dict[str, npt.NDArray]:
        return {name: t.detach().cpu().numpy().copy() for name, t in self.model.state_dict().items()}

    # -- state ------------------------------------------------------------------------------------------

    def state(self) -> "LearnerState":
        """A copy of everything but the position in the stream, which later steps do not touch."""
        return LearnerState(
            _copied(
                {
                    "recipe": Recipe.of(self.config).model_dump(mode="json"),
                    "steps": self.steps,
                    "model": self.model.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "vocabulary": dataclasses.asdict(self.vocabulary.state()),
                    "metrics": self.metrics.state(),
                    "quality": self.quality.state(),
                }
            )
        )

    def load(self, directory: pathlib.Path) -> list[str]:
        """Become what a state's `save` wrote, on this and every other rank.

        Returns what had to be migrated to fit a schema that has grown, a line each. Raises SchemaChanged,
        having changed nothing, where the configuration has not grown from the one that it was saved under.
        """
        state = _to_arrays(torch.load(directory / LEARNER, map_location="cpu", weights_only=True))
        shapes = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}
        migrated = migration.fit(state, Recipe.of(self.config), self._optimizer, shapes, self._new_parameters)
        held = state["vocabulary"]
        # Checkpoints of before rows had a budget do not say when they were used.
        held.setdefault("used", np.zeros(len(held["keys"]), np.int64))
        self.steps = state["steps"]
        self.model.load_state_dict(_to_tensors(state["model"]))
        self._optimizer.load_state_dict(_to_tensors(state["optimizer"]))
        self.vocabulary = Vocabulary.from_state(
            VocabularyState(**held),
            self.config.train.seed,
            self.device,
            self.config.train.vocabulary_rows,
        )
        self.metrics.load(state["metrics"])
        if "quality" in state:  # not in checkpoints of before
            self.quality.load(state["quality"])
        return migrated

    def _new_parameters(self) -> dict[str, npt.NDArray]:
        """Those of a new model, the same on every rank; what is drawn at random later stays what it was."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.train.seed)
            return {name: t.numpy() for name, t in self._build().state_dict().items()}


@dataclasses.dataclass(frozen=True)
class LearnerState:
    """A learner as it was after a step, to be written while it goes on."""

    held: dict[str, Any]

    def save(self, directory: pathlib.Path) -> None:
        """Write it into an existing directory. Raises NonFiniteWeights: nobody could go on from those."""
        arrays = {**self.held["model"], "the embedding rows": self.held["vocabulary"]["rows"]}
        bad = next((name for name, array in arrays.items() if not torch.isfinite(array).all()), None)
        if bad is not None:
            raise NonFiniteWeights(
                f"the weights of step {self.held['steps']} are not saved: {bad} is not finite"
            )
        torch.save(self.held, directory / LEARNER)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of some table for each event's item and features."""

    items: npt.NDArray[np.int64]  # (E,)
    features: npt.NDArray[np.int64]  # (E, F), -1 where absent

    @classmethod
    def of(cls, batch: MicroBatch, rows: npt.NDArray[np.int64]) -> "_Rows":
        """From those of the items followed by those of the features, event by event."""
        events = len(batch.items)
        return cls(rows[:events], rows[events:].reshape(batch.features.shape))

    def among(self, used: npt.NDArray[np.int64]) -> "_Rows":
        """Where these rows are among the rows `used`, ascending, that hold them all."""
        features = np.where(self.features < 0, -1, np.searchsorted(used, self.features))
        return _Rows(np.searchsorted(used, self.items), features)

    def where(self, kept: npt.NDArray[np.bool_]) -> "_Rows":
        """Those of some events."""
        return _Rows(self.items[kept], self.features[kept])


def _optimizer(model: Model, config: TrainConfig) -> torch.optim.AdamW:
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


def _copied(value: Any) -> Any:
    """Tensors as copies in main memory, and arrays, which are copies already, as tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(v) for v in value)
    return _to_tensors(value)


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
