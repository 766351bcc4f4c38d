"""`Waiters`: who waits until a partition has been read to an offset."""

import contextlib
import heapq
import itertools
from collections.abc import Callable


class Waiters:
    """By partition, the nearest offset first. Not thread-safe: its owner holds a lock around each call."""

    def __init__(self) -> None:
        self._heaps: dict[int, list[tuple[int, int]]] = {}  # partition -> (offset, number)
        self._tell: dict[int, Callable[[], object]] = {}  # by number; what was taken back is not here
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._tell)

    def add(self, partition: int, offset: int, tell: Callable[[], object]) -> int:
        """Have `tell` called once, as soon as the position is beyond the offset; a number to take it back."""
        number = next(self._numbers)
        heapq.heappush(self._heaps.setdefault(partition, []), (offset, number))
        self._tell[number] = tell
        return number

    def take_back(self, number: int) -> None:
        """Nobody waits for this any more; it may have been told already."""
        self._tell.pop(number, None)
        if sum(map(len, self._heaps.values())) > 2 * len(self._tell) + 64:
            self._heaps = {
                p: sorted(entry for entry in heap if entry[1] in self._tell)
                for p, heap in self._heaps.items()
            }

    def reached(self, partition: int, position: int) -> None:
        """Tell all those whose offset stands before the position, the next offset to be read."""
        heap = self._heaps.get(partition)
        while heap and heap[0][0] < position:
            tell = self._tell.pop(heapq.heappop(heap)[1], None)
            if tell is not None:
                # A loop that was closed with somebody waiting in it.
                with contextlib.suppress(RuntimeError):
                    tell()
