"""The status in the text format of Prometheus, version 0.0.4: for ``status --prometheus`` and the metrics process.

Names follow its conventions: base units, ``_total`` for what only grows, a histogram for times. What there is, is
told as ``Family`` objects; how it is written is up to whoever serves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from prefork_socketmap.daemon.backends import BackendReport
from prefork_socketmap.daemon.report import Finding, MapReport, Report
from prefork_socketmap.prefork.counters import BOUNDS, SERVER_COUNTERS

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Value = int | float
Labels = Mapping[str, str]


class Sample(NamedTuple):
    """A value; ``suffix`` is what stands behind the family's name."""

    suffix: str
    labels: Labels
    value: Value


class Family(NamedTuple):
    """A metric: ``kind`` is "gauge", "counter" or "histogram"."""

    name: str
    kind: str
    what: str
    samples: Sequence[Sample]


def render(finding: Finding) -> str:
    """Return the metrics; ``prefork_socketmap_up`` alone when there is no more to tell."""
    return "".join(f"{line}\n" for family in families(finding) for line in _lines(family))


def families(finding: Finding) -> Iterator[Family]:
    """Iterate over the metrics."""
    yield from _metric("up", "gauge", "Whether the server runs.", int(finding.runs))
    if finding.report:
        yield from _report(finding.report)
        yield from _maps(finding.report)
        yield from _backends({each.name: each for each in finding.report.backends})


def _lines(family: Family) -> Iterator[str]:
    yield f"# HELP {family.name} {family.what}"
    yield f"# TYPE {family.name} {family.kind}"
    for suffix, labels, value in family.samples:
        inside = ",".join(f'{label}="{text.translate(_ESCAPES)}"' for label, text in labels.items())
        yield f"{family.name}{suffix}" + (f"{{{inside}}}" if inside else "") + f" {value}"


def _report(report: Report) -> Iterator[Family]:
    yield from _metric("start_time_seconds", "gauge", "When the server started, since the epoch.", report.started)
    yield from _metric("generation", "gauge", "The generation of workers that serves.", report.generation)
    connections = {"active": report.active, "silent": report.silent}
    yield from _metric("connections", "gauge", "Connections now.", connections, "state")
    yield from _metric("workers", "gauge", "Workers now.", report.count_states(), "state")
    for group, name, what in SERVER_COUNTERS:
        yield from _metric(f"{group}_{name}_total", "counter", what, report.events[group][name])


def _maps(report: Report) -> Iterator[Family]:
    replies = [
        Sample("", {"map": each.name, "status": status}, number)
        for each in report.maps
        for status, number in each.counters.replies.items()
    ]
    yield _family("replies_total", "counter", "Replies to lookups.", replies)
    times = [sample for each in report.maps for sample in _histogram(each)]
    yield _family("lookup_duration_seconds", "histogram", "How long lookups took.", times)
    worst = {each.name: each.counters.worst for each in report.maps}
    yield from _metric("lookup_duration_worst_seconds", "gauge", "How long the longest lookup took.", worst, "map")
    flaws = [
        Sample("", {"map": each.name, "flaw": flaw}, number)
        for each in report.maps
        if any(each.flaws.values())
        for flaw, number in each.flaws.items()
    ]
    yield _family("flaws_total", "counter", "Addresses of the type srs with something wrong.", flaws)
    deaths = {each.name: each.deaths for each in report.maps}
    yield from _metric("worker_deaths_total", "counter", "Workers that died in a lookup.", deaths, "map")
    yield from _caches({each.name: each for each in report.maps if each.cache.exists})


def _backends(backends: Mapping[str, BackendReport]) -> Iterator[Family]:
    if backends:
        up = {name: int(each.is_up) for name, each in backends.items()}
        yield from _metric("backend_up", "gauge", "Whether lookups are sent to the backend.", up, "backend")
        number = {name: each.connections for name, each in backends.items()}
        yield from _metric("backend_connections", "gauge", "Connections to the backend now.", number, "backend")


def _histogram(each: MapReport) -> Iterator[Sample]:
    counters = each.counters
    bounds = [*(f"{bound:.6f}" for bound in BOUNDS), "+Inf"]
    for bound, number in zip(bounds, accumulate(counters.buckets), strict=True):
        yield Sample("_bucket", {"map": each.name, "le": bound}, number)
    yield Sample("_sum", {"map": each.name}, counters.seconds)
    yield Sample("_count", {"map": each.name}, sum(counters.buckets))


def _caches(maps: Mapping[str, MapReport]) -> Iterator[Family]:
    for name, kind, what in (
        ("hits", "counter", "Lookups that a remembered answer has spared."),
        ("misses", "counter", "Lookups that found no fresh answer remembered."),
        ("stale", "counter", "Failed lookups in whose place an old answer was given."),
        ("entries", "gauge", "Answers remembered, in all workers together."),
    ):
        values = {each: getattr(report.cache, name) for each, report in maps.items()}
        yield from _metric(f"cache_{name}" + ("_total" if kind == "counter" else ""), kind, what, values, "map")


def _metric(
    name: str, kind: str, what: str, values: Value | Mapping[str, Value], label: str | None = None
) -> Iterator[Family]:
    """Yield a metric with one value, or with one for each value of *label*."""
    if not isinstance(values, Mapping):
        values = {"": values}
    yield _family(
        name, kind, what, [Sample("", {label: key} if label else {}, value) for key, value in values.items()]
    )


def _family(name: str, kind: str, what: str, samples: Sequence[Sample]) -> Family:
    return Family(f"prefork_socketmap_{name}", kind, what, samples)
