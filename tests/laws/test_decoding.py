"""Laws 3 and 7 where records become events: cuts of the log change nothing, no record is unrecorded."""

import itertools
import json
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from grstream.config import EventsConfig
from grstream.events import Decoded, EventDecoder
from grstream.keys import Namespace, key_of

CONFIG = EventsConfig(actions=["click", "like"], context=["country"])

ids = st.one_of(st.integers(-3, 3), st.sampled_from(["a", "b", "3", "-1", "03"]))
events = st.builds(
    lambda user, item, actions, time, more: json.dumps(
        {"user_id": user, "item_id": item, "actions": actions, "timestamp_ms": time} | more
    ).encode(),
    ids,
    ids,
    st.lists(st.sampled_from(["click", "like", "buy"]), max_size=2),
    st.integers(-1, 400_000),
    st.sampled_from(
        [{}, {"event_id": "e"}, {"context": {"country": "PT"}}, {"context": {"country": 1}}, {"x": 1}]
    ),
)
poison = st.sampled_from([b"", b"{}", b"{", b"\xff", b"[]", b'{"user_id":1}{"user_id":2}', b"{}\n{}"])
logs = st.lists(st.one_of(events, events, events, poison, st.none()), max_size=60)


KEYS = [b"7", b"ann", None, b"", b"\xff"]  # by offset, over and over
READABLE = 2


def decode(decoder: EventDecoder, log: list[bytes | None], start: int, stop: int) -> Decoded:
    keys = [KEYS[offset % len(KEYS)] for offset in range(start, stop)]
    return decoder.decode(0, np.arange(start, stop), log[start:stop], np.arange(start, stop), keys)


def tombstones_of(decoded: Decoded) -> list[tuple[int, int]]:
    return list(zip(decoded.tombstones.offsets.tolist(), decoded.tombstones.users.tolist(), strict=True))


def events_of(decoded: Decoded) -> list[tuple[Any, ...]]:
    b = decoded.batch
    columns = (b.offsets, b.users, b.items, b.actions, b.times, b.event_keys)
    names = [b.item_names.get(item) for item in b.items.tolist()]
    return list(zip(*(c.tolist() for c in columns), map(tuple, b.features.tolist()), names, strict=True))


@given(logs, st.lists(st.integers(0, 60)))
def test_however_a_log_is_cut_its_records_decode_the_same(log: list[bytes | None], cuts: list[int]) -> None:
    whole = decode(EventDecoder(CONFIG), log, 0, len(log))
    bounds = sorted({0, len(log), *(cut for cut in cuts if cut < len(log))})
    decoder = EventDecoder(CONFIG)
    parts = [decode(decoder, log, a, b) for a, b in itertools.pairwise(bounds)]
    assert [event for part in parts for event in events_of(part)] == events_of(whole)
    assert [letter for part in parts for letter in part.rejected] == whole.rejected
    assert [tombstone for part in parts for tombstone in tombstones_of(part)] == tombstones_of(whole)


@given(logs)
def test_every_record_is_an_event_or_a_dead_letter_or_a_tombstone(log: list[bytes | None]) -> None:
    decoded = decode(EventDecoder(CONFIG), log, 0, len(log))
    tombstones = tombstones_of(decoded)
    ended = [*decoded.batch.offsets.tolist(), *(r.offset for r in decoded.rejected), *dict(tombstones)]
    assert sorted(ended) == list(range(len(log)))
    assert [r.offset for r in decoded.rejected] == sorted(r.offset for r in decoded.rejected)
    empty = [offset for offset, value in enumerate(log) if value is None]
    users = [key_of(Namespace.USER, user) for user in (7, "ann")]
    assert tombstones == [(o, users[o % len(KEYS)]) for o in empty if o % len(KEYS) < READABLE]
    assert all(rejected.reason for rejected in decoded.rejected)
