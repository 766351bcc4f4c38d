"""A whole system: all sections, and what holds between them."""

import pathlib
from typing import Self

import pydantic

from grstream.config.events import EventsConfig
from grstream.config.histories import HistoriesConfig
from grstream.config.kafka import KafkaConfig
from grstream.config.logs import LogsConfig
from grstream.config.model import ModelConfig
from grstream.config.quality import QualityConfig
from grstream.config.replay import ReplayConfig
from grstream.config.section import Section
from grstream.config.serve import ServeConfig
from grstream.config.source import SourceConfig
from grstream.config.train import TrainConfig


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
    kafka: KafkaConfig = pydantic.Field(KafkaConfig(), description="where the log is")
    events: EventsConfig = pydantic.Field(description="what an event has")
    histories: HistoriesConfig = pydantic.Field(HistoriesConfig(), description="what is kept of each user")
    source: SourceConfig = pydantic.Field(SourceConfig(), description="from the log to micro-batches")
    model: ModelConfig = pydantic.Field(ModelConfig(), description="the encoder")
    train: TrainConfig = pydantic.Field(TrainConfig(), description="the trainer")
    quality: QualityConfig = pydantic.Field(QualityConfig(), description="figures of quality")
    serve: ServeConfig = pydantic.Field(ServeConfig(), description="the server")
    logs: LogsConfig = pydantic.Field(LogsConfig(), description="what processes write")
    replay: ReplayConfig = pydantic.Field(ReplayConfig(), description="data sets and the synthetic stream")

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
