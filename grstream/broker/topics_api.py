"""The APIs of the cluster: metadata, topics, configurations."""

from kafka import errors
from kafka.protocol.admin import (
    CreatePartitionsRequest,
    CreatePartitionsResponse,
    CreateTopicsRequest,
    CreateTopicsResponse,
    DeleteTopicsRequest,
    DeleteTopicsResponse,
    DescribeConfigsRequest,
    DescribeConfigsResponse,
)
from kafka.protocol.metadata import MetadataRequest, MetadataResponse

from grstream.broker.batch import MAX_BATCH_BYTES
from grstream.broker.directory import Directory
from grstream.broker.errors import Refused
from grstream.broker.groups import Caller
from grstream.broker.served import Message, Served

NODE_ID = 0
DEFAULT = -1  # partitions or replicas "as the broker has it"
TOPIC_RESOURCE, BROKER_RESOURCE = 2, 4
STATIC_SOURCE, DEFAULT_SOURCE = 4, 5  # where a configuration comes from, in DescribeConfigs

# What every topic does. None can be changed, so asking for another value is an error, not a promise.
TOPIC_CONFIG = {
    "cleanup.policy": "delete",
    "compression.type": "producer",
    "max.message.bytes": str(MAX_BATCH_BYTES),
    "message.timestamp.type": "CreateTime",
    "retention.bytes": "-1",
    "retention.ms": "-1",
}


class TopicsApi:
    def __init__(self, directory: Directory, host: str, port: int, partitions: int) -> None:
        self._directory = directory
        self._host = host
        self._port = port
        self._partitions = partitions  # of a topic that does not say how many

    def apis(self) -> list[Served]:
        return [
            Served(MetadataRequest, 0, 7, self.metadata),
            Served(CreateTopicsRequest, 2, 4, self.create_topics),
            Served(DeleteTopicsRequest, 1, 3, self.delete_topics),
            Served(CreatePartitionsRequest, 0, 1, self.create_partitions),
            Served(DescribeConfigsRequest, 1, 2, self.describe_configs),
        ]

    async def metadata(self, request: Message, caller: Caller) -> Message:
        """Creates a topic that is asked for only where the client asks for that too."""
        asked = None if request.topics is None else [topic.name for topic in request.topics]
        if asked is None or (request.API_VERSION == 0 and not asked):
            topics = [self._described(name) for name in self._directory.topics]
        else:
            topics = [self._found(name, request.allow_auto_topic_creation) for name in asked]
        return MetadataResponse(
            brokers=[
                MetadataResponse.MetadataResponseBroker(node_id=NODE_ID, host=self._host, port=self._port)
            ],
            cluster_id=self._directory.cluster_id,
            controller_id=NODE_ID,
            topics=topics,
        )

    async def create_topics(self, request: Message, caller: Caller) -> Message:
        answers = []
        for topic in request.topics:
            answer = CreateTopicsResponse.CreatableTopicResult(name=topic.name, error_message=None)
            try:
                partitions = self._partitions if topic.num_partitions == DEFAULT else topic.num_partitions
                _check_layout(topic)
                self._directory.check_new(topic.name, partitions)
                if not request.validate_only:
                    self._directory.create(topic.name, partitions)
            except Refused as refused:
                answer.error_code, answer.error_message = refused.code, refused.reason
            answers.append(answer)
        return CreateTopicsResponse(topics=answers)

    async def delete_topics(self, request: Message, caller: Caller) -> Message:
        answers = []
        for name in request.topic_names:
            answer = DeleteTopicsResponse.DeletableTopicResult(name=name)
            try:
                self._directory.delete(name)
            except Refused as refused:
                answer.error_code = refused.code
            answers.append(answer)
        return DeleteTopicsResponse(responses=answers)

    async def create_partitions(self, request: Message, caller: Caller) -> Message:
        answers = []
        for topic in request.topics:
            answer = CreatePartitionsResponse.CreatePartitionsTopicResult(name=topic.name, error_message=None)
            try:
                if topic.assignments:
                    raise Refused(errors.InvalidReplicationAssignmentError, "there is one node to assign")
                self._directory.check_more(topic.name, topic.count)
                if not request.validate_only:
                    self._directory.extend(topic.name, topic.count)
            except Refused as refused:
                answer.error_code, answer.error_message = refused.code, refused.reason
            answers.append(answer)
        return CreatePartitionsResponse(results=answers)

    async def describe_configs(self, request: Message, caller: Caller) -> Message:
        answers = []
        for resource in request.resources:
            answer = DescribeConfigsResponse.DescribeConfigsResult(
                error_message=None,
                resource_type=resource.resource_type,
                resource_name=resource.resource_name,
                configs=[],
            )
            try:
                answer.configs = [
                    DescribeConfigsResponse.DescribeConfigsResult.DescribeConfigsResourceResult(
                        name=name, value=value, read_only=True, config_source=source, synonyms=[]
                    )
                    for name, value, source in self._config(resource)
                    if resource.configuration_keys is None or name in resource.configuration_keys
                ]
            except Refused as refused:
                answer.error_code, answer.error_message = refused.code, refused.reason
            answers.append(answer)
        return DescribeConfigsResponse(results=answers)

    def _config(self, resource: Message) -> list[tuple[str, str, int]]:
        if resource.resource_type == TOPIC_RESOURCE:
            self._directory.partition(resource.resource_name, 0)  # refuses an unknown topic
            return [(name, value, DEFAULT_SOURCE) for name, value in TOPIC_CONFIG.items()]
        if resource.resource_type == BROKER_RESOURCE and resource.resource_name in ("", str(NODE_ID)):
            return [
                ("auto.create.topics.enable", "true", DEFAULT_SOURCE),
                ("message.max.bytes", str(MAX_BATCH_BYTES), DEFAULT_SOURCE),
                ("num.partitions", str(self._partitions), STATIC_SOURCE),
            ]
        raise Refused(
            errors.InvalidRequestError,
            f"no such resource: type {resource.resource_type}, name {resource.resource_name!r}",
        )

    def _found(self, name: str, create: bool) -> Message:
        if name not in self._directory.topics:
            try:
                if not create:
                    raise Refused(errors.UnknownTopicOrPartitionError, f"there is no topic {name!r}")
                self._directory.create(name, self._partitions)
            except Refused as refused:
                return MetadataResponse.MetadataResponseTopic(
                    error_code=refused.code, name=name, partitions=[]
                )
        return self._described(name)

    def _described(self, name: str) -> Message:
        return MetadataResponse.MetadataResponseTopic(
            name=name,
            partitions=[
                MetadataResponse.MetadataResponseTopic.MetadataResponsePartition(
                    partition_index=index,
                    leader_id=NODE_ID,
                    leader_epoch=0,
                    replica_nodes=[NODE_ID],
                    isr_nodes=[NODE_ID],
                    offline_replicas=[],
                )
                for index in range(len(self._directory.topics[name]))
            ],
        )


def _check_layout(topic: Message) -> None:
    """Refused where a topic asks for more than one node, or for what topics here do not do."""
    if topic.assignments:
        raise Refused(errors.InvalidReplicationAssignmentError, "there is one node to assign")
    if topic.replication_factor not in (DEFAULT, 1):
        raise Refused(
            errors.InvalidReplicationFactorError,
            f"{topic.replication_factor} replicas; there is one node",
        )
    for config in topic.configs:
        if TOPIC_CONFIG.get(config.name) != config.value:
            raise Refused(
                errors.InvalidConfigurationError,
                f"{config.name}={config.value}: topics of the development broker have "
                + ", ".join(f"{name}={value}" for name, value in TOPIC_CONFIG.items()),
            )
