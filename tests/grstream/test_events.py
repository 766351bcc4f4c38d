"""One event is judged with reasons; a batch is decoded the same, fast, and poison harms only itself."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grstream import columns
from grstream.config import EventsConfig, ExposuresConfig
from grstream.events import ActionEvent, Decoded, EventDecoder, EventSchema, InvalidEvent
from grstream.keys import ABSENT, INT64_MAX, INT64_MIN, Namespace, feature_namespace, key_of

CONFIG = EventsConfig(
    actions=["click", "like", "COMMENT_CREATED"], context=["country", "lang"], item_features=["genre"]
)
LENIENT = CONFIG.model_copy(update={"unknown_fields": "ignore"})
NOW = 1_700_000_000_000
GOOD: dict[str, Any] = {"user_id": 7, "item_id": -5, "actions": ["click"], "timestamp_ms": NOW}


def wire(event: object) -> bytes:
    return json.dumps(event).encode()


def decode(
    values: list[bytes | None],
    config: EventsConfig = CONFIG,
    now: int = NOW,
    keys: list[bytes | None] | None = None,
) -> Decoded:
    return EventDecoder(config).decode(
        3, 100 + np.arange(len(values)), values, np.full(len(values), now, np.int64), keys
    )


def rows(decoded: Decoded) -> dict[int, tuple[Any, ...]]:
    """What a decoding says of each offset, in plain values."""
    b = decoded.batch
    exposures = [None] * len(b) if b.exposures is None else b.exposures.tolist()
    said: dict[int, tuple[Any, ...]] = {
        int(o): (int(u), int(i), int(a), int(t), tuple(f.tolist()), int(e), b.item_names.get(int(i)), x)
        for o, u, i, a, t, f, e, x in zip(
            b.offsets, b.users, b.items, b.actions, b.times, b.features, b.event_keys, exposures, strict=True
        )
    }
    said |= {r.offset: (r.reason, r.field) for r in decoded.rejected}
    said |= {offset: () for offset in decoded.tombstones.offsets.tolist()}
    return said


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"actions": ["buy"]}, "actions", "unknown action 'buy'; allowed: click, like, COMMENT_CREATED"),
        ({"actions": ["like", "like"]}, "actions", "action 'like' is given twice"),
        ({"actions": "click"}, "actions", "Input should be a valid array"),
        ({"actions": [None]}, "actions.0", "Input should be a valid string"),
        ({"user_id": None}, "user_id", "an id is an integer or a string, not NoneType"),
        ({"user_id": True}, "user_id", "an id is an integer or a string, not bool"),
        ({"item_id": 1.0}, "item_id", "an id is an integer or a string, not float"),
        ({"item_id": 2**63}, "item_id", "9223372036854775808 is outside int64"),
        ({"item_id": ""}, "item_id", "an id must not be empty"),
        ({"event_id": ""}, "event_id", "String should have at least 1 character"),
        ({"event_id": 5}, "event_id", "Input should be a valid string"),
        ({"timestamp_ms": -1}, "timestamp_ms", "Input should be greater than or equal to 0"),
        ({"timestamp_ms": str(NOW)}, "timestamp_ms", "Input should be a valid integer"),
        ({"timestamp_ms": NOW + 300_001}, "timestamp_ms", "300001 ms ahead of its record's time"),
        ({"context": {"city": 1}}, "context.city", "unknown feature; allowed: country, lang"),
        ({"context": {"lang": [1]}}, "context.lang", "an id is an integer or a string, not list"),
        ({"item_features": {"lang": 1}}, "item_features.lang", "unknown feature; allowed: genre"),
        ({"usr_id": 1}, "usr_id", "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_field_is_named_with_its_reason_whether_judged_alone_or_decoded(
    change: dict[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(InvalidEvent) as caught:
        EventSchema(CONFIG).validate(wire(GOOD | change), NOW)
    assert caught.value.field == field
    assert caught.value.reason.startswith(reason)
    [rejected] = decode([wire(GOOD), wire(GOOD | change)] + [wire(GOOD)] * 100).rejected
    assert (rejected.offset, rejected.field, rejected.reason) == (101, field, caught.value.reason)


@pytest.mark.parametrize("field", ["user_id", "item_id", "actions", "timestamp_ms"])
def test_a_missing_field_is_named(field: str) -> None:
    event = {k: v for k, v in GOOD.items() if k != field}
    [rejected] = decode([wire(event)] + [wire(GOOD)] * 100).rejected
    assert (rejected.offset, rejected.field, rejected.reason) == (100, field, "Field required")


def test_a_reason_does_not_quote_a_megabyte() -> None:
    [rejected] = decode([wire(GOOD | {"actions": ["x" * 1_000_000]})]).rejected
    assert len(rejected.reason) < 400
    [rejected] = decode([wire(GOOD | {"item_id": 10**4000})]).rejected
    assert len(rejected.reason) < 400


def test_an_event_with_no_actions_was_shown_and_no_more() -> None:
    batch = decode(
        [wire(GOOD | {"actions": []}), wire(GOOD | {"actions": ["COMMENT_CREATED", "click"]})]
    ).batch
    assert batch.actions.tolist() == [0, 0b101]


def test_columns_hold_keys_in_their_namespaces_and_the_names_of_string_items() -> None:
    event = GOOD | {
        "item_id": "Ω-1",
        "event_id": "e",
        "context": {"lang": "pt", "country": None},
        "item_features": {"genre": "12"},
    }
    batch = decode([wire(event), wire(GOOD)]).batch
    assert batch.partition == 3
    assert batch.users.tolist() == [key_of(Namespace.USER, 7)] * 2
    assert batch.items.tolist() == [key_of(Namespace.ITEM, "Ω-1"), key_of(Namespace.ITEM, -5)]
    assert batch.item_names == {key_of(Namespace.ITEM, "Ω-1"): "Ω-1"}
    lang = key_of(feature_namespace("context.lang"), "pt")
    genre = key_of(feature_namespace("item.genre"), 12)
    assert batch.features.tolist() == [[ABSENT, lang, genre], [ABSENT] * 3]
    assert batch.event_keys[0] != ABSENT
    assert batch.event_keys[1] == ABSENT


def test_an_event_id_is_its_users_own() -> None:
    events = [GOOD | {"event_id": "e", "user_id": u} for u in (1, 2, "1", "x")]
    keys = decode([wire(e) for e in events]).batch.event_keys
    assert keys[0] == keys[2]
    assert len(set(keys.tolist())) == 3


def test_integers_above_2_to_53_are_exact_and_a_decimal_string_is_the_integer() -> None:
    big = [INT64_MAX, INT64_MIN, 2**53 + 1]
    for spelt in (big, list(map(str, big))):
        batch = decode([wire(GOOD | {"item_id": i}) for i in spelt]).batch
        assert batch.items.tolist() == [key_of(Namespace.ITEM, i) for i in big]
        assert batch.item_names == {}


def test_tombstones_and_dead_letters_and_events_keep_their_offsets() -> None:
    values = [wire(GOOD), None, b"", wire(GOOD), b"\xff\x00", None]
    decoded = decode(values, keys=[b"7", b"7", None, b"7", b"7", b"ann"])
    assert decoded.batch.offsets.tolist() == [100, 103]
    assert decoded.tombstones.offsets.tolist() == [101, 105]
    assert decoded.tombstones.users.tolist() == [key_of(Namespace.USER, user) for user in (7, "ann")]
    assert [r.offset for r in decoded.rejected] == [102, 104]
    assert len(decode([]).batch) == 0


@pytest.mark.parametrize("key", [None, b"", b"\xff"])
def test_a_record_without_a_value_whose_key_spells_no_user_is_a_dead_letter(key: bytes | None) -> None:
    decoded = decode([None, wire(GOOD)], keys=[key, b"7"])
    assert len(decoded.tombstones) == 0
    assert [(r.offset, r.field) for r in decoded.rejected] == [(100, "key")]
    assert "spells none" in decoded.rejected[0].reason
    assert decoded.batch.offsets.tolist() == [101]


def test_a_record_without_a_time_has_no_future() -> None:
    assert len(decode([wire(GOOD)], now=-1).batch) == 1
    assert len(decode([wire(GOOD)], now=0).batch) == 0


def test_unknown_fields_are_ignored_where_the_configuration_says_so() -> None:
    plain = GOOD | {"context": {"lang": 2}}
    debug = {"deep": [[1, {"x": None}]]}
    for city, company in itertools.product([1, False, 1.5, [], {}, ""], ([], [wire(GOOD)] * 100)):
        event = GOOD | {"debug": debug, "context": {"city": city, "lang": 2}}
        decoded = decode([wire(event), wire(plain), *company], LENIENT)
        said = rows(decoded)
        assert not decoded.rejected
        assert said[100] == said[101]
        assert EventSchema(LENIENT).validate(wire(event)) == EventSchema(LENIENT).validate(wire(plain))


def test_an_event_survives_its_own_json() -> None:
    event = ActionEvent(
        event_id="e", user_id=-(2**63), item_id="a\n", actions=[], timestamp_ms=1, context={"lang": "ü"}
    )
    assert EventSchema(CONFIG).validate(event.to_json()) == event
    assert b"item_features" not in event.to_json()


def test_an_exposure_id_is_an_unknown_field_unless_exposures_are_joined() -> None:
    value = wire(GOOD | {"exposure_id": "x", "actions": []})
    [refused] = decode([wire(GOOD | {"served": {"version": 1}})]).rejected
    assert (refused.field, "events.exposures" in refused.reason) == ("served", True)
    [refused] = decode([value]).rejected
    assert (refused.field, "events.exposures" in refused.reason) == ("exposure_id", True)
    for odd in ("x", 5, [1]):
        ignored = decode([wire(GOOD | {"exposure_id": odd})], LENIENT)
        assert (len(ignored.batch), ignored.batch.exposures) == (1, None)
    joined = CONFIG.model_copy(update={"exposures": ExposuresConfig()})
    again, other = wire(GOOD | {"exposure_id": "x"}), wire(GOOD | {"exposure_id": "x", "user_id": 8})
    batch = decode([value, value, again, other, wire(GOOD)], joined).batch
    shown, resent, label, of_other, plain = batch.exposures.tolist()  # type: ignore[union-attr]
    assert shown == resent == label != of_other
    assert plain == ABSENT
    assert batch.event_keys.tolist() == [shown, shown, ABSENT, ABSENT, ABSENT]  # shown once, labelled often


def test_what_served_an_impression_is_judged_and_goes_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = CONFIG.model_copy(update={"exposures": ExposuresConfig()})
    served = {"by": "rank", "version": 4, "arm": "b", "score": 0.25, "rank": 0}
    shown = GOOD | {"exposure_id": "x", "actions": []}
    good = [
        wire(shown | {"served": served}),
        wire(shown | {"served": {}}),
        wire(shown | {"served": None}),
    ] * 40
    for field, wrong in [("score", "1"), ("version", 1.5), ("by", 1), ("arm", []), ("rank", True)]:
        bad = wire(shown | {"served": served | {field: wrong}})
        decoded = decode([*good, bad, *good], joined)
        assert [(r.offset, r.field) for r in decoded.rejected] == [(220, f"served.{field}")]
        assert len(decoded.batch) == 240
    monkeypatch.setattr(EventSchema, "validate", lambda *_: pytest.fail("it was judged alone"))
    assert len(decode(list(good), joined).batch) == 120


ids = st.one_of(
    st.integers(-5, 5),
    st.integers(INT64_MIN, INT64_MAX),
    st.integers(INT64_MIN, INT64_MAX).map(str),
    st.sampled_from(["-0", "007", "1.0", "a", "b", "9223372036854775808", "12\n", "é"]),
    st.text(min_size=1, max_size=5).filter(lambda s: s.isprintable()),
)
events = st.fixed_dictionaries(
    {
        "user_id": ids,
        "item_id": ids,
        "actions": st.lists(st.sampled_from(CONFIG.actions), unique=True),
        "timestamp_ms": st.integers(0, NOW),
    },
    optional={
        "event_id": st.one_of(st.none(), st.text(min_size=1, max_size=6)),
        "exposure_id": st.one_of(st.none(), st.text(min_size=1, max_size=6)),
        "served": st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {},
                optional={
                    "by": st.one_of(st.none(), st.text(max_size=3)),
                    "version": st.one_of(st.none(), st.integers(0, 2**63)),
                    "score": st.one_of(st.none(), st.integers(), st.floats()),
                    "rank": st.integers(),
                },
            ),
        ),
        "context": st.one_of(
            st.none(),
            st.fixed_dictionaries({}, optional={"country": ids, "lang": st.one_of(st.none(), ids)}),
        ),
        "item_features": st.fixed_dictionaries({}, optional={"genre": ids}),
    },
)
odd = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(-(2**70), 2**70), st.text(), st.just([]))
spoilt = st.builds(
    lambda event, field, value: event | {field: value},
    events,
    st.sampled_from([*ActionEvent.model_fields, "debug"]),
    st.one_of(
        odd, st.dictionaries(st.sampled_from(["lang", "genre", "score", "arm", "x"]), odd), st.lists(odd)
    ),
)
dumped = st.builds(
    lambda event, ascii_only, spaces: json.dumps(
        event, ensure_ascii=ascii_only, separators=(", ", ": ") if spaces else (",", ":")
    ).encode("utf-8", "surrogatepass"),
    st.one_of(events, spoilt),
    st.booleans(),
    st.booleans(),
)
mangled = st.one_of(
    st.binary(max_size=30),
    st.builds(lambda a, cut: a[:cut], dumped, st.integers(0, 200)),
    st.builds(lambda a, cut: a[-cut:], dumped, st.integers(1, 200)),
    st.builds(
        lambda a, b, sep: a + sep + b, dumped, dumped, st.sampled_from([b"", b"\n", b"\0", b",", b" "])
    ),
    st.builds(lambda a: a + b"\0}", dumped),
    st.builds(lambda a: b" " + a.replace(b",", b",\n"), dumped),
    st.builds(lambda a: a[:-1] + b"," + a[1:], dumped),  # every name twice
    st.builds(
        lambda a, at, byte: a[:at] + byte + a[at + 1 :], dumped, st.integers(0, 99), st.binary(max_size=1)
    ),
    st.sampled_from([b'{"user_id":1,"context":{"lang":2}', b'{"debug":"}', b'{"context":{}}}', b"{}"]),
    st.sampled_from([b'{"debug":%s}' % (b"[" * 300 + b"]" * 300), b'{"debug":%s}' % (b"1" * 5000)]),
)
batches = st.lists(st.one_of(dumped, dumped, dumped, mangled, st.none()), max_size=12)


@pytest.mark.parametrize(
    "config",
    [CONFIG, LENIENT, *(c.model_copy(update={"exposures": ExposuresConfig()}) for c in (CONFIG, LENIENT))],
    ids=["reject", "ignore", "reject-exposures", "ignore-exposures"],
)
@given(values=batches, warm=batches)
def test_a_record_decodes_the_same_alone_in_company_and_by_the_schema(
    config: EventsConfig, values: list[bytes | None], warm: list[bytes | None]
) -> None:
    def decoded(slow_at_most: int) -> dict[int, tuple[Any, ...]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(columns, "SLOW_AT_MOST", slow_at_most)
            decoder = EventDecoder(config)
            times = np.full(len(warm), NOW)
            decoder.decode(0, np.arange(len(warm)), warm, times)  # leaves its guesses behind
            times = np.full(len(values), NOW)
            return rows(decoder.decode(0, np.arange(len(values)), values, times, [b"7"] * len(values)))

    schema = EventSchema(config)
    expected = {}
    for offset, value in enumerate(values):
        if value is None:
            expected[offset] = ()
            continue
        try:
            event = schema.validate(value, NOW)
        except InvalidEvent as error:
            expected[offset] = (error.reason, error.field)
            continue
        user = key_of(Namespace.USER, event.user_id)
        occurrence = ABSENT
        if event.event_id is not None:
            occurrence = int(columns.event_keys(np.array([user]), [event.event_id])[0])
        exposure = ABSENT
        if event.exposure_id is not None:
            exposure = int(columns.exposure_keys(np.array([user]), [event.exposure_id])[0])
            if event.event_id is None and not event.actions:
                occurrence = exposure
        expected[offset] = (
            user,
            key_of(Namespace.ITEM, event.item_id),
            sum(1 << config.actions.index(a) for a in event.actions),
            event.timestamp_ms,
            tuple(schema.feature_keys(event)),
            occurrence,
            event.item_id if isinstance(event.item_id, str) else None,
            exposure if config.exposures else None,
        )
    assert decoded(slow_at_most=1) == expected  # all that can go the fast way does
    assert decoded(slow_at_most=32) == expected
    alone = [decode([value], config, keys=[b"7"]) for value in values]
    assert [rows(d)[100] for d in alone] == list(expected.values())


EVENT = b'{"user_id":1,"item_id":2,"actions":[],"timestamp_ms":3}'
OPEN = b'{"user_id":1,"item_id":2,"actions":[],"timestamp_ms":3,"context":'


@pytest.mark.parametrize(
    "values",
    [
        # As many objects as records, if the records ran together.
        [OPEN, b'{"lang":2}}', EVENT + EVENT],
        [OPEN + b'{"lang":2', b"}}", EVENT + EVENT],
        [EVENT + EVENT + b"\0}", EVENT],
        [EVENT + b"\n" + EVENT, b" "],
        [EVENT + EVENT, b""],
        [b'{"event_id":"}', b'{",' + EVENT[1:], EVENT + EVENT],
    ],
)
def test_records_do_not_run_together(values: list[bytes | None]) -> None:
    decoded = decode([*values, EVENT])
    assert [r.offset for r in decoded.rejected] == [100 + i for i, v in enumerate(values) if v != EVENT]


@pytest.mark.parametrize("field", ["user_id", "item_id", "event_id"])
def test_an_empty_string_among_strings_is_no_id(field: str) -> None:
    texts = ["a"] * 50 + [""] + ["b"] * 50
    [rejected] = decode([wire(GOOD | {field: text}) for text in texts]).rejected
    assert (rejected.offset, rejected.field) == (150, field)


@pytest.mark.parametrize("ignored", [b"[" * 300 + b"]" * 300, b"1" * 5000, b'"\xff"', b'{"\xff":1}'])
def test_what_the_schema_refuses_inside_an_ignored_field_is_refused_in_company_too(ignored: bytes) -> None:
    value = b'{"debug":' + ignored + b"," + EVENT[1:]
    with pytest.raises(InvalidEvent):
        EventSchema(LENIENT).validate(value)
    assert [r.offset for r in decode([EVENT, value, EVENT], LENIENT).rejected] == [101]


def test_one_poison_record_or_mixed_ids_leave_the_rest_to_the_fast_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = 0
    validate = EventSchema.validate

    def counting(*args: Any) -> ActionEvent:
        nonlocal judged
        judged += 1
        return validate(*args)

    monkeypatch.setattr(EventSchema, "validate", counting)
    values = [wire(GOOD | {"user_id": i if i % 3 else f"u{i}"}) for i in range(1000)]
    decoder, times = EventDecoder(CONFIG), np.full(1000, NOW)
    assert len(decoder.decode(0, np.arange(1000), values, times).batch) == 1000
    assert judged == 0
    values[500] = b"{poison}"
    assert len(decoder.decode(0, np.arange(1000), values, times).batch) == 999
    assert judged <= 2 * columns.SLOW_AT_MOST
