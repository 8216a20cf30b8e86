"""Dashboard, alert rules and docs name metrics and labels that exist, and no metric is missing in the docs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from spotjax.engine.request import FinishReason
from spotjax.fleet.observer import Outcome
from spotjax.fleet.observer import Path as Path_
from spotjax.telemetry import metrics

DOCS = Path(__file__).parents[2] / "docs"
RULES, BOARD, PAGE = DOCS / "monitoring/alerts.yaml", DOCS / "monitoring/grafana.json", DOCS / "monitoring.md"
SAMPLES = {sample: metric for metric in metrics.ALL.values() for sample in metric.samples}
TARGET = {"instance", "job"}
"""Labels that Prometheus adds."""
NAME = re.compile(r"\b(spotjax_\w+)(?:\{([^}]*)\})?")
GROUPING = re.compile(r"\b(?:by|on) \(([^)]*)\)")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[str]:
    board = json.loads(BOARD.read_text())
    variables = [variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    notes = [note["expr"] for note in board["annotations"]["list"]]
    return [target["expr"] for panel in panels() for target in panel["targets"]] + variables + notes


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def queries() -> list[str]:
    return dashboard_queries() + [rule["expr"] for rule in rules()]


def names(query: str) -> Iterator[tuple[str, set[str]]]:
    """Every metric of a query, with the labels that are asked of it."""
    for name, selector in NAME.findall(query):
        yield name, set(re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\"", selector))


@pytest.mark.parametrize("query", queries())
def test_queries_name_metrics_and_labels_that_exist(query: str) -> None:
    used = list(names(query))
    assert used or query.startswith("up{"), "it asks for nothing of ours"
    have = set(TARGET)
    for name, labels in used:
        assert name in SAMPLES, f"{name} is not a metric"
        assert labels <= {*SAMPLES[name].labels, *TARGET}
        have |= {*SAMPLES[name].labels, *(("le",) if name.endswith("_bucket") else ())}
    for grouping in GROUPING.findall(query):
        assert {label.strip() for label in grouping.split(",")} <= have
    if "histogram_quantile" in query:
        assert all(name.endswith("_bucket") for name, _ in used)
        assert re.search(r"by \([^)]*\ble\b", query), "quantiles are of buckets by le"


@pytest.mark.parametrize("query", queries())
def test_counters_are_asked_for_their_rate_and_nothing_else_is(query: str) -> None:
    """But for ``changes``, which counts the changes of a gauge."""
    asked = set(re.findall(r"(?:rate|increase)\((spotjax_\w+)", query))
    for name, _ in names(query):
        counts = SAMPLES[name].kind != "gauge"
        assert (name in asked) == counts, f"{name} is a {SAMPLES[name].kind}"


def test_the_dashboard_shows_every_metric() -> None:
    shown = {SAMPLES[name].name for query in dashboard_queries() for name, _ in names(query)}
    assert metrics.ALL.keys() - shown == {metrics.INFO.name, metrics.DRAINING.name}


def test_the_dashboard_can_be_imported() -> None:
    """The structure that Grafana needs; Grafana itself is not at hand."""
    board = json.loads(BOARD.read_text())
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["title"] and panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = {label.strip() for part in GROUPING.findall(target["expr"]) for label in part.split(",")}
            assert shown <= grouped, f"{panel['title']}: a legend names what the query does not give"


def test_the_docs_have_every_metric_with_its_kind_and_labels_and_no_other() -> None:
    rows = re.findall(r"^\| `(spotjax_\w+)` \| (\w+) \| ([^|]*)\| (.*) \|$", PAGE.read_text(), re.M)
    told = {name: (kind, tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in rows}
    assert len(told) == len(rows)
    assert told == {m.name: (m.kind, m.labels, m.help) for m in metrics.ALL.values()}


@pytest.mark.parametrize(
    ("label", "values"),
    [("finish", list(FinishReason)), ("path", get_args(Path_)), ("outcome", get_args(Outcome))],
)
def test_the_docs_have_every_value_of_a_label(label: str, values: Sequence[str]) -> None:
    found = re.search(rf"^\| `{label}` \| (.*) \|$", PAGE.read_text(), re.M)
    assert found is not None
    assert set(re.findall(r"`(\w+)`", found[1])) == set(values)


def test_the_docs_have_every_alert_with_its_severity_and_no_other() -> None:
    told = dict(re.findall(r"^\| `(Spotjax\w+)` \| (\w+) \|", PAGE.read_text(), re.M))
    assert told == {rule["alert"]: rule["labels"]["severity"] for rule in rules()}


def test_alert_rules_have_what_prometheus_wants() -> None:
    for rule in rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
        have = TARGET | {label for name, _ in names(rule["expr"]) for label in SAMPLES[name].labels}
        assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= have
        for opening, closing in ("()", "[]", "{}"):
            assert rule["expr"].count(opening) == rule["expr"].count(closing)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_accepts_the_rules_and_the_dashboard_s_queries(tmp_path: Path) -> None:
    """The queries as rules, with values in the place of Grafana's variables."""
    plain = [query.replace("$__rate_interval", "5m") for query in dashboard_queries() if "label_values" not in query]
    as_rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(plain)]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": as_rules}]}))
    for file in (RULES, tmp_path / "queries.yaml"):
        done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_has_a_meaning_a_fitting_name_and_rising_buckets() -> None:
    for metric in metrics.ALL.values():
        assert metric.help.endswith(".") and len(metric.help) < 120
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.kind not in ("histogram", "summary") or metric.unit == "seconds"
        assert not TARGET & set(metric.labels), "Prometheus would rename it"
