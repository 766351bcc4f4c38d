"""Ids and their 64-bit keys.

An id is an int64 or a string; a string that is the canonical decimal of an int64 is that integer, so that a
JavaScript client can send ids above 2^53 as strings. A key is an int64 that names an id within a namespace,
so that one embedding table holds every feature. For integers the key is a bijection (distinct ids of a
namespace never collide, and `ints_of_keys` inverts it); strings are hashed to 64 bits.
"""

import enum
import hashlib
import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.int64]
Id = int | str

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
ABSENT = 0  # the key of a feature that an event does not carry
_DECIMAL = re.compile(r"0|-?[1-9][0-9]{0,18}")
_GOLDEN = 0x9E3779B97F4A7C15


class Namespace(enum.IntEnum):
    """What an id names. From FEATURE on they are those of features, see `feature_namespace`."""

    USER = 1
    ITEM = 2
    EVENT = 3
    EXPOSURE = 4
    FEATURE = 16


# So few bits that the golden ratio's multiples still lie 2**39 apart: integers of two namespaces that differ
# by less never share a key.
_FEATURE_BYTES = 3


def feature_namespace(column: str) -> int:
    """The namespace of a feature column's ids: a hash of its name alone, such as `context.device`.

    So a column keeps its keys whatever columns there are beside it. Names that share a namespace must not
    stand in one configuration.
    """
    digest = hashlib.blake2b(column.encode(), digest_size=_FEATURE_BYTES).digest()
    return Namespace.FEATURE + int.from_bytes(digest, "little")


def canonical_id(value: Id) -> Id:
    """The id's one form: an int where it is one or spells one, else the string as it is.

    Raises ValueError for an integer outside int64, an empty string or one with unpaired surrogates.
    """
    if isinstance(value, str):
        if not value:
            raise ValueError("an id must not be empty")
        if _DECIMAL.fullmatch(value) and INT64_MIN <= int(value) <= INT64_MAX:
            return int(value)
        value.encode()  # UnicodeEncodeError is a ValueError
        return value
    if not INT64_MIN <= value <= INT64_MAX:
        raise ValueError(f"{value} is outside int64")
    return value


def keys_of_ints(namespace: int, ids: npt.NDArray[np.int64]) -> Keys:
    """Keys of integer ids: splitmix64's finaliser, a bijection, over the id offset by the namespace."""
    x = ids.astype(np.int64, copy=False).view(np.uint64) + np.uint64((namespace * _GOLDEN) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).view(np.int64)


def ints_of_keys(namespace: int, keys: Keys) -> npt.NDArray[np.int64]:
    """The integer ids whose keys these are: the inverse of `keys_of_ints`."""
    x = np.asarray(keys, np.int64).view(np.uint64)
    x = (x ^ (x >> np.uint64(31)) ^ (x >> np.uint64(62))) * np.uint64(0x319642B2D24D8EC3)
    x = (x ^ (x >> np.uint64(27)) ^ (x >> np.uint64(54))) * np.uint64(0x96DE1B173F119089)
    x = x ^ (x >> np.uint64(30)) ^ (x >> np.uint64(60))
    return (x - np.uint64((namespace * _GOLDEN) % 2**64)).view(np.int64)


def keys_of_strings(namespace: int, ids: Iterable[str]) -> Keys:
    """Keys of (non-canonical) string ids: BLAKE2b, 8 bytes."""
    prefix = namespace.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(prefix + s.encode(), digest_size=8).digest() for s in ids)
    return np.frombuffer(digests, np.int64)


def key_of(namespace: int, value: Id) -> int:
    """The key of one id, in whichever form it is given."""
    value = canonical_id(value)
    if isinstance(value, str):
        return int(keys_of_strings(namespace, [value])[0])
    return int(keys_of_ints(namespace, np.array([value], np.int64))[0])


def partition_key(user: Id) -> bytes:
    """The Kafka record key of a user: its id spelt out, so that any client's hash sees the same bytes."""
    return str(canonical_id(user)).encode()
