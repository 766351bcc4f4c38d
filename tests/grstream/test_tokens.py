"""Events become tokens in the order, and with the sight, that either layout says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grstream.keys import ABSENT
from grstream.model import Encoded
from grstream.tokens import Events, Kind, changed_context, context_before, training_tokens

DIM = 4


def events(lengths: list[int], context_of: list[int] | None = None) -> Events:
    """Event e's item vector is e everywhere, its actions e, its time 1,000 e; context token k is -1 - k."""
    count, of = sum(lengths), torch.tensor(context_of or [], dtype=torch.int64)
    number = torch.arange(count)
    return Events(
        lengths=torch.tensor(lengths, dtype=torch.int64),
        items=number[:, None].expand(-1, DIM).clone().float(),
        actions=number,
        times=number * 1_000,
        contexts=-1.0 - torch.arange(len(of))[:, None].expand(-1, DIM),
        context_of=of,
    )


def test_fused_each_new_event_has_a_request_and_a_candidate_that_see_what_came_before() -> None:
    drawn = events([3, 0, 1, 3])
    drawn.items.requires_grad_()
    tokens, asked = training_tokens(drawn, torch.tensor([2, 3, 4, 6]), interleaved=False)
    assert tokens.memory_lengths.tolist() == [3, 0, 1, 3]
    assert tokens.memory_kinds.tolist() == [Kind.EVENT] * 7
    assert tokens.memory_actions.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert tokens.query_lengths.tolist() == [2, 0, 2, 4]
    assert tokens.query_kinds.tolist() == [Kind.REQUEST, Kind.CANDIDATE] * 4
    assert tokens.query_prefix.tolist() == [2, 2, 0, 0, 0, 0, 2, 2]
    assert (
        tokens.query_times[::2].tolist() == tokens.query_times[1::2].tolist() == [2_000, 3_000, 4_000, 6_000]
    )
    assert tokens.query_vectors[:, 0].tolist() == [0, 2, 0, 3, 0, 4, 0, 6]
    assert asked.events.tolist() == [2, 3, 4, 6]
    assert asked.readout.tolist() == [1, -1, -1, 5]
    encoded = Encoded(memory=torch.tensor([[10.0], [20], [30], [40]]), query=torch.arange(8.0)[:, None])
    assert asked.retrieval(encoded).flatten().tolist() == [10, 22, 34, 46]
    assert asked.ranking(encoded).flatten().tolist() == [1, 3, 5, 7]
    tokens.query_vectors.sum().backward()
    assert drawn.items.grad is not None
    assert drawn.items.grad[:, 0].tolist() == [0, 0, 1, 1, 1, 0, 1]


def test_interleaved_items_and_actions_take_turns_and_items_are_asked() -> None:
    tokens, asked = training_tokens(events([2, 1]), torch.tensor([1, 2]), interleaved=True)
    assert tokens.memory_lengths.tolist() == [4, 2]
    assert tokens.memory_kinds.tolist() == [Kind.ITEM, Kind.ACTION] * 3
    assert tokens.memory_vectors[:, 0].tolist() == [0, 0, 1, 0, 2, 0]
    assert tokens.memory_actions.tolist() == [0, 0, 0, 1, 0, 2]
    assert tokens.memory_times.tolist() == [0, 0, 1_000, 1_000, 2_000, 2_000]
    assert tokens.query_kinds.tolist() == [Kind.REQUEST] * 2
    assert tokens.query_prefix.tolist() == [2, 0]
    assert asked.readout.tolist() == [1, -1, 2, 4]
    encoded = Encoded(memory=torch.tensor([[10.0], [20], [30], [40]]), query=torch.tensor([[1.0], [2]]))
    assert asked.retrieval(encoded).flatten().tolist() == [11, 22]
    assert asked.ranking(encoded).flatten().tolist() == [30, 40]


@pytest.mark.parametrize("interleaved", [False, True])
def test_context_stands_before_its_event_which_sees_it_as_do_its_queries(interleaved: bool) -> None:
    tokens, asked = training_tokens(events([2, 1], [0, 0, 1, 2]), torch.tensor([1, 2]), interleaved)
    c, i, a = Kind.CONTEXT, Kind.ITEM if interleaved else Kind.EVENT, Kind.ACTION
    own = [i, a] if interleaved else [i]
    assert tokens.memory_kinds.tolist() == [c, c, *own, c, *own, c, *own]
    at_context = tokens.memory_kinds == Kind.CONTEXT
    assert tokens.memory_vectors[at_context][:, 0].tolist() == [-1, -2, -3, -4]
    assert tokens.memory_times[at_context].tolist() == [0, 0, 1_000, 2_000]
    assert tokens.memory_lengths.tolist() == ([7, 3] if interleaved else [5, 2])
    assert tokens.query_prefix.tolist() == ([5, 1] if interleaved else [4, 4, 1, 1])
    # The newest token is that of the event before, not of the event's own context.
    assert asked.readout.tolist() == ([3, -1, 5, 8] if interleaved else [2, -1])


@given(st.data())
def test_context_is_told_when_it_changes_and_at_the_beginning(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 4), max_size=4))
    value = st.sampled_from([ABSENT, 7, 8])
    rows = data.draw(st.lists(st.tuples(value, value), min_size=sum(lengths), max_size=sum(lengths)))
    context = np.array(rows, np.int64).reshape(-1, 2)
    expected, at = [], 0
    for length in lengths:
        last = (ABSENT, ABSENT)
        for event in range(at, at + length):
            told = [(event, f) for f in (0, 1) if rows[event][f] not in (ABSENT, last[f])]
            expected += told
            last = rows[event]
        at += length
    event, column = changed_context(context, context_before(context, np.array(lengths, np.int32)))
    assert list(zip(event.tolist(), column.tolist(), strict=True)) == expected
