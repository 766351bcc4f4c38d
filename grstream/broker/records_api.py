"""The APIs of the log: produce, fetch, look up offsets, delete a prefix."""

import asyncio
import contextlib
import logging
import secrets

from kafka import errors
from kafka.protocol.admin import DeleteRecordsRequest, DeleteRecordsResponse
from kafka.protocol.consumer import FetchRequest, FetchResponse, ListOffsetsRequest, ListOffsetsResponse
from kafka.protocol.consumer.offsets import OffsetSpec
from kafka.protocol.producer import (
    InitProducerIdRequest,
    InitProducerIdResponse,
    ProduceRequest,
    ProduceResponse,
)

from grstream.broker.directory import Directory
from grstream.broker.errors import ProtocolViolation, Refused
from grstream.broker.groups import Caller
from grstream.broker.log import PartitionLog
from grstream.broker.served import Message, Served

log = logging.getLogger(__name__)

ACKS = (-1, 0, 1)  # one node: they differ only in whether the producer waits for the answer
LEADER_EPOCH = 0


class RecordsApi:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def apis(self) -> list[Served]:
        return [
            # Kafka 4 also claims the versions 0-2 that it refuses, for a bug of librdkafka (KAFKA-18659).
            Served(ProduceRequest, 3, 8, self.produce, claimed_oldest=0),
            Served(FetchRequest, 4, 11, self.fetch),
            Served(ListOffsetsRequest, 1, 5, self.list_offsets),
            Served(DeleteRecordsRequest, 0, 1, self.delete_records),
            Served(InitProducerIdRequest, 0, 1, self.init_producer_id),
        ]

    async def produce(self, request: Message, caller: Caller) -> Message:
        topics = []
        for topic in request.topic_data:
            answers = []
            for sent in topic.partition_data:
                answer = ProduceResponse.TopicProduceResponse.PartitionProduceResponse(index=sent.index)
                try:
                    if request.acks not in ACKS:
                        raise Refused(errors.InvalidRequiredAcksError, f"acks={request.acks}")
                    partition = self._directory.partition(topic.name, sent.index)
                    answer.base_offset = partition.append(sent.records or b"")
                    answer.log_start_offset = partition.start
                except Refused as refused:
                    log.info("%s: refused a batch for %s/%d: %s", caller, topic.name, sent.index, refused)
                    if request.acks == 0:  # the producer hears of it in the only way there is
                        raise ProtocolViolation(f"{topic.name}/{sent.index}: {refused.reason}") from refused
                    answer.error_code, answer.base_offset = refused.code, -1
                    answer.error_message = refused.reason
                answers.append(answer)
            topics.append(ProduceResponse.TopicProduceResponse(name=topic.name, partition_responses=answers))
        return None if request.acks == 0 else ProduceResponse(responses=topics)

    async def fetch(self, request: Message, caller: Caller) -> Message:
        """Answers when `min_bytes` are there, `max_wait_ms` are over or a partition cannot be read."""
        if request.session_id:  # of another broker or another life of this one: sessions are not offered
            return FetchResponse(error_code=errors.FetchSessionIdNotFoundError.errno, responses=[])
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.max_wait_ms / 1000
        arrival = asyncio.Event()
        with contextlib.ExitStack() as subscriptions:
            with contextlib.suppress(Refused):
                for topic in request.topics:
                    for wanted in topic.partitions:
                        partition = self._directory.partition(topic.topic, wanted.partition)
                        partition.wait_with(arrival)
                        subscriptions.callback(partition.forget, arrival)
            while not self._fetchable(request) and loop.time() < deadline:
                arrival.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(arrival.wait(), deadline - loop.time())
        return self._fetched(request)

    async def list_offsets(self, request: Message, caller: Caller) -> Message:
        topics = []
        for topic in request.topics:
            answers = []
            for asked in topic.partitions:
                answer = ListOffsetsResponse.ListOffsetsTopicResponse.ListOffsetsPartitionResponse(
                    partition_index=asked.partition_index, leader_epoch=LEADER_EPOCH
                )
                try:
                    partition = self._directory.partition(topic.name, asked.partition_index)
                    answer.offset, answer.timestamp = _offset_at(partition, asked.timestamp)
                except Refused as refused:
                    answer.error_code = refused.code
                answers.append(answer)
            topics.append(ListOffsetsResponse.ListOffsetsTopicResponse(name=topic.name, partitions=answers))
        return ListOffsetsResponse(topics=topics)

    async def delete_records(self, request: Message, caller: Caller) -> Message:
        topics = []
        for topic in request.topics:
            answers = []
            for asked in topic.partitions:
                answer = DeleteRecordsResponse.DeleteRecordsTopicResult.DeleteRecordsPartitionResult(
                    partition_index=asked.partition_index
                )
                try:
                    partition = self._directory.partition(topic.name, asked.partition_index)
                    partition.delete_before(partition.end if asked.offset == -1 else asked.offset)
                    answer.low_watermark = partition.start
                except Refused as refused:
                    answer.error_code, answer.low_watermark = refused.code, -1
                answers.append(answer)
            topics.append(DeleteRecordsResponse.DeleteRecordsTopicResult(name=topic.name, partitions=answers))
        return DeleteRecordsResponse(topics=topics)

    async def init_producer_id(self, request: Message, caller: Caller) -> Message:
        """A random id, so that no life of the broker gives one out twice."""
        if request.transactional_id is not None:
            log.warning("%s asked for transactions, which the development broker has not", caller)
            return InitProducerIdResponse(
                error_code=errors.InvalidRequestError.errno, producer_id=-1, producer_epoch=-1
            )
        return InitProducerIdResponse(producer_id=secrets.randbits(62), producer_epoch=0)

    def _fetchable(self, request: Message) -> bool:
        available = 0
        try:
            for topic in request.topics:
                for wanted in topic.partitions:
                    partition = self._directory.partition(topic.topic, wanted.partition)
                    available += partition.available(wanted.fetch_offset)
        except Refused:
            return True
        return available >= request.min_bytes

    def _fetched(self, request: Message) -> Message:
        left = request.max_bytes
        topics = []
        for topic in request.topics:
            answers = []
            for wanted in topic.partitions:
                answer = FetchResponse.FetchableTopicResponse.PartitionData(
                    partition_index=wanted.partition, aborted_transactions=None, records=b""
                )
                try:
                    partition = self._directory.partition(topic.topic, wanted.partition)
                    answer.high_watermark = answer.last_stable_offset = partition.end
                    answer.log_start_offset = partition.start
                    partition.available(wanted.fetch_offset)  # refuses an offset out of range
                    if left > 0:
                        answer.records = partition.read(
                            wanted.fetch_offset, min(left, wanted.partition_max_bytes)
                        )
                        left -= len(answer.records)
                except Refused as refused:
                    answer.error_code = refused.code
                answers.append(answer)
            topics.append(FetchResponse.FetchableTopicResponse(topic=topic.topic, partitions=answers))
        return FetchResponse(responses=topics)


def _offset_at(partition: PartitionLog, timestamp: int) -> tuple[int, int]:
    """(offset, timestamp), each -1 where there is none."""
    if timestamp == OffsetSpec.LATEST:
        return partition.end, -1
    if timestamp == OffsetSpec.EARLIEST:
        return partition.start, -1
    if timestamp < 0:
        raise Refused(errors.InvalidRequestError, f"timestamp {timestamp} has no meaning in this version")
    return partition.since(timestamp) or (-1, -1)
