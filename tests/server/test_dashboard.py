"""Every query of the Grafana dashboard and of docs/metrics.md, against the metrics port of a live server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
import pytest

from glm_image.supervisor import TritonServer
from server.documents import REPOSITORY_ROOT
from server.kserve import KServeError, grpc_infer
from server.test_metrics import DOCUMENT, Page, page_when

DASHBOARD = json.loads((REPOSITORY_ROOT / "docs" / "grafana_dashboard.json").read_text(encoding="utf-8"))
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"]}
QUERIES = [target["expr"] for panel in PANELS.values() for target in panel["targets"]]
IN_DOCUMENT = re.findall(r"^\| [^|`]+ \| `([^`]+)` \|$", DOCUMENT.split("in PromQL:")[1], re.MULTILINE)
OF_SUMS = ("rate", "irate", "increase")


@pytest.fixture(scope="module")
def page(triton: TritonServer) -> Page:
    """The metrics of a server that has painted and refused."""
    values = {"prompt": "a fox", "height": 32, "width": 32, "num_inference_steps": 1, "output_format": "png"}
    grpc_infer(triton, values)
    with pytest.raises(KServeError):
        grpc_infer(triton, {**values, "height": 0})
    return page_when(triton, lambda page: page["dit_encode_seconds_count"] > 0)


def parsed(query: str) -> Any:
    return promql.parse(query.replace("$__rate_interval", "5m"))


def nodes(expression: Any) -> Iterator[Any]:
    found: list[Any] = []
    promql.walk(expression, found.append)
    yield from found


def selectors(expression: Any) -> list[Any]:
    return [node for node in nodes(expression) if isinstance(node, promql.VectorSelector)]


def matches(matcher: Any, value: str) -> bool:
    if matcher.op == promql.MatchOp.Equal:
        return bool(value == matcher.value)
    if matcher.op == promql.MatchOp.NotEqual:
        return bool(value != matcher.value)
    return (re.fullmatch(matcher.value, value) is not None) == (matcher.op == promql.MatchOp.Re)


def selected(selector: Any, page: Page) -> list[dict[str, str]]:
    """The labels of the samples that a selector finds."""
    return [
        labels
        for labels, _ in page.samples.get(selector.name, [])
        if all(matches(matcher, labels.get(matcher.name, "")) for matcher in selector.matchers.matchers)
    ]


def test_dashboard_has_queries() -> None:
    assert len(QUERIES) >= len(PANELS) >= 15
    assert len(IN_DOCUMENT) == 9


@pytest.mark.parametrize("query", [*QUERIES, *IN_DOCUMENT])
def test_query_matches_samples(page: Page, query: str) -> None:
    expression = parsed(query)
    assert selectors(expression)
    for selector in selectors(expression):
        assert selected(selector, page), f"{selector.name} has no such sample"
    for node in nodes(expression):
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            for selector in selectors(node.expr):
                assert all(set(node.modifier.labels) <= set(labels) for labels in selected(selector, page))
        if isinstance(node, promql.Call) and node.func.name == "histogram_quantile":
            assert all("le" in labels for selector in selectors(node) for labels in selected(selector, page))
        if isinstance(node, promql.Call) and node.func.name in OF_SUMS:
            for selector in selectors(node):
                family = re.sub(r"_(bucket|sum|count)$", "", selector.name)
                kind = page.types.get(selector.name) or page.types[family]
                assert kind == ("counter" if family == selector.name or selector.name in page.types else "histogram")


def test_dashboard_shows_every_metric_of_the_engines(page: Page) -> None:
    shown = {selector.name for query in QUERIES for selector in selectors(parsed(query))}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} | shown
    assert {name for name in page.types if name.startswith("glm_image_")} <= families


@pytest.mark.parametrize("title", PANELS)
def test_panel_is_complete(title: str) -> None:
    panel = PANELS[title]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert panel["fieldConfig"]["defaults"]["unit"]


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in PANELS.values()
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
