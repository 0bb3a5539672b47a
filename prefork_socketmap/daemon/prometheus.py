"""The status in the text format of Prometheus, version 0.0.4, for a node exporter's textfile collector or the like.

Names follow its conventions: base units, ``_total`` for what only grows, a histogram for times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prefork_socketmap.daemon.backends import BackendReport
from prefork_socketmap.daemon.report import Finding, MapReport, Report
from prefork_socketmap.prefork.counters import BOUNDS, SERVER_COUNTERS

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Value = int | float
Labels = Mapping[str, str]


def render(finding: Finding) -> str:
    """Return the metrics; ``prefork_socketmap_up`` alone when there is no more to tell."""
    lines = [*_metric("up", "gauge", "Whether the server runs.", int(finding.runs))]
    if finding.report:
        lines += _report(finding.report)
        lines += _maps(finding.report)
        lines += _backends({each.name: each for each in finding.report.backends})
    return "".join(f"{line}\n" for line in lines)


def _report(report: Report) -> Iterator[str]:
    yield from _metric("start_time_seconds", "gauge", "When the server started, since the epoch.", report.started)
    yield from _metric("generation", "gauge", "The generation of workers that serves.", report.generation)
    connections = {"active": report.active, "silent": report.silent}
    yield from _metric("connections", "gauge", "Connections now.", connections, "state")
    yield from _metric("workers", "gauge", "Workers now.", report.count_states(), "state")
    for group, name, what in SERVER_COUNTERS:
        yield from _metric(f"{group}_{name}_total", "counter", what, report.events[group][name])


def _maps(report: Report) -> Iterator[str]:
    name = "replies_total"
    yield from _head(name, "counter", "Replies to lookups.")
    for each in report.maps:
        for status, number in each.counters.replies.items():
            yield _sample(name, {"map": each.name, "status": status}, number)
    name = "lookup_duration_seconds"
    yield from _head(name, "histogram", "How long lookups took.")
    for each in report.maps:
        yield from _histogram(name, each)
    worst = {each.name: each.counters.worst for each in report.maps}
    yield from _metric("lookup_duration_worst_seconds", "gauge", "How long the longest lookup took.", worst, "map")
    flawed = [each for each in report.maps if any(each.flaws.values())]
    yield from _head("flaws_total", "counter", "Addresses of the type srs with something wrong.")
    for each in flawed:
        for flaw, number in each.flaws.items():
            yield _sample("flaws_total", {"map": each.name, "flaw": flaw}, number)
    yield from _caches({each.name: each for each in report.maps if each.cache.exists})


def _backends(backends: Mapping[str, BackendReport]) -> Iterator[str]:
    if backends:
        up = {name: int(each.is_up) for name, each in backends.items()}
        yield from _metric("backend_up", "gauge", "Whether lookups are sent to the backend.", up, "backend")
        number = {name: each.connections for name, each in backends.items()}
        yield from _metric("backend_connections", "gauge", "Connections to the backend now.", number, "backend")


def _histogram(name: str, each: MapReport) -> Iterator[str]:
    counters = each.counters
    bounds = [*(f"{bound:.6f}" for bound in BOUNDS), "+Inf"]
    for bound, number in zip(bounds, accumulate(counters.buckets), strict=True):
        yield _sample(f"{name}_bucket", {"map": each.name, "le": bound}, number)
    yield _sample(f"{name}_sum", {"map": each.name}, counters.seconds)
    yield _sample(f"{name}_count", {"map": each.name}, sum(counters.buckets))


def _caches(maps: Mapping[str, MapReport]) -> Iterator[str]:
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
) -> Iterator[str]:
    """Yield a metric with one value, or with one for each value of *label*."""
    yield from _head(name, kind, what)
    if not isinstance(values, Mapping):
        values = {"": values}
    for key, value in values.items():
        yield _sample(name, {label: key} if label else {}, value)


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP prefork_socketmap_{name} {what}"
    yield f"# TYPE prefork_socketmap_{name} {kind}"


def _sample(name: str, labels: Labels, value: Value) -> str:
    inside = ",".join(f'{label}="{text.translate(_ESCAPES)}"' for label, text in labels.items())
    return f"prefork_socketmap_{name}" + (f"{{{inside}}}" if inside else "") + f" {value}"
