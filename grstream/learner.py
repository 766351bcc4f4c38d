"""Test, then train: one step of streaming training, and everything of it that a checkpoint must hold.

The learner knows no Ray and no Kafka: it is given micro-batches. With several ranks each holds all dense
parameters, whose gradients are summed, so that they stay equal bit for bit, and its own part of the embedding
rows (`grstream.shards`).

A GPU is waited for once a step, in the middle: what was predicted, and whether the gradients are finite, is
read at once, and the optimizers' updates are under way while the next step's keys are found.
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
from grstream.keys import ABSENT, Keys
from grstream.learner_state import LearnerState, copied, to_tensors
from grstream.metrics import Predictions, StreamMetrics
from grstream.microbatch import MicroBatch, Role
from grstream.model import HSTU, Model
from grstream.places import Part, Places
from grstream.quality import WindowedQuality
from grstream.ranks import Ints, Ranks
from grstream.retrieval import full_softmax, sampled_softmax, stratified
from grstream.shards import Asked, Fetched, Items, Negatives, Shards, dealt, shard
from grstream.stochastic_length import kept_events
from grstream.tokens import Events, changed_context, context_before, training_tokens
from grstream.vocabulary import Vocabulary, on
from grstream.weights import PRIOR, Delta, Recipe, Weights

GRADIENT_NORM = 1.0  # dense gradients are clipped here: one odd batch must not throw the model off
DESCRIBED_SHARE = 0.25  # of the retrieval loss by descriptions beside that by items
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
    mark: int


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
        self.shards = Shards(self._shard(), self.ranks)
        self._places = Places()
        self.metrics = StreamMetrics(config.events.actions, config.train.recent_events)
        self.quality = WindowedQuality(config.events.actions, config.quality)
        self.steps = 0
        self.keys = self.evicted = 0  # of all ranks' vocabularies, as of the last step
        self._optimizer = _optimizer(self.model, config.train)
        weights = config.train.action_weights
        self._action_weights = torch.tensor(
            [weights.get(name, 1.0) for name in config.events.actions], device=self.device
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """This rank's part."""
        return self.shards.vocabulary

    def _shard(self) -> Vocabulary:
        model = self.config.model
        return shard(model.dim, self.config.train, self.ranks, self.device, model.popularity_days)

    def _build(self) -> Model:
        return HSTU(self.config.model, actions=len(self.config.events.actions)).begin_at_newest_item()

    def step(self, batch: MicroBatch) -> StepReport:
        """Predict the new events, then learn from them. Raises NonFiniteLoss, having changed nothing."""
        labels = self._labels(batch)
        fetched, places = self._fetch(batch, np.any(labels, axis=1))
        table = fetched.table.requires_grad_()
        kept = self._kept(batch)
        outputs = self._encode(batch, places, kept, table, train=True)
        logits = self.model.action_logits(outputs.ranking)  # (N, A)
        counts = [
            batch.new_events,
            outputs.tokens,
            len(batch.items),
            len(batch.items) if kept is None else int(kept.sum()),
        ]
        total = np.sum(self.ranks.gather(np.array(counts, np.float64)), axis=0)

        of_actions = F.binary_cross_entropy_with_logits(
            logits.float(), self._on_device(labels).float(), reduction="none"
        )
        ranking = (of_actions * self._action_weights).sum() / max(total[0], 1)
        retrieval = self._retrieval_loss(outputs.retrieval, table, fetched.items)
        retrieval = retrieval + self._described_loss(outputs.retrieval, table, fetched.items, batch, places)
        losses = torch.stack([ranking, retrieval])
        if self.config.model.dropout or kept is not None:
            # Law 6: the model is judged as it would serve.
            with torch.no_grad():
                outputs = self._encode(batch, places, None, table, train=False)
                logits = self.model.action_logits(outputs.ranking)
        targets = fetched.targets[self.ranks.rank]
        # What this step met first could not have been found.
        of_items, items = self._ranks_of(outputs.retrieval, targets, without=self.vocabulary.fresh)
        rows, gradient = self._gradients(losses, table, fetched)
        norm = torch.nn.utils.clip_grad_norm_(list(self.model.parameters()), GRADIENT_NORM)
        finite = torch.isfinite(norm) & torch.isfinite(gradient).all()
        # The one wait for a GPU.
        probabilities, ranks, shown, fine = _read([torch.sigmoid(logits.float()), of_items, losses, finite])
        said = self._predictions(batch, labels, probabilities, ranks, items)
        held = (len(self.vocabulary), self.vocabulary.evicted)
        told = self.ranks.gather((said, shown.astype(np.float64), bool(fine), held))
        shown = np.sum([losses for _, losses, _, _ in told], axis=0)
        if not all(fine for _, _, fine, _ in told):
            raise NonFiniteLoss(f"step {self.steps + 1}: ranking and retrieval loss {shown.tolist()}")
        self._optimizer.step()
        self.vocabulary.update(rows, gradient, self.config.train.row_learning_rate)
        self.shards.count(fetched)
        predictions = Predictions.concat([said for said, _, _, _ in told])
        self.keys, self.evicted = (sum(counts) for counts in zip(*(held for *_, held in told), strict=True))
        self.metrics.update(predictions)
        self.quality.update(predictions)
        self.steps += 1
        return StepReport(
            step=self.steps,
            predictions=predictions,
            ranking_loss=float(shown[0]),
            retrieval_loss=float(shown[1]),
            tokens=int(total[1]),
            sparsity=float(1 - total[3] / max(total[2], 1)),
        )

    @torch.no_grad()
    def predict(self, batch: MicroBatch) -> Predictions:
        """What the model, as it is, says of the new events. Nothing changes. Of a single rank alone."""
        if self.ranks.world > 1:
            raise RuntimeError("a rank of several holds a part of the vocabulary and cannot predict alone")
        keys = np.concatenate([batch.items, batch.features.reshape(-1)])
        distinct, place = np.unique(keys, return_inverse=True)
        table, _ = self.vocabulary.vectors(distinct)
        absent = (np.arange(len(keys)) >= len(batch.items)) & (keys == ABSENT)
        places = _InTable.of(batch, np.where(absent, -1, place))
        outputs = self._encode(batch, places, None, table, train=False)
        logits = self.model.action_logits(outputs.ranking)
        targets = batch.items[batch.roles != Role.CONTEXT]
        of_items, items = self._ranks_of(outputs.retrieval, targets, without=np.empty(0, np.int64))
        probabilities, ranks = _read([torch.sigmoid(logits.float()), of_items])
        return self._predictions(batch, self._labels(batch), probabilities, ranks, items)

    # -- parts of a step --------------------------------------------------------------------------------

    def _fetch(self, batch: MicroBatch, acted: npt.NDArray[np.bool_]) -> "tuple[Fetched, _InTable]":
        """The rows that the step needs, and where among them those of the batch's keys are."""
        train, new = self.config.train, batch.roles != Role.CONTEXT
        keys = np.concatenate([batch.items, batch.features.reshape(-1)])
        items = np.arange(len(keys)) < len(batch.items)
        of_new = np.concatenate([new, np.repeat(new, batch.features.shape[1])])
        present = items | (keys != ABSENT)
        negatives = None
        if train.retrieval_weight:
            negatives = Negatives(train.negatives, train.full_softmax_items, (train.seed, self.steps))
        asked = Asked(
            keys=keys[present],
            items=(items & of_new)[present],
            new=of_new[present],
            targets=batch.items[new],
            times=batch.times[new],
            acted=acted,
            names=batch.item_names,
        )
        fetched = self.shards.fetch(asked, negatives)
        places = np.full(len(keys), -1, np.int64)
        places[present] = fetched.places
        return fetched, _InTable.of(batch, places)

    def _tensor(self, array: npt.NDArray) -> torch.Tensor:
        """A copy as int64 on the device: Arrow's arrays are read-only, and narrow."""
        return self._on_device(array.astype(np.int64))

    def _on_device(self, array: npt.NDArray) -> torch.Tensor:
        return on(self.device, array)

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
        places: "_InTable",  # of `table`
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

    def _events(self, batch: MicroBatch, places: "_InTable", table: torch.Tensor) -> Events:
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

    def _labels(self, batch: MicroBatch) -> npt.NDArray[np.bool_]:
        labels: npt.NDArray[np.bool_] = (
            batch.labels[:, None] >> np.arange(len(self.config.events.actions)) & 1 > 0
        )
        return labels

    def _retrieval_loss(
        self,
        users: torch.Tensor,  # (N, d)
        table: torch.Tensor,  # (U, d) of the rows in use
        items: Items | None,
    ) -> torch.Tensor:
        """Softmax over all items or over a sample, a mean over all ranks' events of which this is its part.

        The sample is the items of the step's own events on all ranks, which are popular ones, and the
        uniform ones, which stand for all the others. An event without an action, or whose item has no row
        yet, is no positive.
        """
        if items is None or not len(items.wanted):
            return users.sum() * 0
        # An item that the step meets first could not have been found, and has no popularity yet. Its event is
        # set against the others by vectors alone, or it would teach the prior to look for what is not known.
        known = self._on_device(~items.fresh[items.wanted])
        asking = self.model.user_vectors(users[self._on_device(items.wanting)])
        asking = torch.cat((asking, known.to(asking.dtype).unsqueeze(1)), 1)
        asking = asking / self.config.train.retrieval_temperature
        count = max(len(items.in_batch), 1)

        def with_prior(which: Ints | slice) -> torch.Tensor:
            vectors = self.model.item_vectors(table[self._on_device(items.places[which])])
            prior = self.model.prior(self._on_device(items.popularity[which]))
            return torch.cat((vectors, prior.unsqueeze(1)), 1)

        wanted = self._on_device(items.wanted)
        if items.total <= self.config.train.full_softmax_items:
            return full_softmax(asking, with_prior(slice(None)), wanted).sum() / count
        own, drawn = torch.from_numpy(items.in_batch), torch.from_numpy(items.sampled)
        among, logs = stratified(own, drawn, items.total)
        losses = sampled_softmax(
            *(asking, with_prior(items.wanted), with_prior(among.numpy()), wanted),
            *(among.to(self.device, non_blocking=True), logs.to(self.device, non_blocking=True)),
        )
        return losses.sum() / count

    def _described_loss(
        self,
        users: torch.Tensor,  # (N, d)
        table: torch.Tensor,  # (U, d) of the rows in use
        items: Items | None,
        batch: MicroBatch,
        places: "_InTable",
    ) -> torch.Tensor:
        """Softmax over the step's descriptions, which are sums of item features; the mean's part as above.

        Serving retrieves an item that was announced, and that nobody has touched yet, by its features alone.
        So these have to say by themselves who goes for such items. Descriptions, not items: those alike are
        one, and each counts once, however popular.
        """
        contexts = len(self.config.events.context)
        if items is None or not len(items.wanting) or places.features.shape[1] == contexts:
            return users.sum() * 0
        of_new = places.features[batch.roles != Role.CONTEXT, contexts:]
        described = (of_new[items.wanting] >= 0).any(1)
        asking = items.wanting[described]
        descriptions, wanted = np.unique(of_new[asking], axis=0, return_inverse=True)
        if len(descriptions) < 2:
            return users.sum() * 0
        at = self._tensor(descriptions)
        present = (at >= 0).unsqueeze(2)
        vectors = (F.embedding(at.clamp(min=0), table) * present).sum(1)
        # What users want is learned from items: from ten descriptions again it cost ranking .03 of entropy.
        asked = self.model.user_vectors(users[self._on_device(asking)]).detach()
        logits = asked @ self.model.item_vectors(vectors).T / self.config.train.retrieval_temperature
        targets = self._on_device(wanted.reshape(-1))
        losses = F.cross_entropy(logits, targets, reduction="sum")
        return DESCRIBED_SHARE * losses / max(len(items.in_batch), 1)

    def _predictions(
        self,
        batch: MicroBatch,
        labels: npt.NDArray[np.bool_],  # (N, A)
        probabilities: npt.NDArray[np.float32],  # (N, A)
        ranks: npt.NDArray[np.float32],  # (P,) of the first events' items
        items: int,  # that there were to be found
    ) -> Predictions:
        at = np.flatnonzero(batch.roles != Role.CONTEXT)
        sequence = np.repeat(np.arange(len(batch.users)), batch.lengths)
        starts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
        places = np.full(len(at), -1, np.int64)
        if items:
            places[: len(ranks)] = ranks
        return Predictions(
            users=batch.users[sequence[at]],
            items=batch.items[at],
            times=batch.times[at],
            partitions=batch.partitions,
            offsets=batch.offsets,
            late=batch.roles[at] == Role.NEW_LATE,
            history=(at - starts[sequence[at]]).astype(np.int32),
            labels=labels,
            probabilities=probabilities,
            ranks=places,
        )

    @torch.no_grad()
    def _ranks_of(self, outputs: torch.Tensor, targets: Keys, without: Ints) -> tuple[torch.Tensor, int]:
        """The place of each event's item among all items but some rows, and how many items these are.

        For the first PROBES events.
        """
        if not self.config.train.retrieval_weight:
            return outputs.new_empty(0), 0
        users = self.model.user_vectors(outputs[:PROBES])
        vectors, prior = self.model.item_vectors, self.model.prior
        return self.shards.ranks_of(users, targets[:PROBES], vectors, prior, without)

    def _gradients(
        self, losses: torch.Tensor, table: torch.Tensor, fetched: Fetched
    ) -> tuple[Ints, torch.Tensor]:
        """Sum those of all ranks: dense ones in place, and of the rows that are this rank's."""
        loss = losses[0] + self.config.train.retrieval_weight * losses[1]
        self._optimizer.zero_grad(set_to_none=False)
        loss.backward()
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.sum_([p.grad for p in self.model.parameters() if p.grad is not None])
        gradient = torch.zeros_like(table) if table.grad is None else table.grad
        return self.shards.summed(fetched, gradient)

    def weights(self) -> Weights | None:
        """A copy of what serving needs, of all ranks; at rank 0, None at the others. All call it together."""
        taken = self.taken(whole=True)
        return None if taken is None else taken.weights

    def taken(self, whole: bool) -> Taken | None:
        """What the next version is to carry, copied: all if it must, else no more rows than were touched.

        All ranks call it together, rank 0 decides and gets it. No row was touched where no version is known.
        """
        held = self.vocabulary
        whole, version, mark = self.ranks.gather((whole, held.version, held.carried_mark))[0]
        if version is not None:
            held.carried(mark, version)
        rows, names, mark = held.touched()
        touched = None if version is None else Part.of(held, rows, names)
        every = Part.of(held, np.arange(len(held)), held.item_names) if whole or touched is None else None
        told = self.ranks.collect((len(held), touched, every, self._prior()))
        if told is None:
            return None
        self._places.grow([size for size, *_ in told])
        dense = {name: t.detach().cpu().numpy().copy() for name, t in self.model.state_dict().items()}
        if self.config.model.popularity_days:
            dense[PRIOR] = self._places.of_every_row([prior for *_, prior in told])
        weights, delta = None, None
        if every is not None:
            _, columns = self._places.laid_out([part for _, _, part, _ in told if part])
            weights = Weights(dense=dense, **columns)
        if version is not None:
            places, columns = self._places.laid_out([part for _, part, _, _ in told if part])
            delta = Delta(previous=version, size=self._places.size, dense=dense, places=places, **columns)
        return Taken(weights, delta, held, mark)

    @torch.no_grad()
    def _prior(self) -> npt.NDArray[np.float32]:
        """What popularity adds to the score of each key of this rank, by row: (n,); empty without a prior."""
        held = self.vocabulary
        rows = np.arange(len(held) if self.config.model.popularity_days else 0)
        prior = self.model.prior(self._on_device(held.popularity(rows)))
        return np.asarray(prior.cpu(), np.float32)

    # -- state ------------------------------------------------------------------------------------------

    def state(self) -> LearnerState:
        """A copy of this rank's part of everything but the position in the stream.

        Later steps do not touch it. What all ranks hold alike is rank 0's.
        """
        common = None
        if self.ranks.rank == 0:
            common = copied(
                {
                    "recipe": Recipe.of(self.config).model_dump(mode="json"),
                    "steps": self.steps,
                    "model": self.model.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "metrics": self.metrics.state(),
                    "quality": self.quality.state(),
                }
            )
        return LearnerState(self.ranks.rank, self.ranks.world, common, self.vocabulary.state())

    def load(self, directory: pathlib.Path) -> list[str]:
        """Become what the states of all ranks, of however many, have saved there.

        Returns what had to be migrated to fit a schema that has grown, a line each. Having changed nothing
        raises SchemaChanged where the configuration has not grown from the one that it was saved under, and
        ValueError where the embedding rows are another optimizer's.
        """
        common, parts = LearnerState.read(directory)
        shapes = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}
        recipe = Recipe.of(self.config)
        migrated = migration.fit(common, recipe, self._optimizer, shapes, self._new_parameters)
        held = self._shard()
        held.restore(dealt(parts, self.ranks))
        self.shards, self._places = Shards(held, self.ranks), Places()
        self.steps, self.keys = common["steps"], sum(len(part.keys) for part in parts)
        self.model.load_state_dict(to_tensors(common["model"]))
        self._optimizer.load_state_dict(to_tensors(common["optimizer"]))
        self.metrics.load(common["metrics"])
        if "quality" in common:  # not in checkpoints of before
            self.quality.load(common["quality"])
        return migrated

    def _new_parameters(self) -> dict[str, npt.NDArray]:
        """Those of a new model, the same on every rank; what is drawn at random later stays what it was."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.train.seed)
            return {name: t.numpy() for name, t in self._build().state_dict().items()}


@dataclasses.dataclass(frozen=True)
class _InTable:
    """Where in some table the rows of each event's item and features are."""

    items: Ints  # (E,)
    features: Ints  # (E, F), -1 where absent

    @classmethod
    def of(cls, batch: MicroBatch, places: Ints) -> "_InTable":
        """From those of the items followed by those of the features, event by event."""
        events = len(batch.items)
        return cls(places[:events], places[events:].reshape(batch.features.shape))

    def where(self, kept: npt.NDArray[np.bool_]) -> "_InTable":
        """Those of some events."""
        return _InTable(self.items[kept], self.features[kept])


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


def _read(tensors: list[torch.Tensor]) -> list[npt.NDArray[np.float32]]:
    """Their values in float32, by one copy from the device."""
    flat = torch.cat([t.detach().float().reshape(-1) for t in tensors]).cpu()
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).numpy() for part, t in zip(parts, tensors, strict=True)]
