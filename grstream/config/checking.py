"""What `grstream config check` says of a file: what is wrong, and what is valid but unwise."""

import dataclasses
import ipaddress
import os
import pathlib
from collections.abc import Iterator

import pydantic
import yaml

from grstream.config import environment
from grstream.config.faults import Fault, faults, line_of, written_twice
from grstream.config.loading import read
from grstream.config.run import RunConfig
from grstream.config.security import KafkaSecurityConfig
from grstream.config.system import Config

APPLICATION = "serve.app:build"


@dataclasses.dataclass(frozen=True)
class Checked:
    """A file's kind, what is wrong with it, and what is unwise."""

    kind: str
    wrong: list[Fault]
    unwise: list[Fault]


def check(path: str | os.PathLike[str]) -> Checked:
    """A system's configuration, a run's over epochs or an application's for `serve deploy`.

    Raises Unreadable.
    """
    data, source = read(path)
    if isinstance(data, dict) and "applications" in data:
        return _application(data, source)
    if isinstance(data, dict) and "epochs" in data:
        return _checked("a run over epochs", RunConfig, data, source)
    return _checked("a system", Config, data, source)


def _checked(kind: str, model: type[pydantic.BaseModel], data: object, source: yaml.Node | None) -> Checked:
    unwise = list(written_twice(source))
    try:
        config = model.model_validate(data)
    except pydantic.ValidationError as error:
        return Checked(kind, faults(error, model, source), unwise)
    if isinstance(config, Config):
        unwise += [
            Fault(path, line_of(source, path.split(".")), message) for path, message in _unwise(config)
        ]
    return Checked(kind, [], sorted(unwise, key=lambda fault: fault.line or 0))


def _application(data: dict[object, object], source: yaml.Node | None) -> Checked:
    """The systems that the applications of grstream in a declarative Serve configuration are built from."""
    applications = data["applications"]
    wrong, unwise = [], list(written_twice(source))
    for i, application in enumerate(applications if isinstance(applications, list) else []):
        if not isinstance(application, dict) or application.get("import_path") != APPLICATION:
            continue
        location = ("applications", i, "args", "config")
        named = application.get("args", {}).get("config")
        line = line_of(source, location)
        if isinstance(named, str):
            within = check(named)
        else:
            within = _checked("", Config, named, None)
        prefix = f"{named}: " if isinstance(named, str) else ""
        path = ".".join(map(str, location))
        wrong += [Fault(path, line, f"{prefix}{fault}") for fault in within.wrong]
        unwise += [Fault(path, line, f"{prefix}{fault}") for fault in within.unwise]
    return Checked("an application", wrong, unwise)


def _unwise(config: Config) -> Iterator[tuple[str, str]]:
    if not config.storage.is_absolute():
        yield "storage", "is relative: trainer and servers find it only if both start in the same directory"
    keys = config.serve.api_keys_file or environment.secret(environment.API_KEYS_VARIABLE) is not None
    if not keys and not _loopback(config.serve.host):
        yield (
            "serve.host",
            "is reached from elsewhere and there are no API keys, so the server will not start: give "
            f"serve.api_keys_file or {environment.API_KEYS_VARIABLE}",
        )
    if config.serve.api_keys_file and not config.serve.api_keys_file.exists():
        yield "serve.api_keys_file", "is not there on this machine"
    remote = [at for at in config.kafka.bootstrap_servers if not _loopback(at.rpartition(":")[0] or at)]
    for field, message in _unwise_security(config.kafka.security, bool(remote)):
        yield f"kafka.security.{field}", message


def _unwise_security(security: KafkaSecurityConfig, remote: bool) -> Iterator[tuple[str, str]]:
    if remote and security.protocol == "PLAINTEXT":
        yield "protocol", "is PLAINTEXT: whoever is on the network reads and writes the log"
    if remote and security.protocol == "SASL_PLAINTEXT":
        yield "protocol", "is SASL_PLAINTEXT: what clients prove themselves by is sent unencrypted"
    if not security.check_hostname:
        yield "check_hostname", "is false: any host with a certificate of the authority passes for a broker"
    if security.sasl and security.mechanism != "OAUTHBEARER":
        yield from _without_source("password_file", security.password_file)
    if security.oauth:
        yield from _without_source("oauth.client_secret_file", security.oauth.client_secret_file)
        yield from _absent("oauth.ca_file", security.oauth.ca_file)
    for field in ("ca_file", "cert_file", "key_file", "key_password_file"):
        yield from _absent(field, getattr(security, field))


def _without_source(field: str, path: pathlib.Path | None) -> Iterator[tuple[str, str]]:
    variable = next(v for v, at in environment.SECRETS.items() if at == f"kafka.security.{field}")
    if environment.secret(variable) is not None:
        return
    if path is None:
        yield field, f"is not given, and {variable} is not in this environment: clients cannot connect"
    yield from _absent(field, path)


def _absent(field: str, path: pathlib.Path | None) -> Iterator[tuple[str, str]]:
    if path is not None and not path.exists():
        yield field, "is not there on this machine"


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
