"""The history shard deployment: histories of its partitions, live from the log."""

from grstream.config import Config
from grstream.schema import Schema
from grstream.tail import HistoryTail, TailStatus
from serve.errors import require_schema
from serve.gateway import UserHistory


class HistoryShard:
    """The one replica of shard `index`: partitions p with p % history_shards == index.

    A shard is a deployment of its own, so that Serve starts it again when it dies; it then reads its
    histories anew and refuses requests until it has caught up.
    """

    def __init__(self, config: Config, index: int) -> None:
        self._schema = Schema.of(config.events)
        self._tail = HistoryTail(config, index, config.serve.history_shards)
        self._tail.start()

    async def history(self, schema: Schema, user: int, partition: int) -> UserHistory:
        """Raises TailNotReady until the shard has caught up, and OtherSchema for a caller of another one."""
        require_schema(self._schema, schema)
        history, position = self._tail.history(user, partition)
        return UserHistory(history, partition, position)

    async def status(self) -> TailStatus:
        return self._tail.status()

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if not self._tail.is_alive():
            raise RuntimeError("the thread that follows the log has ended")
