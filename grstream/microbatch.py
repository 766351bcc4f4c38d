"""The unit that travels from a reader to a trainer: new events, each behind the history it came upon."""

import dataclasses
import enum

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grstream.keys import Keys
from grstream.ledger import Disposition, OffsetRange


class Role(enum.IntEnum):
    """What an event of a micro-batch is for."""

    CONTEXT = 0  # history, learned from before
    NEW = 1  # to be predicted, then learned from
    NEW_LATE = 2  # the same, placed in the middle of its history: its prediction is reported apart


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """S sequences, packed one after another: E events in all, N of them new.

    A sequence is one user's window at one epoch, oldest event first. A user whose window rolled within the
    batch has several sequences, so that each new event stands behind exactly the history that a server
    would have had (law 6): event i of a sequence is predicted from the sequence's events before it.
    """

    users: Keys  # (S,) user keys
    lengths: npt.NDArray[np.int32]  # (S,) events of each sequence
    items: Keys  # (E,) item keys
    actions: npt.NDArray[np.int32]  # (E,) bit a is set where configured action a was taken
    times: npt.NDArray[np.int64]  # (E,) milliseconds since 1970
    features: npt.NDArray[np.int64]  # (E, F) feature keys, ABSENT where the event carried none
    roles: npt.NDArray[np.uint8]  # (E,) Role
    labels: npt.NDArray[
        np.int32
    ]  # (N,) of each new event, in the order of the sequences: the actions to learn,
    # those of its row unless it is an exposure, whose row says what was known when it was shown: nothing
    partitions: npt.NDArray[np.int32]  # (N,)
    offsets: npt.NDArray[np.int64]  # (N,)
    ranges: tuple[OffsetRange, ...]  # the disposition of every offset that this batch settles
    item_names: dict[int, str]  # item key -> id, for string ids among the new events
    newest_event_ms: int  # greatest event time among the new events, 0 without any
    read_ms: int  # wall clock when the oldest new event was read

    @property
    def new_events(self) -> int:
        return len(self.offsets)

    @classmethod
    def empty(cls, features: int = 0, ranges: tuple[OffsetRange, ...] = ()) -> "MicroBatch":
        """A batch without events: an idle rank's step, or one that only settles offsets."""
        return cls(
            users=np.empty(0, np.int64),
            lengths=np.empty(0, np.int32),
            items=np.empty(0, np.int64),
            actions=np.empty(0, np.int32),
            times=np.empty(0, np.int64),
            features=np.empty((0, features), np.int64),
            roles=np.empty(0, np.uint8),
            labels=np.empty(0, np.int32),
            partitions=np.empty(0, np.int32),
            offsets=np.empty(0, np.int64),
            ranges=ranges,
            item_names={},
            newest_event_ms=0,
            read_ms=0,
        )

    def where(self, kept: npt.NDArray[np.bool_]) -> "MicroBatch":
        """The batch with some of its events, all new ones among them: (E,) says which."""
        sequence = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return dataclasses.replace(
            self,
            lengths=np.bincount(sequence[kept], minlength=len(self.lengths)).astype(np.int32),
            **{
                name: getattr(self, name)[kept] for name in ("items", "actions", "times", "features", "roles")
            },
        )

    def to_block(self) -> pa.Table:
        """One row with list columns: what a Ray Data block carries."""

        def row(array: npt.NDArray) -> pa.Array:
            flat = pa.array(array.reshape(-1))
            return pa.LargeListArray.from_arrays(pa.array([0, len(flat)], pa.int64()), flat)

        ranges = np.array([tuple(map(int, r)) for r in self.ranges], np.int64).reshape(-1)
        names = pa.array(list(self.item_names.values()), pa.large_string())
        return pa.table(
            {
                **{f: row(getattr(self, f)) for f in _ARRAYS},
                "feature_count": pa.array([self.features.shape[1]], pa.int32()),
                "ranges": row(ranges),
                "name_keys": row(np.fromiter(self.item_names, np.int64, len(self.item_names))),
                "names": pa.LargeListArray.from_arrays(pa.array([0, len(names)], pa.int64()), names),
                "newest_event_ms": pa.array([self.newest_event_ms], pa.int64()),
                "read_ms": pa.array([self.read_ms], pa.int64()),
            }
        )

    @classmethod
    def from_block(cls, block: pa.Table) -> "MicroBatch":
        """The inverse of `to_block`; arrays are views of the block where Arrow allows."""
        block = block.combine_chunks()

        def array(name: str) -> npt.NDArray:
            return block[name].chunk(0).flatten().to_numpy(zero_copy_only=False)

        arrays = {f: array(f) for f in _ARRAYS}
        arrays["features"] = arrays["features"].reshape(
            len(arrays["items"]), block["feature_count"][0].as_py()
        )
        ranges = array("ranges").reshape(-1, 4).tolist()
        names = block["names"].chunk(0).flatten().to_pylist()
        return cls(
            **arrays,
            ranges=tuple(OffsetRange(p, a, b, Disposition(d)) for p, a, b, d in ranges),
            item_names=dict(zip(array("name_keys").tolist(), names, strict=True)),
            newest_event_ms=block["newest_event_ms"][0].as_py(),
            read_ms=block["read_ms"][0].as_py(),
        )


_ARRAYS = (
    *("users", "lengths", "items", "actions", "times", "features", "roles"),
    *("labels", "partitions", "offsets"),
)
