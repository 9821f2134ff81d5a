"""The Grafana dashboard asks for metrics that are served."""

import json
import re

from prometheus_client import CollectorRegistry

from tests.support import ROOT
from vllm_flashprefill.patches.metrics_endpoint import PREFIX, StatsCollector

DASHBOARD = json.loads((ROOT / "examples" / "grafana_dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = {variable["name"]: variable["query"] for variable in DASHBOARD["templating"]["list"]}
# vLLM's own, in every supported version.
OF_VLLM = {"vllm:time_to_first_token_seconds_bucket"}


def served():
    """The names of the samples, and of the label that one of them has."""
    registry = CollectorRegistry()
    registry.register(StatsCollector())
    metrics = list(registry.collect())
    # The gauge has no sample until a prefill was sparse.
    return {sample.name for metric in metrics for sample in metric.samples} | {PREFIX + "density"}


def test_each_metric_is_served():
    asked = {name for query in [*QUERIES, *VARIABLES.values()] for name in re.findall(r"vllm:\w+", query)}
    assert asked - OF_VLLM <= served()
    assert served() <= asked, "each metric has its place"


def test_labels_and_variables_are_known():
    for query in QUERIES:
        assert set(re.findall(r"\$(\w+)", query)) <= VARIABLES.keys() | {"__rate_interval"}
        assert set(re.findall(r"(\w+)=~?\"", query)) == {"instance"}, query
        assert set(",".join(re.findall(r"by \(([^)]*)\)", query)).replace(" ", "").split(",")) <= {
            "instance",
            "reason",
            "le",
            "",
        }
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")


def test_panels_have_what_the_schema_requires():
    for panel in DASHBOARD["panels"]:
        assert {"type", "title", "gridPos", "datasource", "targets"} <= panel.keys()
        assert {"defaults", "overrides"} <= panel["fieldConfig"].keys()


def test_panels_lie_beside_each_other():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24 and not cells & taken
        taken |= cells
    sources = {name["name"] for name in DASHBOARD["__inputs"]}
    assert all(panel["datasource"]["uid"].strip("${}") in sources for panel in DASHBOARD["panels"])
