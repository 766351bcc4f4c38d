"""Secrets, read where they are needed: from the environment, else from a file that the config names."""

import pathlib
from typing import Annotated

import pydantic
import yaml

from grstream.config import environment
from grstream.config.section import ConfigError, Name
from grstream.config.security import KafkaSecurityConfig, OAuthConfig
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
    given = environment.secret(environment.API_KEYS_VARIABLE)
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


def kafka_password(config: KafkaSecurityConfig) -> pydantic.SecretStr:
    """The password of PLAIN or SCRAM, as it is now. Raises ConfigError, which never quotes it."""
    return _secret(environment.KAFKA_PASSWORD_VARIABLE, config.password_file)


def kafka_oauth_secret(config: OAuthConfig) -> pydantic.SecretStr:
    """The client's secret at the token endpoint, as it is now. Raises ConfigError, which never quotes it."""
    return _secret(environment.KAFKA_OAUTH_SECRET_VARIABLE, config.client_secret_file)


def kafka_key_password(config: KafkaSecurityConfig) -> pydantic.SecretStr | None:
    """The password of the client certificate's key, if it has one. Raises ConfigError."""
    path = config.key_password_file
    return None if path is None else _in_file(path, "kafka.security.key_password_file")


def _secret(variable: str, path: pathlib.Path | None) -> pydantic.SecretStr:
    field = environment.SECRETS[variable]
    given = environment.secret(variable)
    if given is not None:
        if not given:
            raise ConfigError(f"{variable} is empty: unset it or give it the secret")
        return pydantic.SecretStr(given)
    if path is None:
        raise ConfigError(f"set {field}, or {variable} in the environment of the process that connects")
    return _in_file(path, field)


def _in_file(path: pathlib.Path, field: str) -> pydantic.SecretStr:
    try:
        text = path.read_text().rstrip("\r\n")  # which editors put there
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read {field}, {path}: {reason}") from None
    if not text:
        raise ConfigError(f"{field}, {path}, is empty")
    return pydantic.SecretStr(text)
