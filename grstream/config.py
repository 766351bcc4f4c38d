"""The one configuration of a grstream system: a YAML file, validated here and trusted everywhere else.

Every field states its unit and default. An unknown field is an error that names its path. This is the only
module of the project that reads environment variables.
"""

import os
import pathlib
import re
from typing import Annotated, Literal, Self

import pydantic
import yaml

from grstream.keys import feature_namespace

MAX_ACTIONS = 31  # a set of actions travels as the bits of a non-negative int32
ACTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,63}")

Name = Annotated[str, pydantic.StringConstraints(pattern=f"^{ACTION_NAME.pattern}$")]


class ConfigError(ValueError):
    """The configuration is wrong; the message gives the path of each wrong field and what it may be."""


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class KafkaConfig(Section):
    """Where the log of actions is."""

    bootstrap_servers: list[str] = ["127.0.0.1:9092"]
    topic: str = "actions"
    dead_letter_topic: str | None = pydantic.Field(None, description="default: <topic>.dead")
    dead_letter_retention_ms: int = pydantic.Field(
        604_800_000, ge=1, description="of that topic, where it is created here: how long a letter stays"
    )
    items_topic: str | None = pydantic.Field(
        None,
        description="compacted topic that announces items and withdraws them, key = item id; default: none, "
        "and items are those that the weights know",
    )
    request_timeout_ms: int = pydantic.Field(10_000, gt=0, description="give up on an unreachable broker")

    @property
    def dead_letters(self) -> str:
        return self.dead_letter_topic or f"{self.topic}.dead"


class ExposuresConfig(Section):
    """How impressions are joined with the actions that name them."""

    window_ms: int = pydantic.Field(
        600_000, ge=1, description="how long an exposure waits for labels, by the times of the log's events"
    )
    late_labels: Literal["count", "train"] = pydantic.Field(
        "count", description="what becomes of labels after that: counted, or learned from as events, too"
    )
    max_open: int = pydantic.Field(
        1_000_000, ge=1, description="events of a partition that wait for a window; beyond, it is ended early"
    )


class EventsConfig(Section):
    """The schema of an action event."""

    actions: list[Name] = pydantic.Field(min_length=1, max_length=MAX_ACTIONS)
    context: list[Name] = pydantic.Field([], description="categorical features of the moment")
    item_features: list[Name] = pydantic.Field([], description="categorical features of the item")
    max_future_ms: int = pydantic.Field(
        300_000, ge=0, description="how far an event's time may lie beyond the record's own time"
    )
    unknown_fields: Literal["reject", "ignore"] = "reject"
    exposures: ExposuresConfig | None = pydantic.Field(
        None, description="default: not joined, and `exposure_id` is an unknown field"
    )

    @pydantic.model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        for field in ("actions", "context", "item_features"):
            names = getattr(self, field)
            if len(set(names)) != len(names):
                raise ValueError(f"{field} lists a name twice")
        return self

    @pydantic.model_validator(mode="after")
    def _features_have_keys_of_their_own(self) -> Self:
        columns: dict[int, str] = {}
        for name in self.features:
            other = columns.setdefault(feature_namespace(name), name)
            if other != name:
                raise ValueError(f"{other} and {name} hash alike and would share keys: rename one of them")
        return self

    @property
    def features(self) -> list[str]:
        """The feature columns of an event, in the order in which they are stored."""
        return [f"context.{name}" for name in self.context] + [f"item.{name}" for name in self.item_features]


class HistoriesConfig(Section):
    """What is remembered of each user, per partition of the topic (law 3: the same in every reader)."""

    window: int = pydantic.Field(256, ge=0, description="newest events kept per user")
    chunk: int = pydantic.Field(32, ge=1, description="oldest events dropped at once when the window is full")
    lateness_ms: int = pydantic.Field(600_000, ge=0, description="a late event within this is placed by time")
    duplicate_window: int = pydantic.Field(100_000, ge=0, description="offsets within which an id is unique")
    max_users: int = pydantic.Field(1_000_000, ge=1, description="users kept per partition")
    max_events: int = pydantic.Field(32_000_000, ge=1, description="events kept per partition")

    @pydantic.model_validator(mode="after")
    def _chunk_fits(self) -> Self:
        if self.window and self.chunk > self.window:
            raise ValueError("chunk must not be larger than window")
        return self


class SourceConfig(Section):
    """How the log becomes micro-batches."""

    readers: int = pydantic.Field(1, ge=1, description="read tasks; partitions are dealt out among them")
    reader_cpus: float = pydantic.Field(0.5, gt=0, description="logical CPUs each read task asks Ray for")
    flush_events: int = pydantic.Field(256, ge=1, description="new events that make a micro-batch")
    flush_ms: int = pydantic.Field(500, ge=1, description="and the longest a new event waits for one")
    ahead_bytes: int = pydantic.Field(64 << 20, ge=1 << 20, description="micro-batches readers may be ahead")
    recycle_s: float = pydantic.Field(900, gt=0, description="seconds until a Ray Data execution is renewed")
    on_gap: Literal["fail", "skip"] = pydantic.Field(
        "fail",
        description="where the log lost offsets before they were read: end with their number, or record them "
        "as lost and read on",
    )


class ModelConfig(Section):
    """The encoder and its heads (paper section 3). The defaults are HSTU; the rest are the ablations."""

    layout: Literal["fused", "interleaved"] = pydantic.Field(
        "fused",
        description="one token an event and one a candidate; or, as in the paper, item and action in turn",
    )
    encoder: Literal["hstu", "transformer"] = "hstu"
    attention: Literal["silu", "softmax"] | None = pydantic.Field(
        None, description="default: silu for hstu, softmax for transformer"
    )
    layers: int = pydantic.Field(2, ge=1)
    dim: int = pydantic.Field(64, ge=2, description="width of the residual stream")
    heads: int = pydantic.Field(2, ge=1)
    qk_dim: int | None = pydantic.Field(None, ge=1, description="per head; default dim / heads")
    v_dim: int | None = pydantic.Field(None, ge=1, description="per head; default dim / heads")
    feedforward: int | None = pydantic.Field(None, ge=1, description="transformer only; default 4 · dim")
    position_bias: Literal["bucketed", "exact", "none"] = pydantic.Field(
        "bucketed", description="exact: a weight for each distance below 1,024 tokens"
    )
    time_bias: bool = True
    absolute_positions: int = pydantic.Field(
        0, ge=0, description="learned vectors of absolute position, the last one for all beyond; 0: none"
    )
    popularity_days: list[Annotated[float, pydantic.Field(gt=0)]] = pydantic.Field(
        [],
        description="half-lives, in days of event time, of the counts of an item's events by which retrieval "
        "knows what is popular now; none: it does not",
    )
    dropout: float = pydantic.Field(0.0, ge=0, lt=1, description="of the input and of each layer's output")
    dtype: Literal["float32", "bfloat16"] = "float32"

    @pydantic.model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if (self.qk_dim is None or self.v_dim is None) and self.dim % self.heads:
            raise ValueError("dim must be a multiple of heads unless qk_dim and v_dim are given")
        return self

    @pydantic.model_validator(mode="after")
    def _fields_of_the_encoder(self) -> Self:
        if self.encoder == "hstu" and self.feedforward is not None:
            raise ValueError("feedforward belongs to encoder: transformer")
        if self.encoder == "transformer" and self.attention == "silu":
            raise ValueError("encoder: transformer attends by softmax; silu belongs to encoder: hstu")
        return self

    @property
    def softmax(self) -> bool:
        return (self.attention or ("silu" if self.encoder == "hstu" else "softmax")) == "softmax"


class TrainConfig(Section):
    """Streaming training."""

    workers: int = pydantic.Field(1, ge=1)
    worker_cpus: float = pydantic.Field(1, gt=0, description="logical CPUs each trainer worker asks Ray for")
    gpu: bool = pydantic.Field(False, description="each worker trains on a GPU of its own")
    learning_rate: float = pydantic.Field(5e-4, gt=0, description="AdamW, dense parameters")
    bias_learning_rate: float = pydantic.Field(
        1e-2, gt=0, description="AdamW, tables of relative position and time"
    )
    row_optimizer: Literal["adagrad", "adamw"] = pydantic.Field(
        "adagrad", description="rowwise, of embedding rows; a checkpoint's must stay what it was"
    )
    row_learning_rate: float = pydantic.Field(
        0.05, gt=0, description="of embedding rows; the default suits adagrad, 1e-3 adamw"
    )
    vocabulary_rows: int | None = pydantic.Field(
        None,
        ge=1,
        description="embedding rows, of items and features, over all workers; beyond, a new key takes the "
        "row of the one used least recently. Each worker has an equal share of them for the keys that are "
        "its own. Default: as many as there are keys",
    )
    admit_after: int = pydantic.Field(
        1, ge=1, description="events that must be about a key before it gets a row and is learned"
    )
    admit_candidates: int = pydantic.Field(
        1 << 20,
        ge=1,
        description="keys without a row, over all workers, whose events are counted; beyond, those without "
        "one for longest are forgotten",
    )
    weight_decay: float = pydantic.Field(0.0, ge=0)
    retrieval_weight: float = pydantic.Field(0.02, ge=0, description="retrieval loss beside the ranking loss")
    retrieval_temperature: float = pydantic.Field(
        0.05, gt=0, description="divides the retrieval loss's cosines: with less, one item stands out sooner"
    )
    negatives: int = pydantic.Field(256, ge=1, description="uniform negatives a step beside in-batch ones")
    full_softmax_items: int = pydantic.Field(
        0, ge=0, description="up to so many items all are the negatives of every event"
    )
    action_weights: dict[Name, Annotated[float, pydantic.Field(ge=0)]] = pydantic.Field(
        {}, description="of each action's ranking loss; 1 where not given"
    )
    stochastic_length: float | None = pydantic.Field(
        None, gt=1, le=2, description="the paper's α: long histories are trained on in part; default: whole"
    )
    log_predictions: bool = pydantic.Field(False, description="keep every prediction, for evaluation")
    predictions_kept_s: float = pydantic.Field(
        2_592_000, gt=0, description="and so long: they name users, whom a tombstone does not take out"
    )
    publish_every_s: float = pydantic.Field(5, gt=0)
    checkpoint_every_s: float = pydantic.Field(60, gt=0)
    keep_checkpoints: int = pydantic.Field(3, ge=1)
    max_restarts: int = pydantic.Field(-1, ge=-1, description="of the worker group; -1: no limit")
    base_every: int = pydantic.Field(
        20,
        ge=1,
        description="versions from one that holds all embedding rows to the next; those between hold "
        "what was touched since the one before",
    )
    keep_versions: int = pydantic.Field(5, ge=2, description="newest ones, beside what they build on")
    exchange: bool = pydantic.Field(
        True,
        description="scorers of the same Ray cluster get versions through its object store, which then "
        "holds a base and the deltas since; without, and in other clusters, from storage",
    )
    recent_events: int = pydantic.Field(20_000, ge=1, description="events that the recent figures are over")
    max_entropy_jump: float | None = pydantic.Field(
        0.5,
        gt=0,
        description="while the normalized entropy of the newest tenth of the recent events is so much above "
        "that of the recent ones, weights are neither published nor saved; null: never judged",
    )
    bad_steps: int = pydantic.Field(
        50, ge=1, description="so many in a row send training back to the newest checkpoint"
    )
    max_reverts: int = pydantic.Field(3, ge=0, description="to one checkpoint; beyond, the job ends")
    seed: int = 0


class QualityConfig(Section):
    """How well events are predicted, over sliding windows of event time and by what is known of the user."""

    windows_h: list[Annotated[float, pydantic.Field(gt=0, le=24 * 366)]] = pydantic.Field(
        [1, 24], min_length=1, max_length=8, description="hours that each sliding window is long"
    )
    hit_at: list[Annotated[int, pydantic.Field(ge=1)]] = pydantic.Field(
        [1, 10, 50], max_length=8, description="the k of hit rates: is the item among the k first retrieved"
    )
    history: list[Annotated[int, pydantic.Field(ge=1)]] = pydantic.Field(
        [1, 10, 100],
        max_length=8,
        description="where events are told apart by how many stood before them in the history that they were "
        "predicted from: below the first bound, from there to the next, and so on",
    )
    every_s: float = pydantic.Field(
        30, gt=0, description="seconds between entries of the log of quality; more often while catching up"
    )
    keep_days: float = pydantic.Field(90, gt=0, description="days that the log of quality reaches back")

    @pydantic.model_validator(mode="after")
    def _ascending(self) -> Self:
        for field in ("windows_h", "hit_at", "history"):
            values = getattr(self, field)
            if sorted(set(values)) != values:
                raise ValueError(f"{field} must be ascending, each value once")
        return self


class ServeConfig(Section):
    """The serving application."""

    host: str = "127.0.0.1"
    port: int = pydantic.Field(8000, ge=1, le=65535)
    replicas: int = pydantic.Field(1, ge=1, description="scorer replicas")
    gpu: bool = pydantic.Field(False, description="each scorer replica has a GPU of its own")
    gateways: int = pydantic.Field(2, ge=1, description="gateway replicas: one may die and service goes on")
    history_shards: int = pydantic.Field(1, ge=1, description="partitions are dealt out among them")
    when_histories_are_away: Literal["wait", "cached"] = pydantic.Field(
        "wait",
        description="while a history shard is away or catching up: refuse with a 503 until it is back, or "
        "answer from the last history that the gateway saw of the user, which says that it is stale",
    )
    histories_away_after_ms: int = pydantic.Field(
        200, ge=1, description="with cached: a shard that takes longer is away; waiting for an offset aside"
    )
    cached_histories: int = pydantic.Field(
        10_000, ge=1, description="with cached: users whose last history a gateway replica keeps"
    )
    cached_histories_bytes: int = pydantic.Field(
        64 << 20, ge=0, description="with cached: and what these may take up"
    )
    max_candidates: int = pydantic.Field(10_000, ge=1, description="per rank request")
    max_events: int = pydantic.Field(1_000, ge=1, description="per actions request")
    max_k: int = pydantic.Field(1_000, ge=1, description="items a retrieve request may ask for")
    micro_batch: int | None = pydantic.Field(
        None,
        ge=1,
        description="candidates of a request scored in one step, the paper's b_m; default: as measured",
    )
    step_ms: float = pydantic.Field(
        10,
        gt=0,
        description="how long a step of the engine may encode, and score, before others have their turn",
    )
    index: Literal["exact", "faiss"] = pydantic.Field(
        "exact",
        description="how items are retrieved; faiss: approximately (the extra `ann`), for many millions",
    )
    cache_bytes: int = pydantic.Field(1 << 30, ge=0, description="keys and values kept per scorer replica")
    page_tokens: int = pydantic.Field(32, ge=16, description="tokens of a page of the cache: a power of two")
    page_dtype: Literal["float32", "bfloat16", "int8"] = pydantic.Field(
        "float32", description="of cached keys and values: smaller ones take less room, and round"
    )
    versions: int = pydantic.Field(
        2,
        ge=1,
        description="weights versions held at once: the newest, and older ones that users are still at",
    )
    max_version_age_s: float = pydantic.Field(
        10,
        ge=0,
        description="how long a user whose history is cached may be served by a version that was followed",
    )
    poll_weights_s: float = pydantic.Field(0.5, gt=0)
    queue: int = pydantic.Field(256, ge=1, description="requests a replica holds before it answers 503")
    request_timeout_ms: int = pydantic.Field(5_000, ge=1, description="beyond it a request gets a 503")
    read_your_writes_ms: int = pydantic.Field(
        1_000,
        ge=0,
        description="how long a request that names an offset or a token waits for it to be read before it "
        "gets a 409; request_timeout_ms ends it sooner",
    )
    recommend_weights: dict[Name, Annotated[float, pydantic.Field(allow_inf_nan=False)]] = pydantic.Field(
        {},
        description="recommendations are ordered by the sum of weight · probability over all actions; "
        "1 where not given",
    )
    max_history: int = pydantic.Field(2_000, ge=1, description="events of a history that a request brings")
    max_batch: int = pydantic.Field(64, ge=1, description="requests of a batch")
    max_body_bytes: int = pydantic.Field(2 << 20, ge=1, description="of a request; beyond, it gets a 413")
    body_timeout_ms: int = pydantic.Field(
        10_000, ge=1, description="for a request's body to arrive; beyond, it gets a 408"
    )
    api_keys_file: pathlib.Path | None = pydantic.Field(
        None,
        description="YAML, name: key of 16 characters or more; read once, where the application is built. "
        "The environment's GRSTREAM_API_KEYS (name=key,name=key) takes its place. Default: whoever reaches "
        "the port is answered, which must then be on a loopback address",
    )
    max_in_flight_per_key: int = pydantic.Field(
        256, ge=1, description="requests of one API key in a gateway replica; beyond, a 429"
    )
    exposure_topic: str | None = pydantic.Field(
        None,
        description="a topic to which every listed item goes as an impression, with version, score and rank; "
        "it may be kafka.topic, where all that is listed is shown. Default: not logged",
    )

    def weight(self, action: str) -> float:
        """Of an action's probability in the order of recommendations."""
        return self.recommend_weights.get(action, 1.0)


class ActionRule(Section):
    """Which rows of a data set carry an action: all of them, or those whose column holds what is said."""

    action: Name
    column: str | None = pydantic.Field(None, description="default: every row carries the action")
    at_least: float | None = None
    equals: str | None = pydantic.Field(None, description="the cell as text")

    @pydantic.model_validator(mode="after")
    def _one_condition(self) -> Self:
        conditions = (self.at_least is not None) + (self.equals is not None)
        if conditions != (self.column is not None):
            raise ValueError("a rule has a column and one of at_least and equals, or none of the three")
        return self


class ColumnsConfig(Section):
    """Which columns of a data set say who acted upon what, and when."""

    user: str
    item: str
    time: str
    time_unit: Literal["s", "ms", "iso"] = pydantic.Field("s", description="iso: ISO 8601, UTC if unsaid")
    event_id: str | None = pydantic.Field(None, description="default: file and row, by replay.event_ids")


class RecordColumnsConfig(Section):
    """What a Parquet backfill knows of the records that its events were, or would have been, in the topic."""

    record_time: str | None = pydantic.Field(
        None, description="when the log took it, in ms or a timestamp; default: the event's time"
    )
    partition: str | None = pydantic.Field(None, description="of a dump of the topic itself, with `offset`")
    offset: str | None = pydantic.Field(None, description="of a dump of the topic itself, with `partition`")
    value: str | None = pydantic.Field(
        None, description="of such a dump: the record's bytes, instead of all other columns"
    )
    key: str | None = pydantic.Field(
        None, description="of such a dump: the record's key, by which a tombstone names its user"
    )

    @pydantic.model_validator(mode="after")
    def _a_dump_has_both(self) -> Self:
        if (self.partition is None) != (self.offset is None):
            raise ValueError("partition and offset are given together, or neither")
        if (self.value is not None or self.key is not None) and self.offset is None:
            raise ValueError("value and key belong to a dump of the topic: they need partition and offset")
        return self


class SyntheticConfig(Section):
    """A world of users whose interests drift over clusters of items, to which new items come."""

    users: int = pydantic.Field(500, ge=1, description="Zipf-active")
    items: int = pydantic.Field(2_000, ge=1, description="at the start; Zipf-popular within their cluster")
    clusters: int = pydantic.Field(12, ge=2)
    drift: float = pydantic.Field(0.005, ge=0, le=1, description="chance per event that an interest changes")
    births: float = pydantic.Field(0.01, ge=0, description="new items per event")
    events_per_s: float = pydantic.Field(100, gt=0, description="of the world's own time")
    category: Name | None = pydantic.Field(None, description="the item feature that tells an item's cluster")
    seed: int = 0


class ReplayConfig(Section):
    """How a data set, or the synthetic stream, becomes action events."""

    format: (
        Literal["ml-100k", "ml-1m", "ml-1m-tail", "ml-1m-sequences", "deskdrop", "csv", "parquet"] | None
    ) = pydantic.Field(None, description="default: told by the file's name")
    columns: ColumnsConfig | None = pydantic.Field(None, description="required for csv and parquet")
    records: RecordColumnsConfig = pydantic.Field(
        RecordColumnsConfig(), description="of jobs/backfill.py; a replay sends records of its own"
    )
    actions: list[ActionRule] = []
    context: dict[Name, str] = pydantic.Field({}, description="feature name: column")
    item_features: dict[Name, str] = pydantic.Field({}, description="feature name: column")
    event_ids: bool = pydantic.Field(True, description="an id per row: what is sent again is a duplicate")
    synthetic: SyntheticConfig = SyntheticConfig()


class LogsConfig(Section):
    """What every process of the system writes to its standard error."""

    format: Literal["text", "json"] = pydantic.Field(
        "text", description="json: one object a line; the gateways' access log is that in either case"
    )
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class Config(Section):
    """A whole system."""

    storage: pathlib.Path = pydantic.Field(
        description="directory shared by trainer and servers: checkpoints, snapshots, weights versions, logs"
    )
    forget_within_s: float = pydantic.Field(
        86_400,
        gt=0,
        description="while a trainer runs, no snapshot and no segment of a backfill holds a user for longer "
        "than this after the user's tombstone was read; at least 2 source.recycle_s + "
        "train.checkpoint_every_s + the exposures' window",
    )
    kafka: KafkaConfig = KafkaConfig()
    events: EventsConfig
    histories: HistoriesConfig = HistoriesConfig()
    source: SourceConfig = SourceConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    quality: QualityConfig = QualityConfig()
    serve: ServeConfig = ServeConfig()
    logs: LogsConfig = LogsConfig()
    replay: ReplayConfig = ReplayConfig()

    @pydantic.model_validator(mode="after")
    def _can_forget_in_time(self) -> Self:
        window_s = self.events.exposures.window_ms / 1000 if self.events.exposures else 0
        least_s = 2 * self.source.recycle_s + self.train.checkpoint_every_s + window_s
        if self.forget_within_s < least_s:
            raise ValueError(
                f"forget_within_s must be at least 2 source.recycle_s + train.checkpoint_every_s + "
                f"the exposures' window = {least_s:g}: a snapshot is needed until a checkpoint is "
                "beyond a newer one"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _sections_speak_of_configured_names(self) -> Self:
        known = {
            "actions": (self.events.actions, [rule.action for rule in self.replay.actions]),
            "context": (self.events.context, list(self.replay.context)),
            "item_features": (self.events.item_features, list(self.replay.item_features)),
        }
        for field, (configured, named) in known.items():
            unknown = sorted(set(named) - set(configured))
            if unknown:
                raise ValueError(f"replay.{field} names {', '.join(unknown)}, which events.{field} does not")
        weights = {
            "train.action_weights": self.train.action_weights,
            "serve.recommend_weights": self.serve.recommend_weights,
        }
        for field, by_action in weights.items():
            unknown = sorted(set(by_action) - set(self.events.actions))
            if unknown:
                raise ValueError(f"{field} names {', '.join(unknown)}, which events.actions does not")
        category = self.replay.synthetic.category
        if category is not None and category not in self.events.item_features:
            raise ValueError(
                f"replay.synthetic.category names {category}, which events.item_features does not"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _impressions_can_be_read(self) -> Self:
        if self.serve.exposure_topic == self.kafka.topic and self.events.exposures is None:
            raise ValueError(
                "serve.exposure_topic is the topic of actions, whose readers refuse impressions unless "
                "events.exposures is configured"
            )
        return self


def parse(data: object, origin: str = "config") -> Config:
    """Validate a loaded mapping. Raises ConfigError naming each wrong field by its path."""
    try:
        return Config.model_validate(data)
    except pydantic.ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{origin} is not a valid configuration:\n" + "\n".join(lines)) from error


def load(path: str | os.PathLike[str]) -> Config:
    """Read and validate a YAML file; a relative `storage` is relative to the current directory."""
    try:
        text = pathlib.Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: {error}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    config = parse(data, str(path))
    return config.model_copy(update={"storage": config.storage.absolute()})


API_KEYS_VARIABLE = "GRSTREAM_API_KEYS"
_API_KEYS = pydantic.TypeAdapter(
    Annotated[
        dict[Name, Annotated[pydantic.SecretStr, pydantic.Field(min_length=16)]],
        pydantic.Field(min_length=1),
    ]
)


def api_keys(config: ServeConfig) -> dict[str, pydantic.SecretStr]:
    """The API keys by name, from the environment, else from the configured file; none where neither is there.

    Raises ConfigError, which never quotes a key.
    """
    given = os.environ.get(API_KEYS_VARIABLE)
    if given is not None:
        origin = API_KEYS_VARIABLE
        data: object = dict(pair.strip().partition("=")[::2] for pair in given.split(","))
    elif config.api_keys_file is not None:
        origin = str(config.api_keys_file)
        try:
            data = yaml.safe_load(config.api_keys_file.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read serve.api_keys_file: {error}") from error
        except yaml.YAMLError:
            raise ConfigError(f"{origin} is not YAML") from None  # the error quotes the line
    else:
        return {}
    try:
        keys = _API_KEYS.validate_python(data)
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise ConfigError(f"{origin} is not `name: key` of 16 characters or more: {first['msg']}") from None
    if len({key.get_secret_value() for key in keys.values()}) < len(keys):
        raise ConfigError(f"{origin} gives one key two names")
    return keys


def ha_proxy_enabled() -> bool:
    """Whether Ray Serve is to run HAProxy, which listens on every address of a node."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0").lower() not in ("", "0", "false")
