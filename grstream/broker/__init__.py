"""The development broker: one node, one directory, loopback only, speaking the Kafka protocol.

It exists so that a laptop without Java runs the same client code as production. It is not Kafka: it has no
replication, no retention, no transactions, no authentication, and it acknowledges a record when the operating
system has it, which survives the death of the process but not of the machine.
"""

from grstream.broker.errors import BrokerError, CorruptLog, DirectoryInUse, NotABrokerDirectory, NotLoopback
from grstream.broker.server import Broker

__all__ = ["Broker", "BrokerError", "CorruptLog", "DirectoryInUse", "NotABrokerDirectory", "NotLoopback"]
