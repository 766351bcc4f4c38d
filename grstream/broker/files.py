"""Writing so that a kill leaves the old content or the new one, and a full disk an error."""

import logging
import os
import pathlib

from kafka import errors

from grstream.broker.errors import Refused

log = logging.getLogger(__name__)


def append(file: int, size: int, data: bytes) -> None:
    """Write behind a file's first `size` bytes, all or nothing; Refused where the disk does not take it."""
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(file, memoryview(data)[written:], size + written)
    except OSError as error:
        os.ftruncate(file, size)
        log.error("a write of %d bytes failed: %s", len(data), error)
        raise Refused(errors.KafkaStorageError, str(error)) from error


def replace(path: pathlib.Path, text: str) -> None:
    """Give a small file this content at once."""
    scratch = path.with_name(path.name + "~")
    scratch.write_text(text)
    scratch.replace(path)
