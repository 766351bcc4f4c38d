"""Every query of the dashboards and alerts, and the metrics that a query is over, by a real parser."""

from collections.abc import Iterator
from typing import Any

import promql_parser

from jobs.monitoring.alerts import ALERTS
from jobs.monitoring.common import WINDOW
from jobs.monitoring.dashboards import DASHBOARDS


def _queries() -> Iterator[tuple[str, str]]:
    for dashboard in DASHBOARDS:
        for panel in (panel for row in dashboard.rows for panel in row.panels):
            for legend, query in panel.queries.items():
                yield f"{dashboard.title}: {panel.title}: {legend}", query.replace(WINDOW, "5m")
    for alert in ALERTS:
        yield alert.name, alert.expr


QUERIES = dict(_queries())


def metrics_of(expr: Any) -> set[str]:
    """The names of all series that a parsed query selects."""
    found: set[str] = set()

    def look(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(node.name)
        if isinstance(node, promql_parser.MatrixSelector):
            found.add(node.vector_selector.name)
        return True

    promql_parser.walk(expr, look)
    return found
