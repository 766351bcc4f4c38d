"""The one configuration of a grstream system: a YAML file, validated here and trusted everywhere else.

Every field states its unit and default. An unknown field is an error that names its path. `environment` is
the only module of the project that reads environment variables.
"""

from grstream.config.environment import (
    API_KEYS_VARIABLE,
    KAFKA_OAUTH_SECRET_VARIABLE,
    KAFKA_PASSWORD_VARIABLE,
    ha_proxy_enabled,
)
from grstream.config.events import EventsConfig, ExposuresConfig
from grstream.config.histories import HistoriesConfig
from grstream.config.kafka import KafkaConfig
from grstream.config.loading import Unreadable, load, load_run, parse
from grstream.config.logs import LogsConfig
from grstream.config.model import ModelConfig
from grstream.config.quality import QualityConfig
from grstream.config.replay import (
    ActionRule,
    ColumnsConfig,
    RecordColumnsConfig,
    ReplayConfig,
    SyntheticConfig,
)
from grstream.config.run import EpochsConfig, RunConfig
from grstream.config.secrets import api_keys, kafka_key_password, kafka_oauth_secret, kafka_password
from grstream.config.section import ACTION_NAME, MAX_ACTIONS, ConfigError, Name, Section
from grstream.config.security import KafkaSecurityConfig, OAuthConfig
from grstream.config.serve import ServeConfig
from grstream.config.source import SourceConfig
from grstream.config.system import Config
from grstream.config.train import TrainConfig

__all__ = [
    "ACTION_NAME",
    "API_KEYS_VARIABLE",
    "KAFKA_OAUTH_SECRET_VARIABLE",
    "KAFKA_PASSWORD_VARIABLE",
    "MAX_ACTIONS",
    "ActionRule",
    "ColumnsConfig",
    "Config",
    "ConfigError",
    "EpochsConfig",
    "EventsConfig",
    "ExposuresConfig",
    "HistoriesConfig",
    "KafkaConfig",
    "KafkaSecurityConfig",
    "LogsConfig",
    "ModelConfig",
    "Name",
    "OAuthConfig",
    "QualityConfig",
    "RecordColumnsConfig",
    "ReplayConfig",
    "RunConfig",
    "Section",
    "ServeConfig",
    "SourceConfig",
    "SyntheticConfig",
    "TrainConfig",
    "Unreadable",
    "api_keys",
    "ha_proxy_enabled",
    "kafka_key_password",
    "kafka_oauth_secret",
    "kafka_password",
    "load",
    "load_run",
    "parse",
]
