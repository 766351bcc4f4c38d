"""Train a model epoch after epoch on sequences that are all there, and keep the epoch that validates best.

Everything that a run is stands in its directory: `checkpoint.pt` after every epoch, `result.json` at the
end. A run that was cut goes on from its last epoch and ends with the same weights, bit for bit: what is
drawn at random depends on the seed and the number of the epoch alone. The test items are read once, when
training is over, with the weights that were best on the validation items.
"""

import copy
import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grstream.config import ConfigError, EpochsConfig, ModelConfig, RunConfig
from grstream.leave_one_out import (
    Batch,
    Sequences,
    metrics,
    questions,
    target_counts,
    target_ranks,
    training_batches,
    training_windows,
)
from grstream.model import HSTU
from grstream.retrieval import expected_counts, full_softmax, sampled_softmax
from grstream.tokens import Kind, Tokens
from kernels import jagged

VALIDATION, TEST = 2, 1  # items from the end
CRITERION = "NDCG@10"  # of the validation items: what early stopping goes by
EVALUATION_TOKENS = 16_384  # events encoded at once when nothing is kept for a backward pass


class Recommender(nn.Module):
    """An encoder, and a vector for each of V items, which is both what it reads and what it retrieves."""

    def __init__(self, config: ModelConfig, items: int, request: bool) -> None:
        super().__init__()
        self.encoder = HSTU(config, actions=1)
        self.request = request
        # As in the public code: small vectors, scaled up where they are read. What is retrieved is unit
        # vectors, whose direction a step of Adam turns the faster the shorter they are.
        self.items = nn.Parameter(torch.randn(items, config.dim) * 0.02)
        self.scale = config.dim**0.5

    def forward(self, batch: Batch, readout: Tensor | None = None) -> Tensor:
        """Unit vectors of what comes after each event, or after those that `readout` names: (E or N, d)."""
        vectors = nn.functional.embedding(batch.items, self.items) * self.scale
        tokens = Tokens.of_events(batch.lengths, vectors, torch.zeros_like(batch.items), batch.times)
        if not self.request:
            newest: Tensor = self.encoder(tokens, readout).memory
            return self.encoder.user_vectors(newest)
        at = torch.arange(len(batch.items)) if readout is None else readout
        owner = jagged.owners(batch.lengths, len(batch.items))[at]
        times = batch.target_times[at]
        tokens = dataclasses.replace(
            tokens,
            query_lengths=torch.bincount(owner, minlength=len(batch.lengths)),
            query_vectors=vectors.new_zeros(len(at), vectors.shape[1]),
            query_kinds=torch.full_like(times, Kind.REQUEST),
            query_prefix=at - jagged.starts(batch.lengths)[owner] + 1,
            query_times=times,
        )
        out = self.encoder(tokens, readout)
        return self.encoder.user_vectors(out.memory + out.query)  # as `tokens.Asked.retrieval`

    def table(self) -> Tensor:
        """Unit vectors of all items: (V, d)."""
        return self.encoder.item_vectors(self.items)


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What is reported after each epoch."""

    number: int  # from 1
    loss: float  # nats per event
    seconds: float  # of training and evaluation
    validation: dict[str, float] | None  # metrics, where this epoch was evaluated


@dataclasses.dataclass(frozen=True)
class Result:
    """A run that is over."""

    seed: int
    best_epoch: int
    epochs: int
    parameters: int
    validation: dict[str, float]
    test: dict[str, float]
    seconds: float  # of all epochs
    seconds_an_epoch: float


Show = Callable[[float, Epoch | None], None]  # epochs done, with their fraction; the epoch just finished


def run(data: Sequences, config: RunConfig, seed: int, directory: pathlib.Path, show: Show) -> Result:
    """Train, or go on training, and test. Raises ConfigError where the directory holds another run."""
    directory.mkdir(parents=True, exist_ok=True)
    done = directory / "result.json"
    training = Training(data, config, seed)
    training.resume(directory)
    if done.exists():
        return Result(**json.loads(done.read_text()))
    while not training.over:
        training.epoch(lambda fraction: show(fraction, None))
        training.save(directory)
        show(len(training.log), training.log[-1])
    result = training.result()
    _replace(done, lambda path: path.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n"))
    return result


class Training:
    """One run: the model, its average, the optimizer, and the best weights so far."""

    def __init__(self, data: Sequences, config: RunConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self.data, self.config, self.seed = data, config, seed
        self.model = Recommender(config.model, len(data.ids), config.epochs.request)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.log: list[Epoch] = []
        self.steps = 0
        self.best = 0  # the epoch
        self.best_weights = copy.deepcopy(self.average.state_dict())
        self._optimizer = _optimizer(self.model, config.epochs)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        counts = torch.from_numpy(target_counts(data)).float()
        self._popularity = counts / counts.sum()

    @property
    def over(self) -> bool:
        settings = self.config.epochs
        return len(self.log) >= settings.epochs or len(self.log) - self.best >= max(
            settings.patience, settings.evaluate_every
        )

    def epoch(self, show: Callable[[float], None] = lambda fraction: None) -> None:
        """Learn from every window once, and validate when it is due."""
        started, settings, number = time.perf_counter(), self.config.epochs, len(self.log)
        random = np.random.default_rng((self.seed, number))
        torch.manual_seed(int(random.integers(2**62)))
        windows = training_windows(self.data, settings.window, random if settings.tiled else None)
        batches = training_batches(self.data, *windows, settings.batch_tokens, random)
        total = 0.0
        self.model.train()
        for at, batch in enumerate(batches):
            total += self._step(batch, number + at / len(batches)) * len(batch.items)
            show(number + at / len(batches))
        number += 1
        loss = total / int(windows[1].sum())
        validation = None
        if number % settings.evaluate_every == 0 or number == settings.epochs:
            validation = evaluate(self.average, self.data, settings.window, VALIDATION)
        self.log.append(Epoch(number, loss, time.perf_counter() - started, validation))
        if validation is not None and (
            not self.best or validation[CRITERION] > self._validation(self.best)[CRITERION]
        ):
            self.best = number
            self.best_weights = copy.deepcopy(self.average.state_dict())

    def result(self) -> Result:
        """Read the test items, with the best weights."""
        model = copy.deepcopy(self.average)
        model.load_state_dict(self.best_weights)
        seconds = sum(epoch.seconds for epoch in self.log)
        return Result(
            seed=self.seed,
            best_epoch=self.best,
            epochs=len(self.log),
            parameters=sum(p.numel() for p in self.model.parameters()),
            validation=self._validation(self.best),
            test=evaluate(model, self.data, self.config.epochs.window, TEST),
            seconds=seconds,
            seconds_an_epoch=seconds / len(self.log),
        )

    def save(self, directory: pathlib.Path) -> None:
        """Atomically, in the place of the epoch before."""
        state = {
            "config": self.config.model_dump(),
            "items": len(self.data.ids),
            "seed": self.seed,
            "steps": self.steps,
            "best": self.best,
            "log": [dataclasses.asdict(epoch) for epoch in self.log],
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "best_weights": self.best_weights,
            "optimizer": self._optimizer.state_dict(),
        }
        _replace(directory / "checkpoint.pt", lambda path: torch.save(state, path))

    def resume(self, directory: pathlib.Path) -> None:
        """Become what `save` wrote there, if anything. Raises ConfigError where that is another run."""
        path = directory / "checkpoint.pt"
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True)
        own = {"config": self.config.model_dump(), "items": len(self.data.ids), "seed": self.seed}
        for what, value in own.items():
            if state[what] != value:
                raise ConfigError(
                    f"{directory} holds a run with another {what}: {state[what]} instead of {value}; "
                    "give this one a directory of its own, or remove that one"
                )
        self.steps, self.best = state["steps"], state["best"]
        self.log = [Epoch(**epoch) for epoch in state["log"]]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.best_weights = state["best_weights"]
        self._optimizer.load_state_dict(state["optimizer"])

    def _validation(self, number: int) -> dict[str, float]:
        found = self.log[number - 1].validation
        assert found is not None
        return found

    def _step(self, batch: Batch, progress: float) -> float:
        settings = self.config.epochs
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * _schedule(progress, settings)
        loss = self._loss(batch)
        self._optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(f"the gradient of step {self.steps + 1} is not finite: {loss.item()}")
        self._optimizer.step()
        self.steps += 1
        # An average over few steps at first: early weights are not worth remembering.
        decay = min(settings.averaging, self.steps / (self.steps + 10)) if settings.averaging else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), weight=1 - decay
            )
        return loss.item()

    def _loss(self, batch: Batch) -> Tensor:
        """Nats per event."""
        settings = self.config.epochs
        users = self.model(batch) / settings.temperature
        table, targets = self.model.table(), batch.targets
        if settings.loss == "full":
            return full_softmax(users, table, targets, getattr(torch, settings.softmax_dtype)).mean()
        uniform = torch.randint(len(table), (settings.negatives,))
        sampled = torch.cat((uniform, targets))
        counts = expected_counts(self._popularity[sampled], len(targets) - 1, settings.negatives, len(table))
        vectors = table.index_select(0, sampled)
        positives = vectors[settings.negatives :]
        return sampled_softmax(users, positives, vectors, targets, sampled, counts.log()).mean()


@torch.inference_mode()
def evaluate(model: Recommender, data: Sequences, window: int, back: int) -> dict[str, float]:
    """Metrics of every user's `back`-th item from the end, ranked among all items."""
    was, table = model.training, model.eval().table()
    ranks = np.empty(len(data.lengths), np.int64)
    for asked in questions(data, back, window, EVALUATION_TOKENS):
        users = model(asked.batch, torch.cumsum(asked.batch.lengths, 0) - 1)
        ranks[asked.users] = target_ranks(users @ table.T, data, asked.users, back)
    model.train(was)
    return metrics(ranks)


def _schedule(progress: float, settings: EpochsConfig) -> float:
    """The share of the learning rate after so many epochs: up in a line, then down along a cosine."""
    if progress < settings.warmup:
        return (progress + 1e-2) / (settings.warmup + 1e-2)
    along = (progress - settings.warmup) / max(settings.epochs - settings.warmup, 1e-9)
    floor = settings.learning_rate_floor
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(along, 1.0)))


def _optimizer(model: Recommender, settings: EpochsConfig) -> torch.optim.AdamW:
    """AdamW; the bias tables have a rate of their own, and nothing but matrices decays."""
    tables: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.endswith(("position_bias", "time_bias")):
            tables.append(parameter)
        else:
            (matrices if parameter.dim() > 1 else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": others, "lr": settings.learning_rate, "weight_decay": 0.0},
        {"params": tables, "lr": settings.bias_learning_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=settings.betas)


def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Write beside it and rename: there is never half a file."""
    beside = path.with_suffix(".new")
    write(beside)
    os.replace(beside, path)
