"""Compare the newest checkpoint with the topic itself: what is missing, what was trained on twice.

    python jobs/audit.py --config X.yaml

Exit code 0 if every offset ended in exactly one way, and in the right one; 1 if not; 2 if it cannot be told.
"""

import argparse
import sys

from grstream.audit import Audit, NothingToAudit, audit
from grstream.config import ConfigError, load
from grstream.kafka import BrokerUnavailable
from grstream.ledger import Disposition

SHOWN = 5  # examples of each finding


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the newest checkpoint with the topic itself.")
    parser.add_argument("--config", required=True, help="the system's YAML")
    options = parser.parse_args()
    try:
        found = audit(load(options.config))
    except (ConfigError, NothingToAudit, BrokerUnavailable, FileNotFoundError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    show(found)
    return 0 if found.passed else 1


def show(found: Audit) -> None:
    print(
        f"checkpoint {found.checkpoint}: {found.trained:,} events trained, {found.recorded:,} in its ledger"
    )
    for disposition in Disposition:
        print(f"{found.count(disposition):>12,}  {disposition.name.lower().replace('_', ' ')}")
    print(f"{found.missing:>12,}  missing\n{found.twice:>12,}  twice\n{found.wrong:>12,}  otherwise wrong")
    for p in found.partitions:
        if p.gone:
            print(f"partition {p.partition}: {p.gone:,} offsets that were read are no longer in the log")
        if p.lost:
            print(f"partition {p.partition}: {p.lost:,} offsets left the log before they were read")
        for what, offsets in (
            ("missing", p.missing),
            ("twice", p.twice),
            ("not as journaled", p.unjournaled),
        ):
            if offsets:
                print(f"partition {p.partition}, {what}: {offsets[:SHOWN]}")
        for offset, recorded, expected in p.wrong[:SHOWN]:
            print(f"partition {p.partition}, {offset}: {recorded.name}; the log says {expected.name}")
    print("passed" if found.passed else "FAILED")


if __name__ == "__main__":
    sys.exit(main())
