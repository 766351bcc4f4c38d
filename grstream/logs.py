"""How processes log: text for a person, or one JSON object a line for a machine.

A JSON line has `time` (UTC), `level`, `logger` and `message`, the `request_id` of the request that was being
answered, what a line says of its subject (`version`, `step`, `partition`, `offset` …), and `exception`.
"""

import contextlib
import contextvars
import datetime
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

from grstream.config import LogsConfig

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_request: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)


class JsonFormatter(logging.Formatter):
    """A record as one line; what `extra=` named stands in it as it was given."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = _request.get()
        if request_id is not None:
            line["request_id"] = request_id
        # Ray adds attributes of its own, which begin with an underscore.
        line |= {k: v for k, v in vars(record).items() if k not in _STANDARD and not k.startswith("_")}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@contextlib.contextmanager
def request(request_id: str) -> Iterator[None]:
    """Lines of this task, and of those that it starts, are of a request."""
    token = _request.set(request_id)
    try:
        yield
    finally:
        _request.reset(token)


def to_standard_error() -> logging.StreamHandler[Any]:
    """A handler to the process's own standard error.

    Serve puts another in its place, which logs each line under a prefix after looking through the stack.
    """
    return logging.StreamHandler(sys.__stderr__)


def configure(config: LogsConfig) -> None:
    """Have this process, which must be the project's own, log to its standard error."""
    handler = to_standard_error()
    handler.setFormatter(JsonFormatter() if config.format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=config.level, handlers=[handler], force=True)
    logging.getLogger("kafka").setLevel(logging.WARNING)  # it tells of every connection
