"""The offsets that consumer groups have committed: JSON lines, the last of a partition counts."""

import json
import os
import pathlib
from collections.abc import Container, Mapping
from typing import NamedTuple

from grstream.broker import files
from grstream.broker.errors import CorruptLog


class Committed(NamedTuple):
    offset: int
    metadata: str | None


Partition = tuple[str, int]  # topic and index


class CommittedOffsets:
    """Written before acknowledged, like the logs; the file is rewritten without the past at each start.

    What was committed for a topic that is gone is no longer there.
    """

    def __init__(self, path: pathlib.Path, topics: Container[str]) -> None:
        self._groups: dict[str, dict[Partition, Committed]] = {}
        if path.exists():
            self._load(path, topics)
        lines = [_line(g, p, c) for g, held in self._groups.items() for p, c in held.items()]
        files.replace(path, "".join(lines))
        self._file = os.open(path, os.O_WRONLY)
        self._size = path.stat().st_size

    def commit(self, group: str, offsets: Mapping[Partition, Committed]) -> None:
        """Refused where the disk does not take it."""
        self._append([_line(group, p, c) for p, c in offsets.items()])
        self._groups.setdefault(group, {}).update(offsets)

    def of(self, group: str) -> Mapping[Partition, Committed]:
        return self._groups.get(group, {})

    def groups(self) -> list[str]:
        return list(self._groups)

    def forget_topic(self, topic: str) -> None:
        """A topic was deleted: what was committed for it must not be found by another of its name."""
        gone = [(g, p) for g, held in self._groups.items() for p in held if p[0] == topic]
        self._append([_line(g, p, None) for g, p in gone])
        for group, partition in gone:
            del self._groups[group][partition]

    def close(self) -> None:
        os.close(self._file)

    def _append(self, lines: list[str]) -> None:
        data = "".join(lines).encode()
        files.append(self._file, self._size, data)
        self._size += len(data)

    def _load(self, path: pathlib.Path, topics: Container[str]) -> None:
        *lines, _torn = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                group, topic, index, offset, metadata = json.loads(line)
            except (ValueError, TypeError) as error:
                raise CorruptLog(f"{path}, line {number}, is not a committed offset: {error}") from error
            held = self._groups.setdefault(group, {})
            if offset is None or topic not in topics:
                held.pop((topic, index), None)
            else:
                held[topic, index] = Committed(offset, metadata)


def _line(group: str, partition: Partition, committed: Committed | None) -> str:
    return json.dumps([group, *partition, *(committed or (None, None))]) + "\n"
