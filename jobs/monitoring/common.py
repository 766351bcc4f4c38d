"""What the dashboards' panels have in common: queries over the chosen clusters."""

from grstream import telemetry as t
from jobs.monitoring.panels import Panel, Unit
from jobs.monitoring.queries import Queries

CLUSTER = 'ray_io_cluster=~"$cluster"'  # KubeRay's label of the pods; where there is none, it matches all
WINDOW = "$__rate_interval"

q = Queries(CLUSTER, WINDOW)
ALL = 'slice="all"'


def quantiles(metric: t.Metric | str, *matchers: str, by: str = "") -> dict[str, str]:
    name = f"{{{{{by}}}}} " if by else ""
    return {f"{name}p{share * 100:g}": q.quantile(share, metric, *matchers, by=by) for share in (0.5, 0.99)}


def gauge(metric: t.Metric, title: str, unit: Unit, by: str = "partition") -> Panel:
    return Panel(title, metric.description, unit, {f"{{{{{by}}}}}": q.largest(metric, by=by)})
