"""The `grstream` command. A subcommand is a function below with its parser in `_parser`."""

import argparse
import logging
import pathlib
import signal
import sys
from collections.abc import Sequence

from grstream.broker import Broker, BrokerError
from grstream.broker.server import DEFAULT_PARTITIONS, DEFAULT_PORT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    status: int = options.run(options)
    return status


def broker(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; prints `ready HOST:PORT` when connections are accepted."""
    try:
        serving = Broker(options.dir, options.port, options.host, options.partitions)
    except BrokerError as error:
        print(f"grstream broker: {error}", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: serving.stop())
    print(f"ready {serving.bootstrap}", flush=True)
    serving.serve_forever()
    return 0


def weights(options: argparse.Namespace) -> int:
    """List versions, or order which one is served."""
    # These take a second to import, which the broker need not wait for.
    from grstream import config
    from grstream.weight_store import WeightStore
    from grstream.weights import WeightsError

    try:
        store = WeightStore(config.load(options.config).storage / "weights")
        if options.action == "pin":
            store.pin(options.number)
        elif options.action == "unpin":
            store.pin(None)
        elif options.action == "rollback":
            store.rollback(options.to)
        elif options.action == "ab" and options.number is None:
            store.end_ab()
        elif options.action == "ab":
            store.begin_ab(options.number, options.share)
        print("\n".join(store.describe()))
    except (config.ConfigError, WeightsError, ValueError) as error:
        print(f"grstream weights: {error}", file=sys.stderr)
        return 1
    return 0


def config_docs(options: argparse.Namespace) -> int:
    """Print the reference of all fields."""
    from grstream.config import documents

    print(documents.markdown(), end="")
    return 0


def config_schema(options: argparse.Namespace) -> int:
    """Print the JSON Schema."""
    from grstream.config import documents

    print(documents.schema())
    return 0


def config_check(options: argparse.Namespace) -> int:
    """A line for each file that is right; for others each fault. 1 where one is wrong, 2 where unreadable."""
    from grstream.config import Unreadable
    from grstream.config.checking import check

    status = 0
    for path in options.files:
        try:
            checked = check(path)
        except Unreadable as error:
            print(f"grstream config: {error}", file=sys.stderr)
            status = 2
            continue
        for fault in checked.wrong:
            print(f"{path}: {fault}", file=sys.stderr)
        for fault in checked.unwise:
            print(f"{path}: warning: {fault}", file=sys.stderr)
        if checked.wrong:
            status = max(status, 1)
        else:
            print(f"{path}: {checked.kind}, valid")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grstream", description="A generative recommender on a live stream."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "broker",
        help="a development Kafka broker: one node, persistent, loopback only",
        description="A single-node development broker that speaks the Kafka protocol. It is not Kafka: no "
        "replication, retention, transactions or authentication.",
    )
    command.add_argument("--dir", type=pathlib.Path, required=True, help="where topics are kept")
    command.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one (%(default)s)")
    command.add_argument("--host", default="127.0.0.1", help="a loopback address (%(default)s)")
    command.add_argument(
        "--partitions", type=int, default=DEFAULT_PARTITIONS, help="of topics created unasked (%(default)s)"
    )
    command.set_defaults(run=broker)

    command = commands.add_parser(
        "weights",
        help="list the weights versions; say which one is served",
        description="Scorers follow within their poll interval (serve.poll_weights_s).",
    )
    actions = command.add_subparsers(required=True, metavar="ACTION", dest="action")
    listing = actions.add_parser("list", help="versions, newest first, and which one is to be served")
    pin = actions.add_parser("pin", help="serve one version, whatever is published")
    pin.add_argument("number", type=int)
    unpin = actions.add_parser("unpin", help="serve the newest version again")
    back = actions.add_parser(
        "rollback", help="withdraw the newest version, or all above --to; what is published later is served"
    )
    back.add_argument("--to", type=int, metavar="NUMBER")
    ab = actions.add_parser("ab", help="serve some users another version beside; without NUMBER end that")
    ab.add_argument("number", type=int, nargs="?", metavar="NUMBER")
    ab.add_argument("--share", type=float, default=0.5, help="of users, chosen by a hash (%(default)s)")
    for action in (listing, pin, unpin, back, ab):
        action.add_argument("--config", required=True, help="the YAML that trainer and scorers have")
    command.set_defaults(run=weights)

    command = commands.add_parser("config", help="check a configuration; list all fields")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    checking = actions.add_parser(
        "check",
        help="what is wrong with a file, and what is unwise",
        description="Exit status 0: all are valid; 1: one is not; 2: one cannot be read, or is not YAML.",
    )
    checking.add_argument("files", nargs="+", metavar="FILE")
    checking.set_defaults(run=config_check)
    docs = actions.add_parser("docs", help="every field with type, default and meaning, as Markdown")
    docs.set_defaults(run=config_docs)
    schema = actions.add_parser("schema", help="the same as a JSON Schema, for editors")
    schema.set_defaults(run=config_schema)
    return parser


if __name__ == "__main__":
    sys.exit(main())
