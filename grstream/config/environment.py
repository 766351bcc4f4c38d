"""The environment variables that the project reads; nothing else reads any."""

import os

API_KEYS_VARIABLE = "GRSTREAM_API_KEYS"
KAFKA_PASSWORD_VARIABLE = "GRSTREAM_KAFKA_PASSWORD"
KAFKA_OAUTH_SECRET_VARIABLE = "GRSTREAM_KAFKA_OAUTH_SECRET"

# Each secret that the environment may give, and the field whose file it takes the place of.
SECRETS = {
    API_KEYS_VARIABLE: "serve.api_keys_file",
    KAFKA_PASSWORD_VARIABLE: "kafka.security.password_file",
    KAFKA_OAUTH_SECRET_VARIABLE: "kafka.security.oauth.client_secret_file",
}


def secret(variable: str) -> str | None:
    """One of SECRETS, where the environment gives it."""
    return os.environ.get(variable)


def ha_proxy_enabled() -> bool:
    """Whether Ray Serve is to run HAProxy, which listens on every address of a node."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0").lower() not in ("", "0", "false")
