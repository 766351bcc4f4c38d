"""An action event on the wire, and the decoding of a fetched batch of them into columns.

`EventSchema` says what an event is: one pydantic model plus the names the configuration allows. It judges one
event at a time and gives the reasons. `EventDecoder` turns the values of a partition's records into an
`EventBatch`, by columns through pyarrow's JSON reader; whatever that does not take as it stands goes through
`EventSchema`, one record at a time. What becomes of a record depends on that record alone, never on its
neighbours: the fast way accepts nothing that the schema refuses, and reads no value differently.

Wire format: a JSON object in UTF-8. `null` stands for an absent optional field or feature. Where a name is
given twice the last one counts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pydantic

from grstream.columns import ColumnReader, Columns, event_keys, exposure_keys
from grstream.config import EventsConfig
from grstream.keys import ABSENT, INT64_MAX, Id, Keys, Namespace, canonical_id, feature_namespace, key_of

_REASON_CHARS = 300  # a reason quotes what came, which may be a megabyte long


class InvalidEvent(ValueError):
    """One event is not what the configuration allows; `field` is the dotted path of the wrong field."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        reason = reason if len(reason) <= _REASON_CHARS else reason[:_REASON_CHARS] + "…"
        super().__init__(f"{field}: {reason}" if field else reason)
        self.reason = reason
        self.field = field


def _parse_id(value: Any) -> Id:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"an id is an integer or a string, not {type(value).__name__}")
    return canonical_id(value)


def _given(value: Any, info: pydantic.ValidationInfo) -> Any:
    """A mapping without its nulls, which stand for absent features, and without what is to be ignored.

    The validation's context holds the names that are not, by field.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return value
    known = (info.context or {}).get(info.field_name)
    return {k: v for k, v in value.items() if v is not None and (known is None or k in known)}


WireId = Annotated[int | str, pydantic.BeforeValidator(_parse_id)]
Features = Annotated[dict[str, WireId], pydantic.BeforeValidator(_given)]


class Served(pydantic.BaseModel):
    """Where an impression came from, for whoever reads the log; neither histories nor the trainer heed it."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="ignore")

    by: str | None = pydantic.Field(None, description="rank, retrieve or recommend")
    version: int | None = pydantic.Field(None, description="of the weights")
    arm: str | None = pydantic.Field(None, description="of an A/B test")
    score: float | None = None
    rank: int | None = pydantic.Field(None, description="place by score in its list, from 0")


class ActionEvent(pydantic.BaseModel):
    """A user acted upon an item, or was shown it (no actions). Ids are held in their canonical form."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")

    event_id: str | None = pydantic.Field(
        None, min_length=1, description="one occurrence, sent again or not; default: partition and offset"
    )
    user_id: WireId
    item_id: WireId
    actions: list[str] = pydantic.Field(description="configured names, each once; none: only shown")
    timestamp_ms: int = pydantic.Field(ge=0, le=INT64_MAX, description="milliseconds since 1970")
    context: Features = pydantic.Field({}, description="categorical features of the moment")
    item_features: Features = pydantic.Field({}, description="categorical features of the item")
    exposure_id: str | None = pydantic.Field(
        None,
        min_length=1,
        description="where exposures are joined: without actions the item was shown under this id, with some "
        "it was acted upon because of that",
    )
    served: Served | None = pydantic.Field(None, description="where exposures are joined: what listed it")

    def to_json(self) -> bytes:
        """The event as a record's value."""
        return self.__pydantic_serializer__.to_json(self, exclude_defaults=True)


class _LenientEvent(ActionEvent):
    model_config = pydantic.ConfigDict(extra="ignore")


class _LenientPlainEvent(_LenientEvent):
    exposure_id: Annotated[None, pydantic.BeforeValidator(lambda value: None)] = None
    served: Annotated[None, pydantic.BeforeValidator(lambda value: None)] = None


class EventSchema:
    """What the configuration allows an event to be."""

    def __init__(self, config: EventsConfig) -> None:
        self.config = config
        self._bit = {name: 1 << bit for bit, name in enumerate(config.actions)}
        self._namespaces = [feature_namespace(name) for name in config.features]
        self._strict = config.unknown_fields == "reject"
        lenient = _LenientEvent if config.exposures else _LenientPlainEvent
        self._model: type[ActionEvent] = ActionEvent if self._strict else lenient
        # What is ignored is not judged either.
        self._heeded = (
            None if self._strict else {"context": config.context, "item_features": config.item_features}
        )

    def validate(
        self, data: bytes | Mapping[str, Any] | ActionEvent, record_time_ms: int | None = None
    ) -> ActionEvent:
        """The event, or InvalidEvent with the reason and the field.

        `record_time_ms` is the time of the record that carries it (at the HTTP edge, the clock's); a time
        further ahead of it than `max_future_ms` is refused. None, or Kafka's -1: not judged.
        """
        try:
            if isinstance(data, bytes):
                event = self._model.model_validate_json(data, context=self._heeded)
            else:
                event = self._model.model_validate(data, context=self._heeded)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            reason = first["msg"].removeprefix("Value error, ")
            raise InvalidEvent(reason, ".".join(map(str, first["loc"])) or None) from error
        if self.config.exposures is None:
            for field in ("exposure_id", "served"):
                if getattr(event, field) is not None:
                    raise InvalidEvent("exposures are not joined: events.exposures is not configured", field)
        self.mask(event.actions)
        context = self._known("context", event.context, self.config.context)
        item_features = self._known("item_features", event.item_features, self.config.item_features)
        if record_time_ms is not None and record_time_ms >= 0:
            ahead = event.timestamp_ms - record_time_ms
            if ahead > self.config.max_future_ms:
                raise InvalidEvent(
                    f"{ahead} ms ahead of its record's time; at most {self.config.max_future_ms} is allowed",
                    "timestamp_ms",
                )
        if len(context) == len(event.context) and len(item_features) == len(event.item_features):
            return event
        return event.model_copy(update={"context": context, "item_features": item_features})

    def mask(self, actions: Sequence[str]) -> int:
        """The actions as bits: bit a is configured action a."""
        mask = 0
        for action in actions:
            bit = self._bit.get(action)
            if bit is None:
                allowed = ", ".join(self.config.actions)
                raise InvalidEvent(f"unknown action {action[:80]!r}; allowed: {allowed}", "actions")
            if mask & bit:
                raise InvalidEvent(f"action {action!r} is given twice", "actions")
            mask |= bit
        return mask

    def feature_keys(self, event: ActionEvent) -> list[int]:
        """One key per configured feature, in the order of `config.features`; ABSENT where not given."""
        given = [event.context.get(name) for name in self.config.context]
        given += [event.item_features.get(name) for name in self.config.item_features]
        columns = zip(self._namespaces, given, strict=True)
        return [ABSENT if value is None else key_of(namespace, value) for namespace, value in columns]

    def _known(self, field: str, given: dict[str, Id], names: list[str]) -> dict[str, Id]:
        unknown = given.keys() - set(names)
        if unknown and self._strict:
            name = min(unknown)[:80]
            raise InvalidEvent(
                f"unknown feature; allowed: {', '.join(names) or 'none is configured'}", f"{field}.{name}"
            )
        return {k: v for k, v in given.items() if k not in unknown} if unknown else given


@dataclasses.dataclass(frozen=True)
class EventBatch:
    """Decoded events of one partition, in the order of their offsets."""

    partition: int
    offsets: npt.NDArray[np.int64]  # (n,)
    users: Keys  # (n,)
    items: Keys  # (n,)
    actions: npt.NDArray[np.int32]  # (n,) bit a is set where configured action a was taken
    times: npt.NDArray[np.int64]  # (n,) milliseconds since 1970
    features: npt.NDArray[np.int64]  # (n, F) keys, ABSENT where the event carried none
    event_keys: Keys  # (n,) key of (user, event id); ABSENT without an id
    item_names: dict[int, str]  # item key -> id, of the string ids among the items
    exposures: Keys | None = None  # (n,) key of (user, exposure id); None where exposures are not joined

    def __len__(self) -> int:
        return len(self.offsets)

    def rows(self, start: int, stop: int) -> "EventBatch":
        """Some of the events that follow one another; without names, which hold for all."""
        columns = ("offsets", "users", "items", "actions", "times", "features", "event_keys")
        cut = {name: getattr(self, name)[start:stop] for name in columns}
        exposures = None if self.exposures is None else self.exposures[start:stop]
        return EventBatch(partition=self.partition, item_names={}, exposures=exposures, **cut)


@dataclasses.dataclass(frozen=True)
class Tombstones:
    """Records without a value: each forgets the user that its key names. In the order of their offsets."""

    offsets: npt.NDArray[np.int64]  # (n,)
    users: Keys  # (n,)

    @classmethod
    def of(cls, found: Sequence[tuple[int, int]] = ()) -> "Tombstones":
        """From (offset, user key) pairs."""
        columns = np.array(found, np.int64).reshape(-1, 2)
        return cls(columns[:, 0], columns[:, 1])

    def __len__(self) -> int:
        return len(self.offsets)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that is no event: where it stands and why."""

    offset: int
    reason: str
    field: str | None


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What became of each record: an event, a dead letter or a tombstone; all in the order of offsets."""

    batch: EventBatch
    rejected: list[Rejected]
    tombstones: Tombstones


class EventDecoder:
    """Decodes records of any partition; remembers nothing that could change what a record becomes."""

    def __init__(self, config: EventsConfig) -> None:
        self.schema = EventSchema(config)
        self._reader = ColumnReader(config)
        self._features = len(config.features)
        self._exposures = config.exposures is not None

    def decode(
        self,
        partition: int,
        offsets: npt.ArrayLike,
        values: Sequence[bytes | None],
        record_times_ms: npt.ArrayLike,
        keys: Sequence[bytes | None] | None = None,
    ) -> Decoded:
        """Decode n records in the order of their offsets; `record_times_ms` are Kafka's, -1 for none.

        `keys` are the records' own; only that of a record without a value is looked at, which is a dead
        letter where its key names no user.
        """
        at = np.asarray(offsets, np.int64)  # (n,)
        record_times = np.asarray(record_times_ms, np.int64)  # (n,)
        columns = Columns.empty(len(values), self._features)
        rejected, tombstones = [], []
        for row in [i for i, value in enumerate(values) if value is None] if None in values else []:
            try:
                tombstones.append((int(at[row]), _user_of(keys[row] if keys else None)))
            except InvalidEvent as error:
                rejected.append(Rejected(int(at[row]), error.reason, error.field))
        for row in self._reader.read(values, record_times, columns):
            value = values[row]
            assert value is not None
            try:
                self._put(columns, row, self.schema.validate(value, int(record_times[row])))
            except InvalidEvent as error:
                rejected.append(Rejected(int(at[row]), error.reason, error.field))
        keep = np.flatnonzero(columns.good)
        batch = EventBatch(
            partition=partition,
            offsets=at[keep],
            users=columns.users[keep],
            items=columns.items[keep],
            actions=columns.actions[keep],
            times=columns.times[keep],
            features=columns.features[keep],
            event_keys=columns.event_keys[keep],
            item_names=columns.item_names,
            exposures=columns.exposures[keep] if self._exposures else None,
        )
        rejected.sort(key=lambda r: r.offset)
        return Decoded(batch, rejected, Tombstones.of(tombstones))

    def _put(self, columns: Columns, row: int, event: ActionEvent) -> None:
        columns.users[row] = key_of(Namespace.USER, event.user_id)
        columns.items[row] = item = key_of(Namespace.ITEM, event.item_id)
        columns.actions[row] = self.schema.mask(event.actions)
        columns.times[row] = event.timestamp_ms
        columns.features[row] = self.schema.feature_keys(event)
        user = columns.users[row : row + 1]
        if event.event_id is not None:
            columns.event_keys[row] = event_keys(user, [event.event_id])[0]
        if event.exposure_id is not None:
            columns.exposures[row] = exposure = exposure_keys(user, [event.exposure_id])[0]
            if event.event_id is None and not event.actions:
                columns.event_keys[row] = exposure
        if isinstance(event.item_id, str):
            columns.item_names[item] = event.item_id
        columns.good[row] = True


def _user_of(key: bytes | None) -> int:
    """The user key of the id that a tombstone's record key spells; InvalidEvent where it spells none."""
    try:
        return key_of(Namespace.USER, (key or b"").decode())
    except ValueError as error:
        raise InvalidEvent(
            f"a record without a value forgets the user whose id its key spells, and {key!r} spells none",
            "key",
        ) from error
