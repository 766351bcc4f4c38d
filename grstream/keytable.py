"""A vectorised hash table from 64-bit keys to dense slots: rows of whatever columns its owner keeps.

Cuckoo hashing in numpy: a key lives in one of two buckets, so that a batch is found in two gathers however
full the table is, and removing leaves no tombstones. Slots are given densely in order of insertion and freed
ones are given again, newest freed first; they depend on the history of inserts and removals alone, never on
the (randomly seeded, hence unattackable) hash. Not safe for use by several threads at once.
"""

import secrets

import numpy as np
import numpy.typing as npt

from grstream.keys import Keys

Slots = npt.NDArray[np.int64]

_EMPTY = -1
_MIN_BUCKETS = 64
# Two-choice cuckoo hashing works below a load of one half; well below it, insertion chains stay short.
_MAX_LOAD = 0.4
# Chains are logarithmic below that load. One that is longer has met a cycle, and only another hash helps.
_MAX_ROUNDS = 100


class KeyTable:
    """Keys (any int64) to slots 0 <= slot < `stop`."""

    def __init__(self, expected: int = 0) -> None:
        self._keys = np.zeros(max(expected, 16), np.int64)  # by slot
        self._free = np.empty(0, np.int64)  # a stack of freed slots
        self._freed = 0  # height of that stack
        self._stop = 0
        self._new_index(_buckets_for(expected))

    def __len__(self) -> int:
        return self._stop - self._freed

    @property
    def stop(self) -> int:
        """One beyond the greatest slot ever given: the rows that an owner's columns must have."""
        return self._stop

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._free.nbytes + self._index.nbytes

    def copy(self) -> "KeyTable":
        """A table of the same keys in the same slots, which changes apart from this one."""
        other = KeyTable.__new__(KeyTable)
        other.__dict__.update(self.__dict__)
        other._keys, other._free, other._index = self._keys.copy(), self._free.copy(), self._index.copy()
        return other

    def find(self, keys: Keys) -> Slots:
        """The slot of each key, -1 where it is not in the table."""
        first, second = self._buckets(keys)
        slots = self._index.take(first).astype(np.int64)
        misses = np.flatnonzero((self._keys.take(slots, mode="wrap") != keys) | (slots < 0))
        if len(misses):
            others = self._index.take(second.take(misses)).astype(np.int64)
            wrong = self._keys.take(others, mode="wrap") != keys.take(misses)
            others[wrong] = _EMPTY
            slots[misses] = others
        return slots

    def insert(self, keys: Keys) -> Slots:
        """Slots for keys that are distinct and not in the table (the caller has asked `find`)."""
        count = len(keys)
        slots = np.empty(count, np.int64)
        reused = min(count, self._freed)
        self._freed -= reused
        slots[:reused] = self._free[self._freed : self._freed + reused][::-1]
        slots[reused:] = np.arange(self._stop, self._stop + count - reused)
        self._stop += count - reused
        if self._stop > len(self._keys):
            self._keys.resize(max(self._stop, len(self._keys) * 3 // 2), refcheck=False)
        self._keys[slots] = keys
        if len(self) > _MAX_LOAD * len(self._index):
            homeless = self._rebuild(slots, _buckets_for(len(self)))
        else:
            homeless = self._place(slots)
        while len(homeless):
            homeless = self._rebuild(homeless, len(self._index))
        return slots

    def remove(self, slots: Slots) -> None:
        """Free these (distinct, occupied) slots and forget their keys."""
        first, second = self._buckets(self._keys.take(slots))
        self._index[np.where(self._index.take(first) == slots, first, second)] = _EMPTY
        if self._freed + len(slots) > len(self._free):
            self._free.resize(max(self._freed + len(slots), len(self._free) * 3 // 2), refcheck=False)
        self._free[self._freed : self._freed + len(slots)] = slots
        self._freed += len(slots)

    def keys(self, slots: Slots) -> Keys:
        """The keys in these occupied slots."""
        return self._keys.take(slots)

    def slots(self) -> Slots:
        """Every occupied slot, ascending."""
        occupied = np.ones(self._stop, np.bool_)
        occupied[self._free[: self._freed]] = False
        return np.flatnonzero(occupied)

    def _new_index(self, buckets: int) -> None:
        self._index = np.full(buckets, _EMPTY, np.int32)
        self._bits = np.uint64(64 - (buckets.bit_length() - 1))
        self._mask = np.uint64(buckets - 1)
        self._factors = tuple(np.uint64(secrets.randbits(64) | 1) for _ in range(2))

    def _buckets(self, keys: Keys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """A key's two buckets: the high and the low bits of a multiply-xorshift-multiply hash."""
        x = keys.view(np.uint64) * self._factors[0]
        x ^= x >> np.uint64(32)
        x *= self._factors[1]
        low = x ^ (x >> np.uint64(31))
        low &= self._mask
        x >>= self._bits
        return x.view(np.int64), low.view(np.int64)

    def _place(self, slots: Slots) -> Slots:
        """Put slots into the index; each may push out another, which goes to its other bucket.

        Returns the slots that found no place; with the others they fill a cycle of this hash.
        """
        bucket, second = self._buckets(self._keys.take(slots))
        # Prefer an empty bucket, so that most keys need not move.
        bucket = np.where(self._index.take(bucket) < 0, bucket, second)
        for _ in range(_MAX_ROUNDS):
            before = self._index.take(bucket)
            self._index[bucket] = slots
            placed = self._index.take(bucket) == slots  # of those that share a bucket, one
            pushed = before[placed & (before >= 0)]
            pushed_from = bucket[placed & (before >= 0)]
            slots = np.concatenate([slots[~placed], pushed])
            if not len(slots):
                break
            left = np.concatenate([bucket[~placed], pushed_from])
            first, second = self._buckets(self._keys.take(slots))
            bucket = first ^ second ^ left  # the other of its two
        return slots

    def _rebuild(self, homeless: Slots, buckets: int) -> Slots:
        """Start the index afresh with another hash; returns the slots that found no place again."""
        slots = np.concatenate([self._index[self._index >= 0].astype(np.int64), homeless])
        self._new_index(buckets)
        return self._place(slots)


def _buckets_for(count: int) -> int:
    """A power of two that holds `count` keys and half as many again."""
    needed = max(int(count * 1.5 / _MAX_LOAD), _MIN_BUCKETS)
    return 1 << (needed - 1).bit_length()
