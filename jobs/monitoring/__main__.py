"""Write what is made from the metrics: dashboards, alerts, and the table of metrics in docs/operations.md.

    python -m jobs.monitoring [--runbooks https://docs.example.org/operations.md]

`--runbooks` is where that page is to be read, for the links of the alerts. The files are those of the tree;
a test holds them against what this makes without it.
"""

import argparse
import json
import pathlib
import sys

import yaml

from grstream import telemetry
from jobs.monitoring.alerts import RUNBOOKS, rule
from jobs.monitoring.dashboards import DASHBOARDS

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = "docs/operations.md"
BEGIN, END = "<!-- metrics: python -m jobs.monitoring -->\n", "<!-- end of metrics -->\n"


def files(runbooks: str = RUNBOOKS, root: pathlib.Path = ROOT) -> dict[str, str]:
    """What belongs into each file, by its path in the tree."""
    made = {
        f"k8s/monitoring/dashboards/{dashboard.uid}.json": json.dumps(dashboard.to_json(), indent=1) + "\n"
        for dashboard in DASHBOARDS
    }
    head = "# Made by `python -m jobs.monitoring`.\n"
    made["k8s/monitoring/rules.yaml"] = head + yaml.safe_dump(rule(runbooks), sort_keys=False, width=1_000)
    before, _, rest = (root / PAGE).read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    made[PAGE] = f"{before}{BEGIN}\n{telemetry.table()}\n{END}{after}"
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.monitoring", description=__doc__)
    parser.add_argument("--runbooks", default=RUNBOOKS, metavar="URL", help="default: %(default)s")
    for path, text in files(parser.parse_args().runbooks).items():
        target = ROOT / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
