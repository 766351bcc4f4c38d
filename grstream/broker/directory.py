"""The broker's directory: one process at a time, a folder per topic, a file per partition.

    broker.json   format and cluster id
    lock          held by the process that serves the directory
    offsets.jsonl committed offsets
    topics/NAME/N.log

A topic appears and disappears by a rename, so a kill leaves it whole or absent.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import uuid

from kafka import errors

from grstream.broker import files
from grstream.broker.errors import DirectoryInUse, NotABrokerDirectory, Refused
from grstream.broker.log import PartitionLog
from grstream.broker.offsets import CommittedOffsets

FORMAT = 1
MAX_PARTITIONS = 512  # each is an open file, and a process may often have no more than 1024
_TOPIC_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
_SCRATCH = "~"  # in no topic's name: a topic being created or deleted


class Directory:
    """Opens (or creates) and locks a directory; raises BrokerError saying why it cannot."""

    def __init__(self, path: pathlib.Path) -> None:
        self._topics_path = path / "topics"
        path.mkdir(parents=True, exist_ok=True)
        foreign = [p.name for p in path.iterdir() if p.name not in ("lock", "broker.json~")]
        if foreign and not (path / "broker.json").exists():
            raise NotABrokerDirectory(
                f"{path} holds {sorted(foreign)[0]!r} but no broker.json: give an empty directory"
            )
        self.topics: dict[str, list[PartitionLog]] = {}
        with contextlib.ExitStack() as undo:
            self._lock = _lock(path)
            undo.callback(os.close, self._lock)
            self.cluster_id = _cluster_id(path / "broker.json")
            self._topics_path.mkdir(exist_ok=True)
            for folder in sorted(self._topics_path.iterdir()):
                if folder.name.startswith(_SCRATCH):
                    shutil.rmtree(folder)
                else:
                    self.topics[folder.name] = _open_partitions(folder)
            self.offsets = CommittedOffsets(path / "offsets.jsonl", self.topics)
            undo.pop_all()

    def partition(self, topic: str, index: int) -> PartitionLog:
        """Refused if there is none."""
        partitions = self.topics.get(topic, [])
        if not 0 <= index < len(partitions):
            raise Refused(errors.UnknownTopicOrPartitionError, f"there is no partition {index} of {topic!r}")
        return partitions[index]

    def check_new(self, topic: str, partitions: int) -> None:
        """Refused if such a topic cannot be created."""
        if not _TOPIC_NAME.fullmatch(topic):
            raise Refused(
                errors.InvalidTopicError, f"{topic!r}: a topic's name is 1 to 249 of A-Z a-z 0-9 . _ -"
            )
        if topic in self.topics:
            raise Refused(errors.TopicAlreadyExistsError, f"topic {topic!r} exists")
        self._check_room(partitions)

    def create(self, topic: str, partitions: int) -> None:
        self.check_new(topic, partitions)
        scratch = self._scratch()
        scratch.mkdir()
        for index in range(partitions):
            (scratch / f"{index}.log").touch()
        folder = scratch.rename(self._topics_path / topic)
        self.topics[topic] = _open_partitions(folder)

    def check_more(self, topic: str, partitions: int) -> None:
        """Refused if the topic cannot have so many partitions from now on."""
        self.partition(topic, 0)  # refuses an unknown topic
        held = len(self.topics[topic])
        if partitions <= held:
            raise Refused(
                errors.InvalidPartitionsError, f"topic {topic!r} has {held} partitions, and can only get more"
            )
        self._check_room(partitions - held)

    def extend(self, topic: str, partitions: int) -> None:
        """Add partitions, one by one: a kill leaves those that were added."""
        self.check_more(topic, partitions)
        held = self.topics[topic]
        while len(held) < partitions:
            file = self._topics_path / topic / f"{len(held)}.log"
            file.touch()
            held.append(PartitionLog(file))

    def delete(self, topic: str) -> None:
        if topic not in self.topics:
            raise Refused(errors.UnknownTopicOrPartitionError, f"there is no topic {topic!r}")
        gone = (self._topics_path / topic).rename(self._scratch())
        for partition in self.topics.pop(topic):
            partition.close()
        self.offsets.forget_topic(topic)
        shutil.rmtree(gone)

    def close(self) -> None:
        for partitions in self.topics.values():
            for partition in partitions:
                partition.close()
        self.offsets.close()
        os.close(self._lock)

    def _check_room(self, partitions: int) -> None:
        held = sum(map(len, self.topics.values()))
        if not 1 <= partitions <= MAX_PARTITIONS - held:
            raise Refused(
                errors.InvalidPartitionsError,
                f"{partitions} partitions; this broker holds 1 to {MAX_PARTITIONS} in all, {held} now",
            )

    def _scratch(self) -> pathlib.Path:
        return self._topics_path / f"{_SCRATCH}{uuid.uuid4().hex}"


def _lock(path: pathlib.Path) -> int:
    """The kernel releases the lock with the process, however it ends."""
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 20).decode() or "unknown"
        os.close(lock)
        raise DirectoryInUse(
            f"{path} is served by another broker (pid {holder}): stop that one or give another directory"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def _cluster_id(path: pathlib.Path) -> str:
    if not path.exists():
        files.replace(path, json.dumps({"format": FORMAT, "cluster_id": uuid.uuid4().hex[:22]}))
    try:
        meta = json.loads(path.read_text())
        version, cluster_id = meta["format"], meta["cluster_id"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotABrokerDirectory(f"{path} is not a broker's description: {error!r}") from error
    if version != FORMAT:
        raise NotABrokerDirectory(f"{path} is of format {version}; this version reads format {FORMAT}")
    return str(cluster_id)


def _open_partitions(folder: pathlib.Path) -> list[PartitionLog]:
    return [PartitionLog(folder / f"{index}.log") for index in range(len(list(folder.glob("*.log"))))]
