"""Directories that appear whole or not at all: written beside, synced, and renamed into place."""

import contextlib
import errno
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Iterator

SCRATCH = ".scratch-"
STALE_S = 3600.0  # a scratch directory untouched for longer has lost its writer


class DirectoryExists(FileExistsError):
    """Another writer put a directory of that name in place first."""


@contextlib.contextmanager
def appearing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A scratch directory that becomes `target`, durably, when the block ends without an exception.

    Raises DirectoryExists where `target` already exists: a directory is never replaced.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = parent / f"{SCRATCH}{target.name}-{secrets.token_hex(8)}"
    scratch.mkdir()
    try:
        yield scratch
        for path in scratch.iterdir():
            sync(path)
        sync(scratch)
        try:
            os.rename(scratch, target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise DirectoryExists(f"{target} already exists") from error
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync(parent)


def disappear(target: pathlib.Path) -> None:
    """Delete a directory so that a reader finds all of it or none: renamed away first."""
    scratch = target.parent / f"{SCRATCH}{target.name}-{secrets.token_hex(8)}"
    os.rename(target, scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def sweep(parent: pathlib.Path) -> None:
    """Delete what dead writers left behind."""
    for left in parent.glob(f"{SCRATCH}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left, ignore_errors=True)


def sync(path: pathlib.Path) -> None:
    """Make a file's bytes, or a directory's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
