"""The ledger holds every offset once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grstream.ledger import Disposition, Ledger, OffsetConflict, OffsetRange

cuts = st.lists(st.integers(1, 200), min_size=1, max_size=12, unique=True).map(sorted)


@given(cuts=cuts, order=st.randoms(), kinds=st.lists(st.sampled_from(Disposition), min_size=12, max_size=12))
def test_ranges_added_in_any_order_cover_the_same_offsets(cuts, order, kinds) -> None:
    ranges = [OffsetRange(0, a, b, k) for a, b, k in zip([0, *cuts], cuts, kinds, strict=False)]
    shuffled = ranges[:]
    order.shuffle(shuffled)
    ledger = Ledger(shuffled)
    assert list(ledger) == list(Ledger(ranges))
    assert ledger.consumed(0) == [(0, cuts[-1])]
    assert ledger.watermark(0) == cuts[-1]
    for kind in Disposition:
        assert ledger.count(kind) == sum(r.stop - r.start for r in ranges if r.disposition == kind)
    assert list(Ledger.from_table(ledger.to_table())) == list(ledger)


@given(start=st.integers(0, 20), length=st.integers(1, 10))
def test_an_offset_cannot_be_recorded_twice(start, length) -> None:
    ledger = Ledger(
        [OffsetRange(0, 5, 10, Disposition.TRAINED), OffsetRange(0, 12, 15, Disposition.DUPLICATE)]
    )
    new = OffsetRange(0, start, start + length, Disposition.TRAINED)
    taken = {*range(5, 10), *range(12, 15)}
    if taken & set(range(start, start + length)):
        with pytest.raises(OffsetConflict):
            ledger.add(new)
    else:
        ledger.add(new)
        assert ledger.count(Disposition.TRAINED) == 5 + length


def test_the_watermark_stops_at_a_hole() -> None:
    ledger = Ledger([OffsetRange(3, 0, 4, Disposition.TRAINED), OffsetRange(3, 6, 9, Disposition.TRAINED)])
    assert ledger.watermark(3) == 4
    assert ledger.consumed(3) == [(0, 4), (6, 9)]
    assert ledger.watermark(1) is None


@given(
    cuts=cuts,
    order=st.randoms(),
    kinds=st.lists(st.sampled_from(Disposition), min_size=12, max_size=12),
    settled=st.lists(st.integers(0, 24), max_size=4),
)
def test_a_ledger_that_counts_what_lies_before_its_watermark_knows_the_same_of_every_offset(
    cuts, order, kinds, settled
) -> None:
    ranges = [
        OffsetRange(p, a, b, k) for p in range(2) for a, b, k in zip([0, *cuts], cuts, kinds, strict=False)
    ]
    order.shuffle(ranges)
    whole, counting = Ledger(), Ledger()
    for i, r in enumerate(ranges):
        if i in settled:
            counting.settle(0)
            counting = Ledger.from_table(counting.to_table()).copy()
        whole.add(r)
        counting.add(r)
        for partition in range(2):
            assert counting.consumed(partition) == whole.consumed(partition)
            assert counting.watermark(partition) == whole.watermark(partition)
        assert counting.partitions() == whole.partitions()
        assert [counting.count(d) for d in Disposition] == [whole.count(d) for d in Disposition]
        assert list(counting.position()) == list(whole.position())
    counting.settle(0)
    for partition in range(2):
        assert counting.settled(partition)[:2] in whole.consumed(partition)
    assert list(counting) == []
    for r in ranges:
        with pytest.raises(OffsetConflict):
            counting.add(r)


def test_a_ledger_is_listed_until_it_has_grown_long() -> None:
    ledger = Ledger(OffsetRange(0, o, o + 1, Disposition(o % 2)) for o in range(9))
    ledger.settle(9)
    assert ledger.settled(0) is None
    ledger.add(OffsetRange(0, 10, 11, Disposition.TRAINED))
    ledger.settle(9)
    assert ledger.settled(0) == (0, 9, (5, 4, 0, 0, 0, 0, 0, 0))
    assert list(ledger) == [OffsetRange(0, 10, 11, Disposition.TRAINED)]
