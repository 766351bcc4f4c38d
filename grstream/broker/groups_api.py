"""The APIs of consumer groups: membership and committed offsets."""

from kafka import errors
from kafka.protocol.admin import (
    DescribeGroupsRequest,
    DescribeGroupsResponse,
    ListGroupsRequest,
    ListGroupsResponse,
)
from kafka.protocol.consumer import (
    HeartbeatRequest,
    HeartbeatResponse,
    JoinGroupRequest,
    JoinGroupResponse,
    LeaveGroupRequest,
    LeaveGroupResponse,
    OffsetCommitRequest,
    OffsetCommitResponse,
    OffsetFetchRequest,
    OffsetFetchResponse,
    SyncGroupRequest,
    SyncGroupResponse,
)
from kafka.protocol.metadata import CoordinatorType, FindCoordinatorRequest, FindCoordinatorResponse

from grstream.broker.directory import Directory
from grstream.broker.errors import Refused
from grstream.broker.groups import Caller, Groups, Joining
from grstream.broker.offsets import Committed, Partition
from grstream.broker.served import Message, Served
from grstream.broker.topics_api import NODE_ID

ANNOUNCES_IDS = 4  # from this version of JoinGroup a member asks for its id first
MAX_METADATA_LENGTH = 4096


class GroupsApi:
    def __init__(self, directory: Directory, groups: Groups, host: str, port: int) -> None:
        self._directory = directory
        self._groups = groups
        self._host = host
        self._port = port

    def apis(self) -> list[Served]:
        # The versions after these add static membership, which is not offered.
        return [
            Served(FindCoordinatorRequest, 0, 2, self.find_coordinator),
            Served(JoinGroupRequest, 0, 4, self.join),
            Served(SyncGroupRequest, 0, 2, self.sync),
            Served(HeartbeatRequest, 0, 2, self.heartbeat),
            Served(LeaveGroupRequest, 0, 2, self.leave),
            Served(OffsetCommitRequest, 2, 6, self.commit),
            Served(OffsetFetchRequest, 1, 5, self.committed),
            Served(ListGroupsRequest, 0, 2, self.list),
            Served(DescribeGroupsRequest, 0, 2, self.describe),
        ]

    async def find_coordinator(self, request: Message, caller: Caller) -> Message:
        if request.key_type != CoordinatorType.GROUP:
            return FindCoordinatorResponse(
                error_code=errors.InvalidRequestError.errno,
                error_message="the development broker coordinates consumer groups alone, no transactions",
                node_id=-1,
                port=-1,
            )
        return FindCoordinatorResponse(error_message=None, node_id=NODE_ID, host=self._host, port=self._port)

    async def join(self, request: Message, caller: Caller) -> Message:
        session_s = request.session_timeout_ms / 1000
        try:
            group = self._groups.group(request.group_id)
            if request.API_VERSION >= ANNOUNCES_IDS and not request.member_id:
                return JoinGroupResponse(
                    error_code=errors.MemberIdRequiredError.errno,
                    member_id=group.announce(caller, session_s),
                    members=[],
                )
            joined = await group.join(
                request.member_id,
                Joining(
                    caller=caller,
                    session_timeout_s=session_s,
                    rebalance_timeout_s=max(session_s, request.rebalance_timeout_ms / 1000),
                    protocol_type=request.protocol_type,
                    protocols=tuple((p.name, p.metadata) for p in request.protocols),
                ),
            )
        except Refused as refused:
            return JoinGroupResponse(error_code=refused.code, member_id=request.member_id, members=[])
        return JoinGroupResponse(
            generation_id=joined.generation,
            protocol_name=joined.protocol,
            leader=joined.leader,
            member_id=joined.member,
            members=[
                JoinGroupResponse.JoinGroupResponseMember(member_id=member, metadata=metadata)
                for member, metadata in joined.members
            ],
        )

    async def sync(self, request: Message, caller: Caller) -> Message:
        try:
            assignment = await self._groups.group(request.group_id).sync(
                request.member_id,
                request.generation_id,
                [(a.member_id, a.assignment) for a in request.assignments],
            )
        except Refused as refused:
            return SyncGroupResponse(error_code=refused.code, assignment=b"")
        return SyncGroupResponse(assignment=assignment)

    async def heartbeat(self, request: Message, caller: Caller) -> Message:
        try:
            self._groups.group(request.group_id).heartbeat(request.member_id, request.generation_id)
        except Refused as refused:
            return HeartbeatResponse(error_code=refused.code)
        return HeartbeatResponse()

    async def leave(self, request: Message, caller: Caller) -> Message:
        try:
            self._groups.group(request.group_id).leave(request.member_id)
        except Refused as refused:
            return LeaveGroupResponse(error_code=refused.code)
        return LeaveGroupResponse()

    async def commit(self, request: Message, caller: Caller) -> Message:
        """All of it but the partitions that cannot be committed."""
        codes: dict[Partition, int] = {}
        offsets: dict[Partition, Committed] = {}
        for topic in request.topics:
            for sent in topic.partitions:
                try:
                    offsets[topic.name, sent.partition_index] = self._committable(topic.name, sent)
                except Refused as refused:
                    codes[topic.name, sent.partition_index] = refused.code
        try:
            group = self._groups.group(request.group_id)
            group.check_commit(request.member_id, request.generation_id_or_member_epoch)
            self._directory.offsets.commit(request.group_id, offsets)
        except Refused as refused:
            codes |= dict.fromkeys(offsets, refused.code)
        answer = OffsetCommitResponse.OffsetCommitResponseTopic
        return OffsetCommitResponse(
            topics=[
                answer(
                    name=topic.name,
                    partitions=[
                        answer.OffsetCommitResponsePartition(
                            partition_index=sent.partition_index,
                            error_code=codes.get((topic.name, sent.partition_index), 0),
                        )
                        for sent in topic.partitions
                    ],
                )
                for topic in request.topics
            ]
        )

    async def committed(self, request: Message, caller: Caller) -> Message:
        held = self._directory.offsets.of(request.group_id)
        asked: dict[str, list[int]] = {}
        if request.topics is None:
            for topic, index in held:
                asked.setdefault(topic, []).append(index)
        else:
            asked = {topic.name: topic.partition_indexes for topic in request.topics}
        nothing = Committed(-1, "")
        return OffsetFetchResponse(
            topics=[
                OffsetFetchResponse.OffsetFetchResponseTopic(
                    name=topic,
                    partitions=[
                        OffsetFetchResponse.OffsetFetchResponseTopic.OffsetFetchResponsePartition(
                            partition_index=index,
                            committed_offset=held.get((topic, index), nothing).offset,
                            metadata=held.get((topic, index), nothing).metadata,
                        )
                        for index in indexes
                    ],
                )
                for topic, indexes in asked.items()
            ]
        )

    async def list(self, request: Message, caller: Caller) -> Message:
        names = {**dict.fromkeys(self._directory.offsets.groups()), **dict.fromkeys(self._groups.names())}
        return ListGroupsResponse(
            groups=[
                ListGroupsResponse.ListedGroup(
                    group_id=name, protocol_type=self._groups.group(name).protocol_type
                )
                for name in names
            ]
        )

    async def describe(self, request: Message, caller: Caller) -> Message:
        return DescribeGroupsResponse(groups=[self._described(name) for name in request.groups])

    def _committable(self, topic: str, sent: Message) -> Committed:
        self._directory.partition(topic, sent.partition_index)  # refuses an unknown one
        if len(sent.committed_metadata or "") > MAX_METADATA_LENGTH:
            raise Refused(
                errors.OffsetMetadataTooLargeError, f"metadata over {MAX_METADATA_LENGTH} characters"
            )
        return Committed(sent.committed_offset, sent.committed_metadata)

    def _described(self, name: str) -> Message:
        if name not in self._groups.names() and name not in self._directory.offsets.groups():
            return DescribeGroupsResponse.DescribedGroup(group_id=name, group_state="Dead", members=[])
        group = self._groups.group(name)
        return DescribeGroupsResponse.DescribedGroup(
            group_id=name,
            group_state=group.state.value,
            protocol_type=group.protocol_type,
            protocol_data=group.protocol,
            members=[
                DescribeGroupsResponse.DescribedGroup.DescribedGroupMember(
                    member_id=member.id,
                    client_id=member.says.caller.client_id,
                    client_host=f"/{member.says.caller.host}",
                    member_metadata=member.metadata(group.protocol),
                    member_assignment=member.assignment,
                )
                for member in group.members.values()
            ],
        )
