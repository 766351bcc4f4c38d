"""The header of a v2 record batch: all that the broker reads of records, which it stores as they come."""

import struct
from typing import NamedTuple

from kafka import errors
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import calc_crc32c

from grstream.broker.errors import Refused

MAX_BATCH_BYTES = 1_048_588  # Kafka's default of message.max.bytes
HEADER: struct.Struct = DefaultRecordBatch.HEADER_STRUCT
_LENGTH_AT = 8  # the length field counts the bytes behind itself
_FRAME_BYTES = 12  # base offset and length
_CRC_FROM: int = DefaultRecordBatch.ATTRIBUTES_OFFSET  # the checksum covers everything from the attributes
MAGIC = 2
_TRANSACTIONAL, _CONTROL = 0x10, 0x20


class BatchHeader(NamedTuple):
    """The fields of a batch in their order on the wire."""

    base_offset: int
    length: int
    leader_epoch: int
    magic: int
    crc: int
    attributes: int
    last_offset_delta: int
    first_timestamp: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int
    records: int

    @property
    def size(self) -> int:
        """Bytes of the whole batch."""
        return self.length + _FRAME_BYTES

    @property
    def plausible(self) -> bool:
        """Whether this may be a stored batch's header at all."""
        return self.magic == MAGIC and HEADER.size <= self.size <= MAX_BATCH_BYTES

    @property
    def idempotent(self) -> bool:
        return self.producer_id >= 0

    @property
    def last_sequence(self) -> int:
        """Sequence numbers are counted modulo 2^31."""
        return (self.base_sequence + self.last_offset_delta) & 0x7FFFFFFF


def read_header(data: bytes | memoryview) -> BatchHeader:
    """The header at the start of `data`, which must hold it whole."""
    return BatchHeader._make(HEADER.unpack_from(data))


def crc_holds(header: BatchHeader, data: bytes | memoryview) -> bool:
    """Whether the checksum of the batch at the start of `data` is right."""
    return bool(calc_crc32c(memoryview(data)[_CRC_FROM : header.size]) == header.crc)


def admit(data: bytes) -> BatchHeader:
    """The header of what a producer sent for one partition: exactly one sound batch, or Refused."""
    if len(data) < HEADER.size:
        raise Refused(errors.CorruptRecordError, f"{len(data)} bytes are no record batch")
    header = read_header(data)
    if header.magic != MAGIC:
        raise Refused(
            errors.UnsupportedForMessageFormatError,
            f"magic {header.magic}; only v2 batches are stored",
        )
    if len(data) > MAX_BATCH_BYTES:
        raise Refused(
            errors.MessageSizeTooLargeError,
            f"a batch of {len(data)} bytes; at most {MAX_BATCH_BYTES}",
        )
    if header.size > len(data) or not crc_holds(header, data):
        raise Refused(errors.CorruptRecordError, "the checksum of the batch does not match its content")
    if header.size < len(data):
        raise Refused(errors.InvalidRecordError, "more than one batch for a partition in one request")
    if header.records < 1 or header.records != header.last_offset_delta + 1:
        raise Refused(
            errors.InvalidRecordError,
            f"{header.records} records but a last offset delta of {header.last_offset_delta}",
        )
    if header.attributes & (_TRANSACTIONAL | _CONTROL):
        raise Refused(errors.InvalidTxnStateError, "the development broker has no transactions")
    return header


def placed_at(offset: int, data: bytes) -> bytes:
    """The same batch with its offset assigned, under leader epoch 0; the checksum covers neither."""
    return struct.pack(">q", offset) + data[_LENGTH_AT:_FRAME_BYTES] + bytes(4) + data[_FRAME_BYTES + 4 :]


def first_record_since(data: bytes, timestamp_ms: int, start: int) -> tuple[int, int] | None:
    """(offset, timestamp) of a batch's first record at or after a time and at or after offset `start`."""
    try:
        for record in DefaultRecordBatch(data):
            if record.timestamp >= timestamp_ms and record.offset >= start:
                return record.offset, record.timestamp
    except errors.UnsupportedCodecError as error:
        raise Refused(errors.UnsupportedCompressionTypeError, str(error)) from error
    return None
