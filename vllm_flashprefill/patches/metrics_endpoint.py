"""Shows FlashPrefill's counters on the ``/metrics`` that ``vllm serve`` answers.

Target: ``prometheus_client.REGISTRY`` and ``prometheus_client.multiprocess.MultiProcessCollector.collect``.
Why: one API server serves the first. Several (``PROMETHEUS_MULTIPROC_DIR`` is set) serve registries that hold a
MultiProcessCollector alone, made anew for each scrape, so that only its class can be extended.
How: a collector that sums the counters of all processes when it is scraped, so each API server answers the same.
Can go: once vLLM has a place for the metrics of its plugins.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_flashprefill.counters import Stats, read_stats
from vllm_flashprefill.patches import undo
from vllm_flashprefill.routing import DenseReason

PREFIX = "vllm:flashprefill_"

COUNTERS = {
    "sparse_tokens": "Prefill tokens attended sparsely, counted in each attention layer of each worker.",
    "kept_blocks": "Key blocks that sparse queries attended to, over query blocks, heads and layers.",
    "visible_blocks": "Key blocks that the same queries could have attended to.",
    "selection_seconds": "Seconds in choosing key blocks, summed over workers; on a GPU an estimate from some layers.",
    "attention_seconds": "Seconds in attention over kept blocks, summed over workers; on a GPU an estimate as above.",
}
DENSE_TOKENS = "Tokens that took vLLM's own attention, by reason, counted in each attention layer of each worker."
DENSITY = "Kept key blocks over visible ones since the server started, 0 to 1; absent until a prefill was sparse."


class StatsCollector:
    """What Prometheus gets of `read_stats`. Has no `_name`, by which vLLM finds and unregisters its own metrics."""

    def describe(self) -> Iterator[Metric]:
        return _metrics(Stats())

    def collect(self) -> Iterator[Metric]:
        return _metrics(read_stats())


def show() -> None:
    """Add the counters to the registries of this process, until `revert`."""
    collector = StatsCollector()

    def add_ours(original: Any) -> Any:
        @functools.wraps(original)
        def collect(self: MultiProcessCollector) -> Iterator[Metric]:
            yield from original(self)
            yield from collector.collect()

        return collect

    def remove() -> None:
        with contextlib.suppress(KeyError):
            REGISTRY.unregister(collector)

    REGISTRY.register(collector)
    undo.on_revert(remove)
    undo.wrap(MultiProcessCollector, "collect", add_ours)


def _metrics(stats: Stats) -> Iterator[Metric]:
    for name, meaning in COUNTERS.items():
        yield CounterMetricFamily(PREFIX + name, meaning, value=getattr(stats, name))
    dense = CounterMetricFamily(PREFIX + "dense_tokens", DENSE_TOKENS, labels=["reason"])
    # All reasons: the rate of a series that begins above 0 would leave out what came first.
    for reason in DenseReason:
        dense.add_metric([reason.value], stats.dense_tokens.get(reason.value, 0))
    yield dense
    density = GaugeMetricFamily(PREFIX + "density", DENSITY)
    if stats.density is not None:
        density.add_metric([], stats.density)
    yield density
