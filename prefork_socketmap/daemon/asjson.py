"""The status as JSON. The keys are documented in prefork-socketmap(8), and stay."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from prefork_socketmap.daemon.backends import BackendReport
from prefork_socketmap.daemon.report import Counters, Finding, MapReport, Report, WorkerReport
from prefork_socketmap.prefork.counters import BOUNDS


def render(finding: Finding) -> str:
    """Return one JSON object."""
    document: dict[str, Any] = {"running": finding.runs}
    if finding.pid:
        document["pid"] = finding.pid
    if finding.problem:
        document["problem"] = finding.problem
    if finding.report:
        document |= _report(finding.report)
    return json.dumps(document, indent=2) + "\n"


def _report(report: Report) -> dict[str, Any]:
    return {
        "started": report.started,
        "generation": report.generation,
        **{group: dict(numbers) for group, numbers in report.events.items()},
        "connections": {"active": report.active, "silent": report.silent, **report.events["connections"]},
        "workers": {**report.events["workers"], "states": report.count_states()},
        "maps": {each.name: _map(each) for each in report.maps},
        "unknown_maps": list(report.unknown),
        "backends": {each.name: _backend(each) for each in report.backends},
        "slots": [_slot(each) for each in report.workers],
    }


def _map(each: MapReport) -> dict[str, Any]:
    counters, cache = each.counters, each.cache
    return {
        **_counters(counters),
        "p50_seconds": counters.quantile(0.5),
        "p90_seconds": counters.quantile(0.9),
        "p99_seconds": counters.quantile(0.99),
        "buckets": [
            {"below_seconds": bound, "lookups": number}
            for bound, number in zip((*BOUNDS, None), counters.buckets, strict=True)
            if number
        ],
        "deaths": each.deaths,
        "cache": asdict(cache) if cache.exists else None,
        "flaws": dict(each.flaws) if any(each.flaws.values()) else None,
    }


def _backend(each: BackendReport) -> dict[str, Any]:
    return {"up": each.is_up, "down_seconds": each.down_seconds, "connections": each.connections}


def _slot(each: WorkerReport) -> dict[str, Any]:
    return {
        "slot": each.slot,
        "pid": each.pid,
        "generation": each.generation,
        "state": each.state,
        "since": each.since,
        "map": each.map,
        "lookup_seconds": each.lookup_seconds,
        "client": each.client,
        **_counters(each.counters),
    }


def _counters(counters: Counters) -> dict[str, Any]:
    return {
        "lookups": counters.jobs,
        "replies": counters.replies,
        "total_seconds": counters.seconds,
        "mean_seconds": counters.mean,
        "worst_seconds": counters.worst if counters.jobs else None,
    }
