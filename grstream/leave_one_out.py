"""Leave one out: each user's last item is found again among all items, by a model that never saw it.

The last item of a user is the test, the last but one the validation, and everything before is learned from.
A target is ranked against every item that occurs, but those its user has had before; what scores as high as
the target counts as higher. This is the protocol of the paper's table 4 (section 4.1.1) with a validation
item, so that nothing is chosen by the test. No Ray, no Kafka, no vocabulary: users are rows, items are rows.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from torch import Tensor

from kernels import UNKNOWN_TIME

CUTOFFS = (10, 50, 200)
LEAST_EVENTS = 4  # one to begin with, one to learn, one to validate and one to test
HELD_OUT = 2

Int64s = npt.NDArray[np.int64]


class SequencesError(ValueError):
    """The file does not hold what is to be evaluated; the message says what was expected."""


@dataclasses.dataclass(frozen=True)
class Sequences:
    """E events of U users over V items, user after user, each oldest first."""

    lengths: Int64s  # (U,) at least LEAST_EVENTS each
    items: Int64s  # (E,) 0 … V - 1
    times: Int64s  # (E,) milliseconds, UNKNOWN_TIME where only the order is known
    ids: Int64s  # (V,) the items' ids in the file

    @property
    def starts(self) -> Int64s:
        """(U,)"""
        return np.cumsum(self.lengths) - self.lengths


def sequences(users: Int64s, items: Int64s, times: Int64s) -> Sequences:
    """Rows in the order of time, ties as they come, by user. Raises SequencesError for users too short."""
    order = np.argsort(users, kind="stable")
    names, lengths = np.unique(users, return_counts=True)
    if not len(names) or lengths.min() < LEAST_EVENTS:
        short = int((lengths < LEAST_EVENTS).sum())
        raise SequencesError(
            f"{short} of {len(names)} users have fewer than {LEAST_EVENTS} events: leave them out of the file"
        )
    ids, rows = np.unique(items[order], return_inverse=True)
    return Sequences(lengths, rows, times[order], ids)


def read_ml_1m(path: str | os.PathLike[str]) -> Sequences:
    """A Parquet file with a column `item_ids`, a row per user: each a list of ids in the order of time.

    Raises SequencesError.
    """
    try:
        table = pa.parquet.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise SequencesError(f"cannot read {path} as Parquet: {error}") from error
    column = table["item_ids"].combine_chunks() if "item_ids" in table.column_names else None
    if column is None or not (pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type)):
        found = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        raise SequencesError(
            f"{pathlib.Path(path).name} must have a column item_ids, each row the list of a user's item ids "
            f"in the order of time; it has {found or 'no columns'}"
        )
    lengths = column.value_lengths().fill_null(0).to_numpy()
    items = column.flatten()
    if items.null_count:
        raise SequencesError(f"{pathlib.Path(path).name} has {items.null_count} items that are null")
    users = np.repeat(np.arange(len(lengths)), lengths)
    return sequences(users, items.to_numpy().astype(np.int64), np.full(len(users), UNKNOWN_TIME))


def read_ml_100k(path: str | os.PathLike[str]) -> Sequences:
    """MovieLens-100K's u.data: user, item, rating and seconds since 1970, tab-separated, no header.

    Raises SequencesError.
    """
    names = ("user", "item", "rating", "seconds")
    try:
        table = pa.csv.read_csv(
            path,
            pa.csv.ReadOptions(column_names=names),
            pa.csv.ParseOptions(delimiter="\t"),
            pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.int64())),
        )
    except (OSError, pa.ArrowInvalid) as error:
        raise SequencesError(
            f"cannot read {path} as u.data, whose lines are user, item, rating and unix seconds "
            f"between tabs: {error}"
        ) from error
    user, item, seconds = (table[name].to_numpy() for name in ("user", "item", "seconds"))
    order = np.argsort(seconds, kind="stable")
    return sequences(user[order], item[order], 1000 * seconds[order])


def target_counts(data: Sequences) -> Int64s:
    """How often each item is a target of training: (V,)."""
    learned = np.ones(len(data.items), np.bool_)
    ends = data.starts + data.lengths
    for held_out in (data.starts, ends - 1, ends - 2):
        learned[held_out] = False
    return np.bincount(data.items[learned], minlength=len(data.ids))


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Stretches of users' sequences, packed. Each event is an input, and has the next one as its target."""

    lengths: Tensor  # (S,) int64
    items: Tensor  # (E,) int64
    times: Tensor  # (E,) int64 milliseconds
    targets: Tensor  # (E,) int64
    target_times: Tensor  # (E,) int64 milliseconds


def training_windows(
    data: Sequences, window: int, random: np.random.Generator | None
) -> tuple[Int64s, Int64s]:
    """Stretches of at most `window` inputs: the event at which each begins, and how many. (W,) and (W,).

    With `random` they tile every training sequence, beginning anywhere, so that all events are learned from
    and no event always has the same number before it. Without, there is a user's newest stretch alone.
    """
    inputs = data.lengths - HELD_OUT - 1  # the last training event is only a target
    if random is None:
        lengths = np.minimum(inputs, window)
        return data.starts + inputs - lengths, lengths
    # The first tile may be any part of a window; a sequence that fits into one is not cut.
    first = np.where(inputs > window, random.integers(1, window + 1, size=len(inputs)), inputs)
    tiles = 1 + -(-(inputs - first) // window)  # of each user
    owner = np.repeat(np.arange(len(inputs)), tiles)
    number = np.arange(len(owner)) - (np.cumsum(tiles) - tiles)[owner]
    begin = np.where(number, first[owner] + (number - 1) * window, 0)
    end = np.minimum(first[owner] + number * window, inputs[owner])
    return data.starts[owner] + begin, end - begin


def training_batches(
    data: Sequences, begins: Int64s, lengths: Int64s, tokens: int, random: np.random.Generator
) -> list[Batch]:
    """The windows in a random order, as batches of about so many events."""
    order = random.permutation(len(begins))
    begins, lengths = begins[order], lengths[order]
    number = (np.cumsum(lengths) - lengths) // tokens
    cuts = np.flatnonzero(np.diff(number)) + 1
    return [
        _batch(data, *window) for window in zip(np.split(begins, cuts), np.split(lengths, cuts), strict=True)
    ]


def _batch(data: Sequences, begins: Int64s, lengths: Int64s) -> Batch:
    at = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    arrays = (lengths, data.items[at], data.times[at], data.items[at + 1], data.times[at + 1])
    return Batch(*map(torch.from_numpy, arrays))


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """Users whose next item is asked for."""

    users: Int64s  # (S,)
    batch: Batch  # their histories, the newest events


def questions(data: Sequences, back: int, window: int, tokens: int) -> Iterator[Questions]:
    """What is asked of every user: its `back`-th item from the end (1: test, 2: validation).

    The history is all before it. Users of similar length stand together, about so many events at a time.
    """
    lengths = np.minimum(data.lengths - back, window)
    users = np.argsort(lengths, kind="stable")
    number = (np.cumsum(lengths[users]) - lengths[users]) // tokens
    for some in np.split(users, np.flatnonzero(np.diff(number)) + 1):
        ends = data.starts[some] + data.lengths[some] - back
        yield Questions(some, _batch(data, ends - lengths[some], lengths[some]))


def target_ranks(scores: Tensor, data: Sequences, users: Int64s, back: int) -> Int64s:
    """How many items stand before each user's target, given scores of all items (S, V): (S,).

    Items that the user had before the target are left out; a tie stands before the target, so that a model
    which tells nothing apart earns nothing. A score that is not a number is an error (ValueError).
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores are not finite: the model has diverged")
    ends = data.starts[users] + data.lengths[users] - back
    targets = torch.from_numpy(data.items[ends])
    before = data.lengths[users] - back
    row = torch.from_numpy(np.repeat(np.arange(len(users)), before))
    at = np.repeat(data.starts[users] - (np.cumsum(before) - before), before) + np.arange(before.sum())
    own = scores.gather(1, targets.unsqueeze(1))  # before it may be masked: an item may come twice
    ahead = scores >= own
    ahead[row, torch.from_numpy(data.items[at])] = False
    ahead[torch.arange(len(users)), targets] = False
    return ahead.sum(1).numpy()


def metrics(ranks: Int64s) -> dict[str, float]:
    """HR@k, NDCG@k and MRR of targets with so many items before each."""
    out = {}
    for k in CUTOFFS:
        hit = ranks < k
        out[f"HR@{k}"] = float(hit.mean())
        out[f"NDCG@{k}"] = float(np.where(hit, 1 / np.log2(ranks + 2), 0).mean())
    out["MRR"] = float((1 / (ranks + 1)).mean())
    return out


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, None for a single value."""
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
