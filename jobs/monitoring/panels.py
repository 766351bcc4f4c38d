"""Grafana's JSON of a dashboard (schema version 39): panels that say what they show, and when it is bad."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, ACROSS = 24, 8, 3  # of the grid; panels beside each other
Unit = Literal["s", "ms", "bytes", "short", "ops", "percentunit", "none", "bool_yes_no", "cps"]


@dataclasses.dataclass(frozen=True)
class Panel:
    """A time series. `queries`: legend -> PromQL. Beyond `warn` it is yellow, beyond `bad` red.

    With `below` it is the other way: bad is less.
    """

    title: str
    description: str
    unit: Unit
    queries: dict[str, str]
    warn: float | None = None
    bad: float | None = None
    below: bool = False
    least: float | None = 0  # of the axis
    most: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclasses.dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    description: str
    rows: Sequence[Row]

    def to_json(self) -> dict[str, Any]:
        """What Grafana imports."""
        panels: list[dict[str, Any]] = []
        y = 0
        for row in self.rows:
            panels.append(_row(len(panels) + 1, row.title, y))
            y += 1
            for i, panel in enumerate(row.panels):
                x = i % ACROSS * (WIDTH // ACROSS)
                place = {"h": HEIGHT, "w": WIDTH // ACROSS, "x": x, "y": y + i // ACROSS * HEIGHT}
                panels.append(_panel(len(panels) + 1, panel, place))
            y += -(-len(row.panels) // ACROSS) * HEIGHT
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["grstream"],
            "schemaVersion": 39,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,  # one crosshair for all panels
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "timezone": "browser",
            "annotations": {"list": []},
            "links": [
                {
                    "type": "dashboards",
                    "title": "grstream",
                    "tags": ["grstream"],
                    "asDropdown": False,
                    "includeVars": True,
                    "keepTime": True,
                }
            ],
            "templating": {"list": [_datasource(), _cluster()]},
            "panels": panels,
        }


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    place = {"h": 1, "w": WIDTH, "x": 0, "y": y}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    steps = _steps(panel)
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 10,
            "showPoints": "never",
            "spanNulls": False,
            "thresholdsStyle": {"mode": "line" if len(steps) > 1 else "off"},
        },
    }
    for name, value in (("min", panel.least), ("max", panel.most)):
        if value is not None:
            defaults[name] = value
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "editorMode": "code",
                "range": True,
                "expr": expression,
                "legendFormat": legend,
            }
            for i, (legend, expression) in enumerate(panel.queries.items())
        ],
    }


def _steps(panel: Panel) -> list[dict[str, Any]]:
    bounds = [(panel.warn, "yellow"), (panel.bad, "red")]
    given = [(value, colour) for value, colour in bounds if value is not None]
    if not panel.below:
        return [{"color": "green", "value": None}, *({"color": c, "value": v} for v, c in given)]
    colours = [*(c for _, c in reversed(given)), "green"]
    values = [None, *sorted(v for v, _ in given)]
    return [{"color": c, "value": v} for c, v in zip(colours, values, strict=True)]


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
        "multi": False,
        "includeAll": False,
        "refresh": 1,
        "options": [],
    }


def _cluster() -> dict[str, Any]:
    # Series without the label are there under `All`, whose value matches what is absent, too.
    query = "label_values(target_info, ray_io_cluster)"
    return {
        "name": "cluster",
        "label": "Ray cluster",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "cluster"},
        "current": {"text": "All", "value": "$__all"},
        "hide": 0,
        "multi": False,
        "includeAll": True,
        "allValue": ".*",
        "refresh": 2,
        "sort": 1,
        "options": [],
    }
