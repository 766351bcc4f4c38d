"""What the broker refuses: at start (`BrokerError`) and to a client (`Refused`)."""

from kafka.errors import BrokerResponseError


class BrokerError(RuntimeError):
    """The broker cannot start."""


class DirectoryInUse(BrokerError):
    """Another process serves this directory."""


class NotABrokerDirectory(BrokerError):
    """The directory holds something else, or another version's format."""


class CorruptLog(BrokerError):
    """A file holds damage that a killed process cannot have left; nothing was changed."""


class NotLoopback(BrokerError):
    """The broker has no authentication, so it listens on loopback addresses alone."""


class Refused(Exception):
    """A request, or one partition of it, is answered with this Kafka error."""

    def __init__(self, error: type[BrokerResponseError], reason: str) -> None:
        super().__init__(reason)
        self.code: int = error.errno
        self.reason = reason


class ProtocolViolation(Exception):
    """A client sent what cannot be answered; its connection is closed with a line in the log."""
