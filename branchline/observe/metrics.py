"""Metrics of one process, in a registry of its own: declared once, read from the process's state at each scrape.

Each kind of process declares its families and reads them into a `Sheet`. What can't be read off is observed where it
happens, by a histogram that is handed in: durations, mostly.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

#: Bounds in seconds: of what a request waits for or takes, and of the time between two tokens.
REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 600.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass(frozen=True, slots=True)
class Family:
    """A metric's name, with `_total` if it is a counter's; its type, what it says, and its labels."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.name.endswith("_total") == (self.kind == "counter"), self.name

    def empty(self) -> Metric:
        """Without samples."""
        return Metric(self.name.removesuffix("_total"), self.help, self.kind)


BUILD = Family("branchline_build_info", "gauge", "Always 1; the labels say what runs.", ("role", "version"))


class Sheet:
    """The families of one scrape, which are to be filled."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._metrics = {family: family.empty() for family in families}

    @property
    def metrics(self) -> Iterable[Metric]:
        return self._metrics.values()

    def put(self, family: Family, value: float, *labels: str) -> None:
        """A counter's or gauge's value. `labels` in the family's order."""
        name = family.name
        self._metrics[family].add_sample(name, dict(zip(family.labels, labels, strict=True)), float(value))

    def put_each(self, family: Family, values: Mapping[str, float]) -> None:
        """Values by the family's one label."""
        for label, value in values.items():
            self.put(family, value, label)

    def put_histogram(self, family: Family, counts: Sequence[int], total: float) -> None:
        """`counts[n]` observations of the whole number n + 1, `total` their sum; each number is a bucket."""
        metric, seen = self._metrics[family], 0
        for number, count in enumerate(counts, 1):
            seen += count
            metric.add_sample(f"{family.name}_bucket", {"le": f"{number}.0"}, float(seen))
        metric.add_sample(f"{family.name}_bucket", {"le": "+Inf"}, float(seen))
        metric.add_sample(f"{family.name}_count", {}, float(seen))
        metric.add_sample(f"{family.name}_sum", {}, float(total))


class StateCollector(Collector):
    """Reads a process's state when it is scraped, on the thread that scrapes: the state's own."""

    def __init__(
        self,
        families: Sequence[Family],
        read: Callable[[Sheet], None],
        histograms: Mapping[Family, Histogram] | None = None,
    ) -> None:
        """`read` fills every family but those of the `histograms`."""
        self._families = families
        self._read = read
        self._histograms = histograms or {}

    def describe(self) -> list[Metric]:
        return [family.empty() for family in (*self._families, *self._histograms)]

    def collect(self) -> Iterable[Metric]:
        sheet = Sheet(self._families)
        self._read(sheet)
        yield from sheet.metrics
        for histogram in self._histograms.values():
            for metric in histogram.collect():
                # When it was made is of no use, and Prometheus's text format makes a metric of its own of it.
                metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
                yield metric


def histogram(family: Family, bounds: Sequence[float]) -> Histogram:
    """In no registry; `observe` may be called from any thread."""
    assert family.kind == "histogram"
    return Histogram(family.name, family.help, family.labels, buckets=bounds, registry=None)


def registry_of(role: str, *collectors: Collector) -> CollectorRegistry:
    """A registry with a process's own metrics, those of every process (`process_*`), and what runs."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    registry.register(StateCollector((BUILD,), lambda sheet: sheet.put(BUILD, 1, role, version())))
    ProcessCollector(registry=registry)
    return registry


def version() -> str:
    """Of this program."""
    try:
        return importlib.metadata.version("branchline")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0+source"
