"""The environment variables that the project reads; nothing else reads any."""

import os

API_KEYS_VARIABLE = "GRSTREAM_API_KEYS"


def api_keys_variable() -> str | None:
    """The API keys as `name=key,name=key`, where the environment gives any."""
    return os.environ.get(API_KEYS_VARIABLE)


def ha_proxy_enabled() -> bool:
    """Whether Ray Serve is to run HAProxy, which listens on every address of a node."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0").lower() not in ("", "0", "false")
