"""From a YAML file to a `Config`, or to an error that names each wrong field."""

import os
import pathlib

import pydantic
import yaml

from grstream.config.section import ConfigError
from grstream.config.system import Config


def parse(data: object, origin: str = "config") -> Config:
    """Validate a loaded mapping. Raises ConfigError naming each wrong field by its path."""
    try:
        return Config.model_validate(data)
    except pydantic.ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{origin} is not a valid configuration:\n" + "\n".join(lines)) from error


def load(path: str | os.PathLike[str]) -> Config:
    """Read and validate a YAML file; `storage` and the files of `kafka.security` are relative to here."""
    try:
        text = pathlib.Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: {error}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    config = parse(data, str(path))
    kafka = config.kafka.model_copy(update={"security": config.kafka.security.absolute()})
    return config.model_copy(update={"storage": config.storage.absolute(), "kafka": kafka})
