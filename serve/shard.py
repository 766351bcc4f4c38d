"""The history shard deployment: histories of its partitions, live from the log."""

from grstream import telemetry
from grstream.config import Config
from grstream.exporter import Exporter
from grstream.schema import Schema
from grstream.tail import HistoryTail, TailStatus
from grstream.telemetry import Part
from serve.errors import require_schema
from serve.gateway import UserHistory


class HistoryShard:
    """The one replica of shard `index`: partitions p with p % history_shards == index.

    A shard is a deployment of its own, so that Serve starts it again when it dies; it then reads its
    histories anew and refuses requests until it has caught up.
    """

    def __init__(self, config: Config, index: int) -> None:
        self._schema = Schema.of(config.events)
        self._index = index
        self._exporter = Exporter()
        self._exporter.begin(Part.SHARD)
        self._tail = HistoryTail(
            config,
            index,
            config.serve.history_shards,
            lambda seconds: self._exporter.observe(telemetry.HISTORY_VISIBLE, seconds),
        )
        self._tail.start()

    async def history(
        self, schema: Schema, user: int, partition: int, min_offset: int | None = None, wait_s: float = 0
    ) -> UserHistory:
        """Raises TailNotReady until the shard has caught up, and OtherSchema for a caller of another one.

        With `min_offset` the history includes the record at that offset, which is waited for up to `wait_s`;
        else TailBehind.
        """
        require_schema(self._schema, schema)
        history, position = await self._tail.history_soon(user, partition, min_offset, wait_s)
        return UserHistory(history, partition, position)

    async def status(self) -> TailStatus:
        return self._tail.status()

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises. It asks every few seconds: metrics go out then."""
        _export(self._exporter, self._index, self._tail.status())
        if not self._tail.is_alive():
            raise RuntimeError("the thread that follows the log has ended")


def _export(exporter: Exporter, shard: int, status: TailStatus) -> None:
    """What a shard tells of its partitions; what it is not connected to is as of when it was."""
    exporter.set_all(telemetry.HISTORY_LAG, {(p,): lag for p, lag in status.lags.items()})
    exporter.set_all(telemetry.HISTORY_AGE, {(p,): ms / 1000 for p, ms in status.ages_ms.items()})
    exporter.set(telemetry.HISTORY_CONNECTED, int(status.connected), shard=shard)
    exporter.set(telemetry.HISTORY_CAUGHT_UP, int(status.caught_up), shard=shard)
    exporter.count_to(telemetry.HISTORY_LOST, status.gaps)
    exporter.count_to(telemetry.HISTORY_REJECTED, status.rejected)
