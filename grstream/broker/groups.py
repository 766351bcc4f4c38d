"""Consumer groups: who is a member, and the two rounds (join, sync) by which they agree on an assignment.

The coordinator of the classic protocol (KIP-134 and before; static membership is not offered). A group is

    EMPTY -> PREPARING (members join) -> COMPLETING (the leader's assignment is awaited) -> STABLE

and falls back to PREPARING whenever somebody comes, goes, falls silent or changes its subscription.
"""

import asyncio
import dataclasses
import enum
import time
import uuid
from collections.abc import Iterable
from typing import TypeVar

from kafka import errors

from grstream.broker.errors import Refused

T = TypeVar("T")

FIRST_JOIN_WAIT_S = 0.1  # members that start together make one generation instead of several
NO_GENERATION = -1


class State(enum.StrEnum):
    """As Kafka spells them in DescribeGroups."""

    EMPTY = "Empty"
    PREPARING = "PreparingRebalance"
    COMPLETING = "CompletingRebalance"
    STABLE = "Stable"


@dataclasses.dataclass(frozen=True)
class Caller:
    client_id: str
    host: str


@dataclasses.dataclass(frozen=True)
class Joining:
    """What a member says when it joins."""

    caller: Caller
    session_timeout_s: float
    rebalance_timeout_s: float
    protocol_type: str
    protocols: tuple[tuple[str, bytes], ...]  # assignment strategies in order of preference, with metadata


@dataclasses.dataclass(frozen=True)
class Joined:
    """What a member is told at the end of the join round; `members` is empty for all but the leader."""

    generation: int
    protocol: str
    leader: str
    member: str
    members: tuple[tuple[str, bytes], ...]


@dataclasses.dataclass
class Member:
    id: str
    says: Joining
    expires: float
    assignment: bytes = b""
    join: asyncio.Future[Joined] | None = None
    sync: asyncio.Future[bytes] | None = None

    def metadata(self, protocol: str) -> bytes:
        return dict(self.says.protocols).get(protocol, b"")

    def touch(self) -> None:
        self.expires = time.monotonic() + self.says.session_timeout_s


class Group:
    """One group. Every method answers at once or with a future that the group's later events resolve."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = State.EMPTY
        self.generation = 0
        self.protocol = ""
        self.protocol_type = ""
        self.members: dict[str, Member] = {}
        self._leader = ""
        self._announced: dict[str, float] = {}  # ids given out and not yet joined with, and until when
        self._not_before = 0.0  # the join round ends between these two times
        self._not_after = 0.0

    def announce(self, caller: Caller, session_timeout_s: float) -> str:
        """A member id for a newcomer, which joins with it (KIP-394): one that vanishes leaves no member."""
        member_id = f"{caller.client_id}-{uuid.uuid4()}"
        self._announced[member_id] = time.monotonic() + session_timeout_s
        return member_id

    def join(self, member_id: str, says: Joining) -> asyncio.Future[Joined]:
        self._check_fits(member_id, says)
        if not member_id:
            member_id = self.announce(says.caller, says.session_timeout_s)
        if self._announced.pop(member_id, None) is not None:
            member = self.members[member_id] = Member(member_id, says, expires=0)
        else:
            member = self._member(member_id)
            unchanged = member.says.protocols == says.protocols
            current = self.state is State.COMPLETING or (
                self.state is State.STABLE and member_id != self._leader
            )
            member.says = says
            member.touch()
            if unchanged and current:  # it missed the answer; nobody else is disturbed
                answer: asyncio.Future[Joined] = _promise(None)
                answer.set_result(self._joined(member))
                return answer
        member.join = answer = _promise(member.join)
        self.protocol_type = says.protocol_type
        self._rebalance()
        self.tick()
        return answer

    def sync(
        self, member_id: str, generation: int, assignments: Iterable[tuple[str, bytes]]
    ) -> asyncio.Future[bytes]:
        member = self.check(member_id, generation)
        if self.state is State.PREPARING:
            raise Refused(errors.RebalanceInProgressError, f"group {self.name!r} is rebalancing")
        member.touch()
        member.sync = answer = _promise(member.sync)
        if self.state is State.COMPLETING and member_id == self._leader:
            assigned = dict(assignments)
            for other in self.members.values():
                other.assignment = assigned.get(other.id, b"")
            self.state = State.STABLE
        if self.state is State.STABLE:
            for other in self.members.values():
                _resolve(other.sync, other.assignment)
                other.sync = None
        return answer

    def heartbeat(self, member_id: str, generation: int) -> None:
        self.check(member_id, generation).touch()
        if self.state is State.PREPARING:
            raise Refused(errors.RebalanceInProgressError, f"group {self.name!r} is rebalancing")

    def leave(self, member_id: str) -> None:
        if self._announced.pop(member_id, None) is None:
            self._remove(self._member(member_id))
            self.tick()

    def check_commit(self, member_id: str, generation: int) -> None:
        """Refused unless the caller may commit: a member of this generation, or anybody in an empty group."""
        if generation == NO_GENERATION and not self.members:
            return
        self.check(member_id, generation).touch()
        if self.state is State.COMPLETING:
            raise Refused(errors.RebalanceInProgressError, f"group {self.name!r} is rebalancing")

    def check(self, member_id: str, generation: int) -> Member:
        member = self._member(member_id)
        if generation != self.generation:
            raise Refused(
                errors.IllegalGenerationError, f"generation {generation}; the group is at {self.generation}"
            )
        return member

    @property
    def idle(self) -> bool:
        return not self.members and not self._announced and self.state is State.EMPTY

    def tick(self) -> None:
        """What time does: silent members are removed, a join round ends."""
        now = time.monotonic()
        self._announced = {m: until for m, until in self._announced.items() if until > now}
        for member in list(self.members.values()):
            if member.join is None and member.sync is None and member.expires < now:
                self._remove(member)
        if self.state is not State.PREPARING or now < self._not_before:
            return
        missing = [member for member in self.members.values() if member.join is None]
        if missing and now < self._not_after:
            return
        for member in missing:
            del self.members[member.id]
        self._begin_generation()

    def _check_fits(self, member_id: str, says: Joining) -> None:
        if not says.protocols:
            raise Refused(errors.InconsistentGroupProtocolError, "no assignment strategy was named")
        others = [m for m in self.members.values() if m.id != member_id]
        if others and says.protocol_type != self.protocol_type:
            raise Refused(
                errors.InconsistentGroupProtocolError,
                f"group {self.name!r} is of type {self.protocol_type!r}, not {says.protocol_type!r}",
            )
        names = {name for name, _ in says.protocols}
        if not names.intersection(*({name for name, _ in m.says.protocols} for m in others)):
            raise Refused(
                errors.InconsistentGroupProtocolError,
                f"no assignment strategy of {sorted(names)} is known to all members of {self.name!r}",
            )

    def _member(self, member_id: str) -> Member:
        if member_id not in self.members:
            raise Refused(errors.UnknownMemberIdError, f"group {self.name!r} has no member {member_id!r}")
        return self.members[member_id]

    def _remove(self, member: Member) -> None:
        del self.members[member.id]
        gone = Refused(errors.UnknownMemberIdError, f"{member.id!r} has left group {self.name!r}")
        _refuse(member.join, gone)
        _refuse(member.sync, gone)
        self._rebalance()

    def _rebalance(self) -> None:
        """Begin a join round, unless one is going on."""
        if self.state is State.PREPARING:
            return
        now = time.monotonic()
        self._not_before = now + FIRST_JOIN_WAIT_S if self.state is State.EMPTY else now
        self._not_after = now + max((m.says.rebalance_timeout_s for m in self.members.values()), default=0)
        self.state = State.PREPARING
        for member in self.members.values():
            _refuse(
                member.sync, Refused(errors.RebalanceInProgressError, f"group {self.name!r} is rebalancing")
            )
            member.sync = None

    def _begin_generation(self) -> None:
        self.generation += 1
        if not self.members:
            self.state, self._leader, self.protocol = State.EMPTY, "", ""
            return
        self.state = State.COMPLETING
        if self._leader not in self.members:
            self._leader = next(iter(self.members))
        known = [{name for name, _ in m.says.protocols} for m in self.members.values()]
        preferred = [name for name, _ in self.members[self._leader].says.protocols]
        self.protocol = next(name for name in preferred if all(name in names for names in known))
        for member in self.members.values():
            member.touch()
            member.assignment = b""
            _resolve(member.join, self._joined(member))
            member.join = None

    def _joined(self, member: Member) -> Joined:
        told = self.members.values() if member.id == self._leader else ()
        members = tuple((m.id, m.metadata(self.protocol)) for m in told)
        return Joined(self.generation, self.protocol, self._leader, member.id, members)


class Groups:
    """The groups that have members, or had some a moment ago."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}

    def group(self, name: str) -> Group:
        """The group of that name, empty if nobody is in it."""
        if not name:
            raise Refused(errors.InvalidGroupIdError, "a group's name must not be empty")
        return self._groups.setdefault(name, Group(name))

    def names(self) -> list[str]:
        return list(self._groups)

    def tick(self) -> None:
        for group in list(self._groups.values()):
            group.tick()
            if group.idle:
                del self._groups[group.name]


def _promise(superseded: asyncio.Future[T] | None) -> asyncio.Future[T]:
    """A new future; the one that it takes the place of is answered, on a connection that may be long dead."""
    _refuse(superseded, Refused(errors.RebalanceInProgressError, "the member has asked again"))
    return asyncio.get_running_loop().create_future()


def _resolve(future: asyncio.Future[T] | None, value: T) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _refuse(future: asyncio.Future | None, reason: Refused) -> None:
    if future is not None and not future.done():
        future.set_exception(reason)
        future.exception()  # the awaiting connection may be gone: nobody need retrieve it
