"""A snapshot file: a header and parts of columns, as one Arrow IPC file that is complete or absent.

Each part is a row of list columns with a checksum over them, so that histories of any size are written and
read a part at a time and a flipped bit is noticed.
"""

import contextlib
import json
import os
import pathlib
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy.typing as npt
import pyarrow as pa

_ARRAYS = {
    **dict.fromkeys(("users", "epochs", "appended", "active", "lengths"), pa.int64()),
    **dict.fromkeys(("items", "times", "features"), pa.int64()),
    "actions": pa.int32(),
    **dict.fromkeys(("duplicate_keys", "duplicate_offsets", "name_keys"), pa.int64()),
}
# Only in files whose header speaks of exposures, so that those of before they were joined can be read.
_EXPOSURES = dict.fromkeys(
    (f"exposure_{name}" for name in ("keys", "users", "offsets", "clocks", "ordinals")), pa.int64()
)
_HEADER = b"grstream.histories"

Part = Mapping[str, npt.NDArray[Any] | list[str]]  # absent columns are empty


class SnapshotError(RuntimeError):
    """A snapshot cannot be used; the message says why, and what to do."""


def write(path: pathlib.Path, header: Mapping[str, Any], parts: Iterable[Part]) -> None:
    """Write a snapshot durably, replacing one of that name at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    arrays = _arrays(header)
    schema = _schema(arrays).with_metadata({_HEADER: json.dumps(header, sort_keys=True).encode()})
    try:
        with scratch.open("wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                for part in parts:
                    writer.write_batch(_to_batch(part, arrays, schema))
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[tuple[dict[str, Any], Iterator[dict[str, Any]]]]:
    """A snapshot's header and its parts, in order. Raises SnapshotError for a file that is not one."""
    try:
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            header = json.loads((reader.schema.metadata or {})[_HEADER])
            arrays = _arrays(header)
            if not reader.schema.equals(_schema(arrays)):
                raise SnapshotError(f"{path} is no snapshot of histories: expected columns {[*arrays]}")
            count = reader.num_record_batches
            yield header, (_from_batch(path, reader.get_batch(i), arrays) for i in range(count))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise SnapshotError(
            f"{path} cannot be read ({error}): delete it, so that an older snapshot or the log is used"
        ) from error


def _arrays(header: Mapping[str, Any]) -> dict[str, pa.DataType]:
    return _ARRAYS | (_EXPOSURES if "exposures" in header else {})


def _schema(arrays: Mapping[str, pa.DataType]) -> pa.Schema:
    return pa.schema(
        [
            *(pa.field(name, pa.large_list(kind)) for name, kind in arrays.items()),
            pa.field("names", pa.large_list(pa.large_string())),
            pa.field("checksum", pa.uint32()),
        ]
    )


def _to_batch(part: Part, arrays: Mapping[str, pa.DataType], schema: pa.Schema) -> pa.RecordBatch:
    columns = [pa.array(part.get(name, []), kind) for name, kind in arrays.items()]
    columns.append(pa.array(part.get("names", []), pa.large_string()))
    lists = [pa.LargeListArray.from_arrays(pa.array([0, len(c)], pa.int64()), c) for c in columns]
    checksum = pa.array([_checksum(columns)], pa.uint32())
    return pa.RecordBatch.from_arrays([*lists, checksum], schema=schema)


def _from_batch(
    path: pathlib.Path, batch: pa.RecordBatch, arrays: Mapping[str, pa.DataType]
) -> dict[str, Any]:
    batch.validate(full=True)
    columns = [batch[name].flatten() for name in (*arrays, "names")]
    if batch.num_rows != 1 or _checksum(columns) != batch["checksum"][0].as_py():
        raise SnapshotError(
            f"{path} is damaged: a checksum is wrong; delete it, so that an older one is used"
        )
    part: dict[str, Any] = {name: column.to_numpy() for name, column in zip(arrays, columns, strict=False)}
    part["names"] = columns[-1].to_pylist()
    return part


def _checksum(columns: list[pa.Array]) -> int:
    checksum = 0
    for column in columns:
        if pa.types.is_large_string(column.type):
            checksum = zlib.crc32("\0".join(column.to_pylist()).encode(), checksum)
        else:
            checksum = zlib.crc32(memoryview(column.to_numpy()), checksum)
    return checksum
