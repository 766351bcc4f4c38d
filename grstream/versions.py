"""Which of several weights versions a user is served by, and what each may retrieve.

New weights make every page of the cache a miss. So the version before stays beside the newest one: a user
whose pages are of it goes on with it until they have been rebuilt, which is done in idle steps, those who ask
most first, or until the version is too old. In an A/B test a version beside all these answers some of the
users.
"""

import collections
import dataclasses
import hashlib
import math
from collections.abc import Iterator

from grstream.histories import History
from grstream.scores import Arm
from grstream.served import Served
from grstream.shelf import Shelf

OBJECT_BYTES = 1000  # of a user's Python objects
HEAT_S = 60.0  # how long a request counts for: its weight falls to 1/e


@dataclasses.dataclass
class _User:
    history: History
    number: int  # of the version that last answered, or was rebuilt
    heat: float
    at: float

    @property
    def nbytes(self) -> int:
        history = self.history
        columns = (history.items, history.actions, history.times, history.features)
        return OBJECT_BYTES + sum(column.nbytes for column in columns)

    def heat_now(self, now: float) -> float:
        return self.heat * math.exp((self.at - now) / HEAT_S)


class Versions:
    """The versions that are being served, the newest last. Not thread-safe.

    Of users it remembers the version and the last history, to encode it anew, within `budget` bytes; who
    asked least recently is forgotten, and served by the newest version.
    """

    def __init__(self, kept: int, max_age_s: float, budget: int) -> None:
        self._kept, self._max_age_s, self._budget = kept, max_age_s, budget
        self.nbytes = 0
        self._versions: list[tuple[Served, float]] = []  # and when each was followed by the next
        self.beside: tuple[Served, float] | None = None  # of an A/B test, and its share of users
        self._shelves: dict[int, Shelf] = {}  # by the version's identity
        self._users: collections.OrderedDict[int, _User] = collections.OrderedDict()
        self._cold: Iterator[int] | None = None  # users to be rebuilt, the hottest first

    @property
    def newest(self) -> Served | None:
        return self._versions[-1][0] if self._versions else None

    def all(self) -> list[Served]:
        """Those that may answer."""
        return [*(served for served, _ in self._versions), *([self.beside[0]] if self.beside else [])]

    def add(self, served: Served, shelf: Shelf, now: float) -> None:
        """Serve another version, beside those before it that are not too old."""
        if self._versions:
            self._versions[-1] = (self._versions[-1][0], now)
        self._versions.append((served, math.inf))
        del self._versions[: -self._kept]
        self._retire(now)
        self._cold = None
        self.put(served, shelf)

    def begin_ab(self, served: Served, share: float, shelf: Shelf) -> None:
        """Have a share of the users, chosen by a hash, served by this version."""
        self.beside = served, share
        self.put(served, shelf)

    def end_ab(self) -> None:
        self.beside = None

    def put(self, served: Served, shelf: Shelf) -> None:
        """What a version may retrieve from now on."""
        live = {id(version) for version in self.all()}
        self._shelves = {key: held for key, held in self._shelves.items() if key in live}
        self._shelves[id(served)] = shelf

    def shelf(self, served: Served) -> Shelf:
        return self._shelves[id(served)]

    def of(self, user: int | None, now: float) -> tuple[Served | None, Arm | None]:
        """The version that a user is to be answered by, and its arm of an A/B test."""
        self._retire(now)
        if self.beside is not None and user is not None and _within(user, *self.beside):
            return self.beside[0], "b"
        arm: Arm | None = None if self.beside is None else "a"
        known = self._users.get(user) if user is not None else None
        for served, _ in self._versions:
            if known is not None and served.number == known.number:
                return served, arm
        return self.newest, arm

    def answered(self, user: int, history: History, served: Served, now: float) -> None:
        """A user's request goes to this version."""
        known = self._users.pop(user, None)
        heat = 1.0 if known is None else 1.0 + known.heat_now(now)
        self.nbytes -= 0 if known is None else known.nbytes
        self._users[user] = _User(history, served.number, heat, now)
        self.nbytes += self._users[user].nbytes
        while self.nbytes > self._budget:
            self.nbytes -= self._users.popitem(last=False)[1].nbytes

    def rebuilt(self, user: int, served: Served) -> None:
        if user in self._users:
            self._users[user].number = served.number

    def to_rebuild(self, now: float) -> tuple[int, History] | None:
        """The user who asks most among those that an older version still serves, and the last history."""
        self._retire(now)
        if len(self._versions) < 2:
            return None
        older = {served.number for served, _ in self._versions[:-1]}
        if self._cold is None:
            users = self._users
            self._cold = iter(sorted(users, key=lambda user: -users[user].heat_now(now)))
        for user in self._cold:
            known = self._users.get(user)
            if known is not None and known.number in older:
                return user, known.history
        del self._versions[:-1]  # no one is served by them any more
        return None

    def _retire(self, now: float) -> None:
        while len(self._versions) > 1 and now - self._versions[0][1] >= self._max_age_s:
            del self._versions[0]


def _within(user: int, served: Served, share: float) -> bool:
    """Whether a user belongs to arm b of the test of this version: others in the test of another one."""
    told = f"{served.number} {user}".encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") < share * 2**64
