"""Candidates count exactly, in bounded memory, and forget who had no event for longest."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from grstream.candidates import Candidates

batches = st.lists(st.dictionaries(st.integers(-15, 15), st.integers(0, 3), max_size=8), max_size=30)


def count(candidates: Candidates, batch: dict[int, int]) -> list[bool]:
    keys = np.fromiter(batch, np.int64, len(batch))
    return candidates.count(keys, np.array(list(batch.values()), np.int64)).tolist()


@given(stream=batches, needed=st.integers(1, 6))
def test_a_key_is_admitted_at_the_event_that_is_enough(stream: list[dict[int, int]], needed: int) -> None:
    candidates, counts = Candidates(needed, capacity=1000), dict[int, int]()
    for batch in stream:
        expected = []
        for key, events in batch.items():
            counts[key] = counts.get(key, 0) + events
            expected.append(events > 0 and counts[key] >= needed)
            if expected[-1]:
                del counts[key]  # it has a row, and would have to start again
        assert count(candidates, batch) == expected
        assert len(candidates) == sum(n > 0 for n in counts.values())


@given(stream=batches, capacity=st.integers(1, 20), at=st.integers(0, 30))
def test_memory_is_bounded_and_a_restored_state_goes_on_the_same(
    stream: list[dict[int, int]], capacity: int, at: int
) -> None:
    steady = resumed = Candidates(4, capacity)
    for number, batch in enumerate(stream):
        if number == at:
            state = steady.state()
            resumed = Candidates(4, capacity)
            resumed.load(state)
        said = count(steady, batch)
        assert resumed is steady or count(resumed, batch) == said
        assert len(steady) == len(resumed) <= capacity + 2 * 8


def test_who_had_no_event_for_longest_is_forgotten() -> None:
    candidates = Candidates(3, capacity=4)
    for batch in ({1: 2, 2: 2}, {3: 1}, {4: 1}, {5: 1}, {6: 1}):
        count(candidates, batch)
    assert count(candidates, {5: 2}) == [True], "it is among the newest"
    assert count(candidates, {1: 1}) == [False], "it had been forgotten"
