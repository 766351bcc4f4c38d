"""From a YAML file to a `Config`, or to an error that names each wrong field, its line and what it may be."""

import os
import pathlib
from typing import TypeVar

import pydantic
import yaml

from grstream.config.faults import faults
from grstream.config.run import RunConfig
from grstream.config.section import ConfigError
from grstream.config.system import Config

M = TypeVar("M", bound=pydantic.BaseModel)


class Unreadable(ConfigError):
    """There is no such file, or it is not YAML."""


def parse(data: object, origin: str = "config") -> Config:
    """Validate a loaded mapping. Raises ConfigError naming each wrong field by its path."""
    return _validated(Config, data, origin, None)


def load(path: str | os.PathLike[str]) -> Config:
    """Read and validate a YAML file; `storage` and the files of `kafka.security` are relative to here."""
    data, source = read(path)
    config = _validated(Config, data, str(path), source)
    kafka = config.kafka.model_copy(update={"security": config.kafka.security.absolute()})
    return config.model_copy(update={"storage": config.storage.absolute(), "kafka": kafka})


def load_run(path: str | os.PathLike[str]) -> RunConfig:
    """Read and validate the YAML file of a run over epochs. Raises ConfigError as `load` does."""
    data, source = read(path)
    return _validated(RunConfig, data, str(path), source)


def read(path: str | os.PathLike[str]) -> tuple[object, yaml.Node | None]:
    """What a YAML file holds, and the same with its lines. Raises Unreadable."""
    try:
        text = pathlib.Path(path).read_text()
        return yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise Unreadable(f"cannot read the configuration: {error}") from error
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise Unreadable(f"{path} is not YAML: {error}") from error


def _validated(model: type[M], data: object, origin: str, source: yaml.Node | None) -> M:
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        lines = [f"  {fault}" for fault in faults(error, model, source)]
        raise ConfigError(f"{origin} is not a valid configuration:\n" + "\n".join(lines)) from error
