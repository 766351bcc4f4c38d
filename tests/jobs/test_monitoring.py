"""Dashboards, alerts and runbooks: made from the metrics there are, and each naming what there is."""

import ast
import copy
import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml

from grstream import telemetry
from grstream.telemetry import Kind
from jobs.monitoring.__main__ import PAGE, ROOT, files
from jobs.monitoring.alerts import ALERTS, Alert, rule
from jobs.monitoring.dashboards import DASHBOARDS
from jobs.monitoring.panels import Dashboard, Panel
from jobs.monitoring.queries import OF_RAY
from tests.jobs.promql import QUERIES, metrics_of

COMPONENT = ROOT / "k8s" / "monitoring"
PARTS = ("bucket", "count", "sum")
NAMES = {
    *(m.exported for m in telemetry.METRICS if m.kind is not Kind.HISTOGRAM),
    *(f"{m.exported}_{part}" for m in telemetry.METRICS if m.kind is Kind.HISTOGRAM for part in PARTS),
}
RAYS = {*OF_RAY, *(f"{name}_bucket" for name in OF_RAY)}


# -- what is made --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", files())
def test_a_file_is_what_the_code_makes(path: str) -> None:
    assert (ROOT / path).read_text() == files()[path], "python -m jobs.monitoring writes it again"


def test_the_page_lists_every_metric() -> None:
    page = (ROOT / PAGE).read_text()
    for metric in telemetry.METRICS:
        assert f"| `{metric.exported}` |" in page


# -- queries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", QUERIES)
def test_a_query_is_promql_over_metrics_that_are_exported(of: str) -> None:
    expr = promql_parser.parse(QUERIES[of])
    names = metrics_of(expr)
    assert names
    assert names <= NAMES | RAYS, names - NAMES - RAYS


def test_what_is_no_promql_or_no_metric_is_found() -> None:
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse("sum by (partition (ray_grstream_train_lag_offsets)")
    assert metrics_of(promql_parser.parse("rate(ray_no_such_total[5m]) / sum(up) > 1")) == {
        "ray_no_such_total",
        "up",
    }


LABELS = {m.exported: {*m.labels, "WorkerId", "le", "namespace"} for m in telemetry.METRICS}


@pytest.mark.parametrize("of", QUERIES)
def test_a_query_groups_by_and_matches_labels_that_its_metrics_have(of: str) -> None:
    expr = promql_parser.parse(QUERIES[of])

    def look(node: Any) -> bool:
        if isinstance(node, promql_parser.AggregateExpr):
            grouped = set(node.modifier.labels) if node.modifier is not None else set()
            for name in metrics_of(node.expr):
                known = LABELS.get(re.sub(r"_(bucket|count|sum)$", "", name)) or LABELS.get(name)
                assert known is None or grouped <= known, (name, grouped - known)
        if isinstance(node, promql_parser.VectorSelector) and node.name in LABELS:
            matched = {m.name for m in node.matchers.matchers} - {"ray_io_cluster"}
            assert matched <= LABELS[node.name], (node.name, matched)
        return True

    promql_parser.walk(expr, look)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda a: a.name)
def test_an_alert_keeps_systems_in_different_namespaces_apart(alert: Alert) -> None:
    def look(node: Any) -> bool:
        if isinstance(node, promql_parser.AggregateExpr):
            assert node.modifier is not None
            assert "namespace" in node.modifier.labels
        return True

    promql_parser.walk(promql_parser.parse(alert.expr), look)


def test_matched_values_of_labels_are_known_ones() -> None:
    """A disposition, reason or reuse that is mistyped would match nothing, and never alert."""
    known = {
        label: {values[i] for values in metric.known}
        for metric in telemetry.METRICS
        for i, label in enumerate(metric.labels)
        if metric.known
    }
    seen = 0
    for query in QUERIES.values():
        for label, value in re.findall(r'(disposition|reuse|source|status|reason)="([^"]*)"', query):
            assert value in known[label]
            seen += 1
    assert seen > 3


def test_every_metric_is_on_a_dashboard() -> None:
    shown = {name for of, q in QUERIES.items() if ": " in of for name in metrics_of(promql_parser.parse(q))}
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in shown} | shown
    assert {m.exported for m in telemetry.METRICS} <= shown


# -- dashboards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda d: d.uid)
def test_a_dashboard_has_panels_that_say_what_they_show_and_do_not_overlap(dashboard: Dashboard) -> None:
    made = dashboard.to_json()
    ids = [p["id"] for p in made["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in made["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs
        assert len(set(refs)) == len(refs)
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        values = [step["value"] for step in steps]
        assert values[0] is None
        assert values[1:] == sorted(values[1:])
        assert "green" in {step["color"] for step in steps}


def test_where_less_is_worse_the_colours_go_the_other_way() -> None:
    panel = Panel("x", "y.", "none", {"a": "up"}, warn=0.2, bad=0.05, below=True)
    made = Dashboard("u", "t", "d", [type(DASHBOARDS[0].rows[0])("r", [panel])]).to_json()["panels"][1]
    steps = made["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert [(s["color"], s["value"]) for s in steps] == [("red", None), ("yellow", 0.05), ("green", 0.2)]


# -- alerts and runbooks -------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_alert_has_a_runbook_that_names_it() -> None:
    page = (ROOT / PAGE).read_text()
    made = rule()["spec"]["groups"][0]["rules"]
    assert len({r["alert"] for r in made}) == len(made) > 20
    for one in made:
        place, _, anchor = one["annotations"]["runbook_url"].partition("#")
        assert place == PAGE
        assert anchor in anchors(page), one["alert"]
        assert one["labels"]["severity"] in ("info", "warning", "critical")
        assert one["annotations"]["summary"].endswith(".")
        assert one["alert"] in page
    assert set(re.findall(r"Grstream\w+", page)) == {one["alert"] for one in made}


def test_links_and_metrics_of_the_page_are_there() -> None:
    page = (ROOT / PAGE).read_text()
    for target in re.findall(r"\]\(([^)]*)\)", page.replace("\n", " ")):
        path, _, anchor = target.partition("#")
        of = (ROOT / "docs" / path) if path else ROOT / PAGE
        assert not anchor or anchor in anchors(of.read_text()), target
    named = set(re.findall(r"ray_[a-z_]+", page))
    whole = {m.exported for m in telemetry.METRICS} | set(OF_RAY)
    assert named <= whole, named - whole


def patterns_of(tree: ast.AST) -> Iterator[str]:
    """What a module may say: its formats and f-strings, with anything in place of what they insert."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield "(.+)".join(map(re.escape, re.split(r"%[-+.\d]*[sdfr]", node.value)))
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else None for v in node.values)
            yield "".join("(.+)" if part is None else re.escape(str(part)) for part in parts)


def is_said(line: str, patterns: set[str]) -> bool:
    """Whether a pattern is the line, or what comes behind its first colon."""
    parts = (line, line.partition(": ")[2])
    return any(re.fullmatch(pattern, part, re.S) for pattern in patterns for part in parts)


def test_every_quoted_line_of_log_is_one_that_the_code_prints() -> None:
    page = (ROOT / PAGE).read_text()
    quoted = [
        line for block in re.findall(r"```log\n(.*?)```", page, re.S) for line in block.splitlines() if line
    ]
    assert len(quoted) > 10
    patterns = {
        pattern
        for directory in ("grstream", "serve", "jobs")
        for path in (ROOT / directory).rglob("*.py")
        for pattern in patterns_of(ast.parse(path.read_text()))
        if len(re.sub(r"\(\.\+\)|\\", "", pattern)) > 12  # or it says next to nothing
    }
    assert [line for line in quoted if not is_said(line, patterns)] == []
    assert not is_said("the broker went for a walk after 3 s", patterns)


# -- Kubernetes ----------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """The schema with unknown fields as errors, wherever it does not say that they are kept."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if (
        isinstance(made.get("properties"), dict)
        and "additionalProperties" not in made
        and not made.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


def problems(assets: pathlib.Path, resource: dict[str, Any]) -> list[str]:
    plural = {"PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"}[resource["kind"]]
    crd = assets / "crds" / f"monitoring.coreos.com_{plural}.yaml"
    if not crd.exists():
        pytest.skip(f"no {crd.name} among the test assets")
    versions = yaml.safe_load(crd.read_text())["spec"]["versions"]
    (schema,) = (
        v["schema"]["openAPIV3Schema"] for v in versions if resource["apiVersion"].endswith(v["name"])
    )
    schema = strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(resource)]


RESOURCES = ("podmonitor.yaml", "rules.yaml")


@pytest.mark.parametrize("name", RESOURCES)
def test_a_resource_is_what_its_definition_allows(assets: pathlib.Path, name: str) -> None:
    assert problems(assets, yaml.safe_load((COMPONENT / name).read_text())) == []


@pytest.mark.parametrize("name", RESOURCES)
def test_an_unknown_field_or_a_wrong_type_is_found(assets: pathlib.Path, name: str) -> None:
    resource = yaml.safe_load((COMPONENT / name).read_text())
    wrong = copy.deepcopy(resource)
    wrong["spec"]["selectors"] = {}
    assert problems(assets, wrong)
    part = resource["spec"].get("podMetricsEndpoints") or resource["spec"]["groups"]
    part[0]["interval"] = 15
    assert problems(assets, resource)


def test_the_component_brings_monitor_rules_and_dashboards_that_grafana_finds(tmp_path: pathlib.Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl on the path")
    shutil.copytree(COMPONENT, tmp_path / "monitoring")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text("namespace: here\ncomponents: [../monitoring]\n")
    command = [kubectl, "kustomize", str(overlay)]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {r["kind"]: r for r in yaml.safe_load_all(made)}
    assert resources.keys() == {"PodMonitor", "PrometheusRule", "ConfigMap"}
    boards = resources["ConfigMap"]
    assert boards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {json.loads(text)["uid"] for text in boards["data"].values()} == {d.uid for d in DASHBOARDS}
