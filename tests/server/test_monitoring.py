"""Dashboard, alerts and the autoscaler's metric: they parse, agree, and ask for what exists."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

SERVER = Path(__file__).parents[2] / "server"
# Names a live server exposes; tests/integration/test_dashboard.py compares them with one.
EXPOSED = set((Path(__file__).parent / "metrics.txt").read_text().split()) | {"up"}


def read(name: str) -> Any:
    return yaml.safe_load((SERVER / name).read_text())


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((SERVER / "grafana/dashboards/cbpt-runtime.json").read_text())  # type: ignore[no-any-return]


def test_every_query_is_promql_and_asks_for_metrics_that_exist(operator_queries: list[Any]) -> None:
    assert len(operator_queries) > 20
    unknown = {(q.source, name) for q in operator_queries for name in set(q.selected) - EXPOSED}
    assert not unknown


def test_a_query_that_is_none_would_be_noticed() -> None:
    import promql_parser

    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse("sum(rate(x[5m])")
    with pytest.raises(ValueError, match="expected type matrix"):
        promql_parser.parse("rate(x)")


def test_the_dashboard_shows_what_an_operator_asks(operator_queries: list[Any]) -> None:
    shown = set().union(*(set(query.selected) for query in operator_queries))
    assert shown >= {
        "cbpt_alarm_total",
        "cbpt_images_total",
        "nv_inference_count",
        "nv_inference_exec_count",
        "nv_inference_pending_request_count",
        "nv_inference_queue_duration_us",
        "nv_inference_queue_summary_us",
        "nv_inference_request_failure",
        "nv_inference_request_success",
        "nv_inference_request_summary_us",
    }


def test_panels_have_a_place_a_unit_and_a_description(dashboard: dict[str, Any]) -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        columns = range(place["x"], place["x"] + place["w"])
        taken = set(itertools.product(columns, range(place["y"], place["y"] + place["h"])))
        assert not cells & taken, panel["title"]
        cells |= taken
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_dashboard_and_its_data_source_are_provisioned(dashboard: dict[str, Any]) -> None:
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    variable = next(v for v in dashboard["templating"]["list"] if v["name"] == "datasource")
    assert variable["current"]["value"] == source["uid"]
    assert variable["query"] == source["type"]
    (provider,) = read("grafana/provisioning/dashboards/cbpt-runtime.yaml")["providers"]
    grafana = read("compose.yaml")["services"]["grafana"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == (
        f"{provider['options']['path']}/cbpt-runtime.json"
    )


def test_prometheus_reads_the_rules_and_asks_the_service_on_its_metrics_port() -> None:
    config, services = read("prometheus/prometheus.yml"), read("compose.yaml")["services"]
    (name,) = config["rule_files"]
    assert (SERVER / "prometheus" / name).is_file()
    (job,) = config["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in services
    assert port in next(
        line for line in (SERVER / "Dockerfile").read_text().splitlines() if line.startswith("EXPOSE")
    )
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"].split("://")[1].split(":")[0] in services


def test_alerts_say_how_bad_it_is_and_what_to_do() -> None:
    rules = [rule for group in read("prometheus/alerts.yml")["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 5
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}


def test_alert_texts_use_labels_their_query_keeps() -> None:
    import promql_parser

    for rule in (rule for group in read("prometheus/alerts.yml")["groups"] for rule in group["rules"]):
        text = json.dumps(rule["annotations"])
        named = {word.split()[0] for word in text.split("$labels.")[1:]}
        expression = promql_parser.parse(rule["expr"])
        while isinstance(expression, promql_parser.BinaryExpr):
            expression = expression.lhs
        kept = (
            set(expression.modifier.labels)
            if isinstance(expression, promql_parser.AggregateExpr)
            else {"job", "instance"}
        )
        assert named <= kept, rule["alert"]


def test_the_operators_rules_are_those_of_the_file() -> None:
    resource = read("kubernetes/monitoring/prometheusrule.yaml")
    assert resource["spec"] == read("prometheus/alerts.yml")
