"""The broker's socket: frames in, answers out, in order on each connection."""

import asyncio
import ipaddress
import logging
import os
import pathlib
import socket
import struct
from typing import Self

from kafka import errors
from kafka.protocol.metadata import ApiVersionsRequest, ApiVersionsResponse

from grstream.broker.directory import Directory
from grstream.broker.errors import BrokerError, NotLoopback, ProtocolViolation
from grstream.broker.groups import Caller, Groups
from grstream.broker.groups_api import GroupsApi
from grstream.broker.records_api import RecordsApi
from grstream.broker.served import Message
from grstream.broker.topics_api import TopicsApi

log = logging.getLogger(__name__)

DEFAULT_PORT = 9092
DEFAULT_PARTITIONS = 4
MAX_REQUEST_BYTES = 100 << 20  # Kafka's socket.request.max.bytes
READ_AHEAD_BYTES = 2 << 20  # a full produce request arrives in one piece
NEWEST_API_VERSIONS = 3
TICK_S = 0.05  # how late a silent group member may be noticed
_HEADER = struct.Struct(">hhih")  # api, version, correlation id, length of the client id


class Broker:
    """A broker that listens from construction and answers while `serve_forever` runs.

    `port` 0 takes a free one; `port` says which. Raises BrokerError where the directory is in use, damaged or
    something else's, and where the address is not a loopback one or is taken. `stop` may be called from any
    thread and from a signal handler. As a context manager it closes what it holds.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        port: int = DEFAULT_PORT,
        host: str = "127.0.0.1",
        partitions: int = DEFAULT_PARTITIONS,
    ) -> None:
        self._socket = _listen(host, port)
        self.host, self.port = self._socket.getsockname()[:2]
        try:
            self._directory = Directory(pathlib.Path(directory))
        except BrokerError:
            self._socket.close()
            raise
        self._groups = Groups()
        records = RecordsApi(self._directory)
        topics = TopicsApi(self._directory, self.host, self.port, partitions)
        groups = GroupsApi(self._directory, self._groups, self.host, self.port)
        self._apis = {api.key: api for api in [*records.apis(), *topics.apis(), *groups.apis()]}
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._stopping = asyncio.Event()

    @property
    def bootstrap(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def serve_forever(self) -> None:
        """Answer clients until `stop`, then close."""
        try:
            self._runner.run(self._serve())
        finally:
            self.close()

    def stop(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stopping.set)

    def close(self) -> None:
        """Release socket, directory and files; only while nothing is being served."""
        if not self._loop.is_closed():
            self._runner.close()  # cancels the conversations
            self._socket.close()
            self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._converse, sock=self._socket, limit=READ_AHEAD_BYTES)
        while not self._stopping.is_set():
            self._groups.tick()
            try:
                await asyncio.wait_for(self._stopping.wait(), TICK_S)
            except TimeoutError:
                continue
        server.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until the client goes, breaks the protocol, or the broker stops."""
        host, port = writer.get_extra_info("peername")[:2]
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big", signed=True)
                if not _HEADER.size <= size <= MAX_REQUEST_BYTES:
                    raise ProtocolViolation(
                        f"a request of {size} bytes; {_HEADER.size} to {MAX_REQUEST_BYTES} are taken"
                    )
                answer = await self._answer(await reader.readexactly(size), host)
                if answer is not None:
                    writer.write(answer)
                    await writer.drain()
        except ProtocolViolation as violation:
            log.warning("closing the connection of %s:%d: %s", host, port, violation)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client is gone
        except asyncio.CancelledError:
            writer.transport.abort()  # the broker is stopping and waits for no slow reader
        finally:
            writer.close()

    async def _answer(self, frame: bytes, host: str) -> bytes | None:
        key, version, correlation, name_length = _HEADER.unpack_from(frame)
        body = _HEADER.size + max(name_length, 0)
        if key == ApiVersionsRequest.API_KEY:
            # Its body says nothing that is needed, and a version from the future must be answered in v0 form.
            if version > NEWEST_API_VERSIONS:
                return _encode(self._offered(errors.UnsupportedVersionError.errno), 0, correlation)
            return _encode(self._offered(0), version, correlation)
        api = self._apis.get(key)
        if api is None:
            raise ProtocolViolation(f"API {key} version {version} is not offered")
        if not api.oldest <= version <= api.newest:
            raise ProtocolViolation(
                f"{api.request.__name__} version {version}; {api.oldest} to {api.newest} are answered"
            )
        try:
            request: Message = api.request.decode(memoryview(frame)[body:], version=version)  # type: ignore[attr-defined]
        except (struct.error, ValueError, IndexError) as error:
            raise ProtocolViolation(
                f"{api.request.__name__} version {version} does not parse: {error}"
            ) from error
        caller = Caller(frame[_HEADER.size : body].decode(errors="replace"), host)
        response = await api.handler(request, caller)
        return None if response is None else _encode(response, version, correlation)

    def _offered(self, error_code: int) -> Message:
        ranges = [(api.key, api.claimed_oldest, api.oldest, api.newest) for api in self._apis.values()]
        ranges.append((ApiVersionsRequest.API_KEY, None, 0, NEWEST_API_VERSIONS))
        return ApiVersionsResponse(
            error_code=error_code,
            api_keys=[
                ApiVersionsResponse.ApiVersion(
                    api_key=key, min_version=oldest if claimed is None else claimed, max_version=newest
                )
                for key, claimed, oldest, newest in ranges
            ],
        )


def _encode(response: Message, version: int, correlation: int) -> bytes:
    response.API_VERSION = version
    response.with_header(correlation)
    encoded: bytes = response.encode(header=True, framed=True)
    return encoded


def _listen(host: str, port: int) -> socket.socket:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise NotLoopback(f"{host!r} is no IP address: give a loopback one, such as 127.0.0.1") from None
    if not address.is_loopback:
        raise NotLoopback(
            f"{host} is not a loopback address: the development broker has no authentication and listens on "
            f"127.0.0.1 or ::1 alone"
        )
    try:
        return socket.create_server(
            (str(address), port), family=socket.AF_INET6 if address.version == 6 else socket.AF_INET
        )
    except OSError as error:
        raise BrokerError(f"cannot listen on {host} port {port}: {error.strerror}") from error
