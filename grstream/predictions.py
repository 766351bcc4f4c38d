"""The log of predictions: what was said of each event before it was learned from, as Parquet.

A trainer writes it where `train.log_predictions` is set, for evaluation after the fact. A trainer that is
killed goes back to its checkpoint and predicts some events again; `read` keeps what was said last. Parts name
users and go by age.
"""

import pathlib
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grstream.metrics import Predictions

PART_EVENTS = 50_000  # events gathered before a part is written


class PredictionLog:
    """Writes one run's parts `<run>-<part>.parquet`; run names sort by time.

    Deletes what is older than `kept_s`.
    """

    def __init__(self, directory: pathlib.Path, run: str, kept_s: float) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._run = run
        self._kept_s = kept_s
        self._parts = 0
        self._held: list[Predictions] = []

    def append(self, predictions: Predictions) -> None:
        self._held.append(predictions)
        if sum(map(len, self._held)) >= PART_EVENTS:
            self.flush()

    def flush(self) -> None:
        """Write what is held, and delete what is old."""
        for part in self._directory.glob("*.parquet"):
            if part.stat().st_mtime < time.time() - self._kept_s:
                part.unlink()
        if not any(map(len, self._held)):
            return
        path = self._directory / f"{self._run}-{self._parts:06d}.parquet"
        pq.write_table(_to_table(Predictions.concat(self._held)), path)
        self._parts += 1
        self._held.clear()


def read(directory: pathlib.Path) -> Predictions:
    """All predictions in the order in which they were made, each event's last one. FileNotFoundError."""
    parts = sorted(directory.glob("*.parquet"))
    if not parts:
        raise FileNotFoundError(f"no predictions in {directory}: train with train.log_predictions: true")
    held = [_from_table(pq.read_table(part)) for part in parts]
    actions = max(part.labels.shape[1] for part in held)  # they may have become more
    everything = Predictions.concat([part.of_actions(actions) for part in held])
    backwards = np.stack([everything.partitions, everything.offsets], axis=1)[::-1]
    _, first = np.unique(backwards, axis=0, return_index=True)
    last = np.zeros(len(everything), bool)
    last[len(everything) - 1 - first] = True
    return everything.where(last)


def save(path: pathlib.Path, predictions: Predictions) -> None:
    """As one Parquet file, which is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    pq.write_table(_to_table(predictions), beside)
    beside.rename(path)


def load(path: pathlib.Path) -> Predictions:
    """The inverse of `save`."""
    return _from_table(pq.read_table(path))


_PLAIN = ("users", "items", "times", "partitions", "offsets", "late", "history", "ranks")
_PER_ACTION = ("labels", "probabilities")


def _to_table(predictions: Predictions) -> pa.Table:
    columns = {name: pa.array(getattr(predictions, name)) for name in _PLAIN}
    for name in _PER_ACTION:
        matrix = getattr(predictions, name)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
    return pa.table(columns)


def _from_table(table: pa.Table) -> Predictions:
    table = table.combine_chunks()
    if "history" not in table.column_names:  # a log of before
        table = table.append_column("history", pa.array(np.full(len(table), -1, np.int32)))
    columns = {name: table[name].to_numpy() for name in _PLAIN}
    for name in _PER_ACTION:
        lists = table[name].combine_chunks()
        flat = lists.flatten().to_numpy(zero_copy_only=False)
        columns[name] = flat.reshape(len(table), lists.type.list_size)
    return Predictions(**columns)
