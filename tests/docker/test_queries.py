"""What the dashboard, the autoscaler and its adapter ask for is what the server exposes, by name and by label."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from service.errors import ServiceError
from service.metrics import Metrics
from tests.docker.test_image import DOCKER

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
FROM_PROMETHEUS = {"job", "instance", "namespace", "pod"}


def exposed() -> dict[str, set[str]]:
    """The labels of every series, by its name."""
    series = {"up": FROM_PROMETHEUS}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            for suffix in SUFFIXES[family.type]:
                labels = {*metric._labelnames, *FROM_PROMETHEUS, *({"le"} if suffix == "_bucket" else ())}
                series[family.name + suffix] = labels
    return series


SERIES = exposed()


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DOCKER / "grafana/dashboards/hbll.json").read_text())
    return loaded


def adapter_rule() -> dict[str, Any]:
    (rule,) = yaml.safe_load((DOCKER / "kubernetes/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    return rule


def adapter_query() -> str:
    """The rule's query as the adapter fills it in for an autoscaler."""
    rule = adapter_rule()
    series = rule["seriesQuery"].split("{")[0]
    filled = {"Series": series, "LabelMatchers": 'namespace="hbll",pod=~"hbll-1|hbll-2"', "GroupBy": "pod"}
    return re.sub(r"<<\.(\w+)>>", lambda found: filled[found[1]], rule["metricsQuery"])


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def queries() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield f"{panel['title']}, {target['legendFormat']}", target["expr"].replace("$__rate_interval", "1m")
    for variable in dashboard()["templating"]["list"]:
        asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
        assert asked is not None
        yield f"variable {variable['name']}", f"sum by ({asked[2]}) ({asked[1]})"
    for rule in alerts():
        yield f"alert {rule['alert']}", rule["expr"]
    yield "adapter, series", adapter_rule()["seriesQuery"]
    yield "adapter, metric", adapter_query()


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector in a parsed query."""
    match node:
        case promql_parser.VectorSelector():
            yield node
        case promql_parser.MatrixSelector():
            yield from selectors(node.vector_selector)
        case promql_parser.BinaryExpr():
            yield from selectors(node.lhs)
            yield from selectors(node.rhs)
        case promql_parser.Call():
            for argument in node.args:
                yield from selectors(argument)
        case promql_parser.AggregateExpr() | promql_parser.ParenExpr() | promql_parser.UnaryExpr():
            yield from selectors(node.expr)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            pass
        case _:
            raise AssertionError(f"no query of ours has a {type(node).__name__} yet")


def groupings(node: Any) -> Iterator[tuple[Any, list[str]]]:
    """Every aggregation in a parsed query, with the labels that it keeps."""
    match node:
        case promql_parser.AggregateExpr():
            yield node.expr, list(node.modifier.labels) if node.modifier else []
            yield from groupings(node.expr)
        case promql_parser.BinaryExpr():
            yield from groupings(node.lhs)
            yield from groupings(node.rhs)
        case promql_parser.Call():
            for argument in node.args:
                yield from groupings(argument)
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr():
            yield from groupings(node.expr)


@pytest.mark.parametrize("query", [pytest.param(query, id=name) for name, query in queries()])
def test_every_query_asks_for_series_and_labels_that_exist(query: str) -> None:
    tree = promql_parser.parse(query)
    found = list(selectors(tree))
    assert found
    for selector in found:
        assert selector.name in SERIES
        assert {matcher.name for matcher in selector.matchers.matchers} <= SERIES[selector.name]
    for inner, labels in groupings(tree):
        for selector in selectors(inner):
            assert set(labels) <= SERIES[selector.name]


def test_the_check_sees_a_metric_and_a_label_that_do_not_exist() -> None:
    for wrong in ("rate(hbll_request_total[1m])", "sum by (depht) (hbll_answers_total)", 'hbll_ready{model="a"}'):
        with pytest.raises(AssertionError):
            test_every_query_asks_for_series_and_labels_that_exist(wrong)


def test_legends_name_labels_that_their_query_keeps() -> None:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            kept = {
                label
                for _, labels in groupings(promql_parser.parse(target["expr"].replace("$__rate_interval", "1m")))
                for label in labels
            }
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]


def test_alerts_see_a_server_that_is_gone_and_the_first_event_of_a_series() -> None:
    """Bugs found: of a server that does not answer there is no hbll_ready, and a series that begins at 1 does not increase."""
    assert any(selector.name == "up" for rule in alerts() for selector in selectors(promql_parser.parse(rule["expr"])))
    for rule in alerts():
        for increased in re.findall(r"increase\((hbll_\w+{[^}]*})", rule["expr"]):
            assert re.search(re.escape(increased) + r"\s+unless " + re.escape(increased) + " offset 15m", rule["expr"])


def test_alerts_say_what_to_do_and_name_labels_and_codes_that_there_are() -> None:
    codes = {kind.code for kind in kinds_of(ServiceError)} | {"internal"}
    for rule in alerts():
        tree = promql_parser.parse(rule["expr"])
        kept = {label for _, labels in groupings(tree) for label in labels}
        if not kept:
            kept = set.intersection(*(SERIES[selector.name] for selector in selectors(tree)))
        told = rule["annotations"]["summary"] + rule["annotations"]["description"]
        assert set(re.findall(r"{{ \$labels\.(\w+) }}", told)) <= kept, rule["alert"]
        for selector in selectors(tree):
            for matcher in selector.matchers.matchers:
                if matcher.name == "code":
                    assert set(matcher.value.split("|")) <= codes


def kinds_of(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for each in kind.__subclasses__():
        yield each
        yield from kinds_of(each)


def test_panels_use_the_provisioned_datasource_and_do_not_overlap() -> None:
    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    cells: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        place = panel["gridPos"]
        mine = {
            (x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])
        }
        assert not mine & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= mine


def test_prometheus_scrapes_the_service_that_compose_starts() -> None:
    (job,) = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())["rule_files"] == ["alerts.yml"]
    (target,) = job["static_configs"][0]["targets"]
    assert target.split(":")[0] in services
    assert target.endswith(":8000")


def test_the_autoscaler_asks_for_the_metric_that_the_adapter_makes() -> None:
    (metric,) = yaml.safe_load((DOCKER / "kubernetes/autoscaler.yaml").read_text())["spec"]["metrics"]
    rule = adapter_rule()
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert re.fullmatch(rule["name"]["matches"], rule["seriesQuery"].split("{")[0])
