"""Secrets, read where they are needed: from the environment, else from a file that the config names."""

from typing import Annotated

import pydantic
import yaml

from grstream.config import environment
from grstream.config.section import ConfigError, Name
from grstream.config.serve import ServeConfig

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
    given = environment.api_keys_variable()
    if given is not None:
        origin = environment.API_KEYS_VARIABLE
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
