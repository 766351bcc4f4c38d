"""The Serve application: `serve run serve.app:build config=CONFIG.yaml`, or the same in a declarative config.

clients ─► gateways ─► history-0 … history-n     histories, live from the log
                  └──► scorers                   by consistent hash of the user
"""

import importlib.util
import ipaddress
import os
import pathlib
from typing import Any

import fastapi
import pydantic
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

import grstream
from grstream import config as configuration
from grstream import logs
from grstream.config import Config, ConfigError
from serve.backend import RayBackend
from serve.errors import RETRY_AFTER_S
from serve.exposure_log import ExposureLog
from serve.gateway import create_app
from serve.instruments import Instruments
from serve.middleware import Keyring, log_access
from serve.scorer import Scorer
from serve.shard import HistoryShard

# Logical CPUs, which Ray counts but does not enforce: with these an application of one scorer and one shard
# fits beside a trainer on two cores. Below 1, Ray also keeps torch to one thread a process.
GATEWAY_CPUS, SHARD_CPUS, SCORER_CPUS = 0.1, 0.1, 0.3
# Serve lets 5 requests into a replica by default; a gateway only waits, and a scorer keeps its own line.
GATEWAY_REQUESTS = 1000
# glibc gives large blocks back to the kernel at each free, and a loop over products takes twice as long.
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"}
HEADROOM = 2  # requests over the scorer's queue that reach it, to be told that it is full
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2, 10  # Serve's 10 and 30 leave a hung replica in service for long


class WrongPackage(ImportError):
    """Another distribution's package of the same name comes first on the path."""


class Arguments(pydantic.BaseModel):
    """What `serve run serve.app:build` takes."""

    model_config = pydantic.ConfigDict(extra="forbid")

    config: str | dict[str, Any] = pydantic.Field(description="path of the YAML file, or its content")


def build(arguments: Arguments) -> Application:
    """The application of a configuration.

    Raises ConfigError, also where other machines could reach it without an API key, and WrongPackage for a
    name clash.
    """
    for name in ("serve", "kernels"):
        require_own(name)
    if isinstance(arguments.config, str):
        config = configuration.load(arguments.config)
    else:
        config = configuration.parse(arguments.config)
    keys = Keyring(configuration.api_keys(config.serve))
    if not keys:
        _require_loopback(config)
    return application(config.model_copy(update={"storage": config.storage.absolute()}), keys)


def application(config: Config, keys: Keyring) -> Application:
    """The deployments of a configuration, bound together."""
    options = {
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": config.serve.request_timeout_ms / 1000,
        # Of what Serve says of a replica; what the project says is configured by each replica itself. A line
        # for each call of a replica is more than the log of requests, which is ours, needs.
        "logging_config": LoggingConfig(
            encoding=config.logs.format.upper(), log_level=config.logs.level, enable_access_log=False
        ),
    }
    shards = [
        serve.deployment(HistoryShardReplica)
        .options(
            name=f"history-{index}",
            num_replicas=1,
            ray_actor_options={"num_cpus": SHARD_CPUS},
            max_ongoing_requests=GATEWAY_REQUESTS,
            max_queued_requests=config.serve.queue,
            **options,
        )
        .bind(config, index)
        for index in range(config.serve.history_shards)
    ]
    scorers = (
        serve.deployment(ScorerReplica)
        .options(
            name="scorer",
            num_replicas=config.serve.replicas,
            ray_actor_options={
                "num_cpus": SCORER_CPUS,
                "num_gpus": int(config.serve.gpu),
                "runtime_env": {"env_vars": ALLOCATOR},
            },
            max_ongoing_requests=config.serve.queue + HEADROOM,
            max_queued_requests=config.serve.queue,
            request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
            **options,
        )
        .bind(config)
    )
    return (
        serve.deployment(Gateway)
        .options(
            name="gateway",
            num_replicas=config.serve.gateways,
            ray_actor_options={"num_cpus": GATEWAY_CPUS},
            max_ongoing_requests=GATEWAY_REQUESTS,
            max_queued_requests=GATEWAY_REQUESTS,
            backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
            **options,
        )
        .bind(config, keys, scorers, shards)
    )


class ScorerReplica(Scorer):
    """A scorer in a process of its own."""

    def __init__(self, config: Config) -> None:
        logs.configure(config.logs)
        super().__init__(config)


class HistoryShardReplica(HistoryShard):
    """A history shard in a process of its own."""

    def __init__(self, config: Config, index: int) -> None:
        logs.configure(config.logs)
        super().__init__(config, index)


@serve.ingress()
class Gateway:
    """The ingress deployment: `serve.gateway` over Ray."""

    def __init__(
        self, config: Config, keys: Keyring, scorers: DeploymentHandle, shards: list[DeploymentHandle]
    ) -> None:
        logs.configure(config.logs)
        log_access()
        self._config, self._keys = config, keys
        self._instruments = Instruments()
        self._exposures = ExposureLog(config) if config.serve.exposure_topic else None
        self._backend = RayBackend(config, _pickling(scorers), [_pickling(shard) for shard in shards])
        self._ranking: Any = None

    def __serve_build_asgi_app__(self) -> fastapi.FastAPI:
        exposures = self._exposures.add if self._exposures else None
        return create_app(self._config, self._backend, self._keys, exposures, self._instruments)

    async def check_health(self) -> None:
        """Serve asks every few seconds: what is not counted request by request goes out then."""
        if self._exposures is not None:
            self._instruments.exposures_dropped(self._exposures.dropped)

    async def Rank(self, asked: Any, grpc_context: Any) -> Any:
        """`Rank` of serve/rank.proto, where the cluster's Serve has `serve.rpc:add_ranking`."""
        if self._ranking is None:
            from serve.rpc import Ranking  # protobuf's newer versions are needed for it alone

            listed = self._exposures.add if self._exposures else None
            told = (self._keys, listed, self._instruments)
            self._ranking = Ranking(self._config, self._backend, *told)
        return await self._ranking.rank(asked, grpc_context)

    def __del__(self) -> None:
        """Serve calls this when it stops a replica."""
        if self._exposures is not None:
            self._exposures.close(self._config.serve.request_timeout_ms / 1000)


def _pickling(handle: DeploymentHandle) -> DeploymentHandle:
    """A handle whose calls travel by pickle where they go by gRPC: Serve's cloudpickle takes longer."""
    return handle.options(request_serialization="pickle", response_serialization="pickle")


def _require_loopback(config: Config) -> None:
    """Raise ConfigError where a port of the application could be reached from another machine."""
    host = config.serve.host
    keys = (
        f"set serve.api_keys_file, or {configuration.API_KEYS_VARIABLE} in the environment, to keys that "
        "clients then send"
    )
    if configuration.ha_proxy_enabled():
        raise ConfigError(f"HAProxy listens on every address of a node (RAY_SERVE_ENABLE_HA_PROXY): {keys}")
    if not _is_loopback(host):
        raise ConfigError(f"serve.host {host} can be reached from other machines: {keys}, or use 127.0.0.1")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_own(name: str) -> None:
    """Raise WrongPackage unless package `name` is the one beside grstream."""
    home = pathlib.Path(str(grstream.__file__)).parent.parent
    spec = importlib.util.find_spec(name)
    found = None if spec is None or spec.origin is None else pathlib.Path(spec.origin)
    if found is None or os.path.realpath(found.parent.parent) != os.path.realpath(home):
        raise WrongPackage(
            f"`import {name}` finds {found}, which is not grstream's {home / name}: another distribution has "
            f"that name; put grstream first on PYTHONPATH or uninstall the other"
        )
