from hypothesis import given
from hypothesis import strategies as st

from grstream.waiters import Waiters

steps = st.lists(
    st.tuples(st.sampled_from(["wait", "read", "leave"]), st.integers(0, 2), st.integers(0, 30)), max_size=200
)


@given(steps)
def test_whoever_waits_is_told_once_and_when_its_offset_was_read(script: list[tuple[str, int, int]]) -> None:
    waiters, positions, told = Waiters(), [0, 0, 0], []
    waiting: dict[int, tuple[int, int]] = {}
    for what, partition, n in script:
        if what == "wait" and n >= positions[partition]:
            name = object()
            number = waiters.add(partition, n, lambda name=name: told.append(name))
            waiting[number] = (partition, n, name)
        elif what == "leave" and waiting:
            number = sorted(waiting)[n % len(waiting)]
            waiters.take_back(number)
            del waiting[number]
        elif what == "read":
            positions[partition] = max(positions[partition], n)
            due = {k: w for k, w in waiting.items() if w[0] == partition and w[1] < positions[partition]}
            told.clear()
            waiters.reached(partition, positions[partition])
            assert sorted(map(id, told)) == sorted(id(w[2]) for w in due.values())
            for number in due:
                del waiting[number]
        assert len(waiters) == len(waiting)
