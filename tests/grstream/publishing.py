"""A run that publishes, as tests move it: its learner, what it published, and storage that fails."""

import contextlib
import dataclasses
import errno
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from grstream import directories, weight_store
from grstream.config import Config, parse
from grstream.learner import Learner
from grstream.publisher import Publisher
from grstream.weight_store import WeightStore
from grstream.weights import Weights

DIM = 4


def make_config(storage: pathlib.Path, **train: Any) -> Config:
    return parse(
        {
            "storage": str(storage),
            "events": {"actions": ["click"]},
            "model": {"layers": 1, "dim": DIM, "heads": 1},
            "train": {"keep_versions": 2, **train},
        }
    )


def copied(held: Weights) -> Weights:
    return dataclasses.replace(held, item_names=dict(held.item_names))


def assert_same(got: Weights, want: Weights) -> None:
    """Bit for bit, in the same order."""
    assert {k: (v.dtype, v.shape, v.tobytes()) for k, v in got.dense.items()} == {
        k: (v.dtype, v.shape, v.tobytes()) for k, v in want.dense.items()
    }
    for field in ("keys", "rows", "items"):
        a, b = getattr(got, field), getattr(want, field)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field
    assert got.item_names == want.item_names


class Run:
    """A learner whose vocabulary and parameters a test moves, and its publisher."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.learner = Learner(config)
        self.publisher = Publisher(config, self.learner)
        self.store = WeightStore(config.storage / "weights")
        self.published: dict[int, Weights] = {}  # as they were, whole

    def learn(self, keys: list[int], history: bool = False, seed: int = 0, idle: int = 0) -> None:
        """A step about these distinct keys; the first `idle` get no gradient.

        Even ones are items, every second of those with a string for an id; a history does not say so.
        """
        at, vocabulary = np.array(keys, np.int64), self.learner.vocabulary
        rows = vocabulary.admit(at, (at % 2 == 0) & (not history))[idle:]
        draw = torch.Generator().manual_seed(seed)
        vocabulary.update(rows, torch.randn(len(rows), DIM, generator=draw), 0.1)
        if not history:
            vocabulary.name({key: f"item {key}" for key in keys if key % 4 == 0})
        with torch.no_grad():
            for parameter in self.learner.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.01)
        self.learner.steps += 1

    def publish(self) -> int:
        """Raises OSError where the version did not become durable, though it may be visible."""
        before = set(self.store.numbers())
        now = copied(self.learner.weights())
        try:
            self.publisher.publish({}, 0, wait=True)
        finally:
            self.published.update(dict.fromkeys(set(self.store.numbers()) - before, now))
        return self.publisher.version

    def restart(self) -> None:
        """From a checkpoint of now."""
        self.publisher.close()
        directory = pathlib.Path(tempfile.mkdtemp(dir=self.config.storage))
        self.learner.state().save(directory)
        self.learner = Learner(self.config)
        self.learner.load(directory)
        self.publisher = Publisher(self.config, self.learner)


@contextlib.contextmanager
def failing(at: str, weights: pathlib.Path) -> Iterator[None]:
    """Storage that takes no file, or loses its connection once the version has been renamed into place."""

    def write(path: pathlib.Path, data: bytes) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    def sync(path: pathlib.Path) -> None:
        if path == weights:
            raise OSError(errno.EIO, "input/output error")

    with pytest.MonkeyPatch.context() as patch:
        if at == "writing":
            patch.setattr(weight_store, "_write", write)
        else:
            patch.setattr(directories, "sync", sync)
        yield
