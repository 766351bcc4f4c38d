from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Candidate(_message.Message):
    __slots__ = ("item_id", "item_features")
    class ItemFeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_FEATURES_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    item_features: _containers.ScalarMap[str, str]
    def __init__(self, item_id: _Optional[str] = ..., item_features: _Optional[_Mapping[str, str]] = ...) -> None: ...

class PastEvent(_message.Message):
    __slots__ = ("item_id", "actions", "timestamp_ms", "context", "item_features")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class ItemFeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_MS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ITEM_FEATURES_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    actions: _containers.RepeatedScalarFieldContainer[str]
    timestamp_ms: int
    context: _containers.ScalarMap[str, str]
    item_features: _containers.ScalarMap[str, str]
    def __init__(self, item_id: _Optional[str] = ..., actions: _Optional[_Iterable[str]] = ..., timestamp_ms: _Optional[int] = ..., context: _Optional[_Mapping[str, str]] = ..., item_features: _Optional[_Mapping[str, str]] = ...) -> None: ...

class History(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[PastEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[PastEvent, _Mapping]]] = ...) -> None: ...

class RankRequest(_message.Message):
    __slots__ = ("user_id", "candidates", "context", "at_ms", "history", "min_offset", "token", "explain")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    MIN_OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    context: _containers.ScalarMap[str, str]
    at_ms: int
    history: History
    min_offset: int
    token: str
    explain: bool
    def __init__(self, user_id: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., context: _Optional[_Mapping[str, str]] = ..., at_ms: _Optional[int] = ..., history: _Optional[_Union[History, _Mapping]] = ..., min_offset: _Optional[int] = ..., token: _Optional[str] = ..., explain: _Optional[bool] = ...) -> None: ...

class Position(_message.Message):
    __slots__ = ("partition", "offset")
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    partition: int
    offset: int
    def __init__(self, partition: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class Explain(_message.Message):
    __slots__ = ("reuse", "epoch", "events", "tokens", "cached_tokens")
    REUSE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    reuse: str
    epoch: int
    events: int
    tokens: int
    cached_tokens: int
    def __init__(self, reuse: _Optional[str] = ..., epoch: _Optional[int] = ..., events: _Optional[int] = ..., tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Scored(_message.Message):
    __slots__ = ("item_id", "probabilities", "known")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    known: bool
    def __init__(self, item_id: _Optional[str] = ..., probabilities: _Optional[_Iterable[float]] = ..., known: _Optional[bool] = ...) -> None: ...

class RankAnswer(_message.Message):
    __slots__ = ("user_id", "version", "history_length", "history_source", "position", "exposure_id", "explain", "actions", "results", "stale")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HISTORY_LENGTH_FIELD_NUMBER: _ClassVar[int]
    HISTORY_SOURCE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    EXPOSURE_ID_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    version: int
    history_length: int
    history_source: str
    position: Position
    exposure_id: str
    explain: Explain
    actions: _containers.RepeatedScalarFieldContainer[str]
    results: _containers.RepeatedCompositeFieldContainer[Scored]
    stale: bool
    def __init__(self, user_id: _Optional[str] = ..., version: _Optional[int] = ..., history_length: _Optional[int] = ..., history_source: _Optional[str] = ..., position: _Optional[_Union[Position, _Mapping]] = ..., exposure_id: _Optional[str] = ..., explain: _Optional[_Union[Explain, _Mapping]] = ..., actions: _Optional[_Iterable[str]] = ..., results: _Optional[_Iterable[_Union[Scored, _Mapping]]] = ..., stale: _Optional[bool] = ...) -> None: ...
