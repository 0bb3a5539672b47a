"""The status for people: a summary, a table of the maps, of the backends, of the workers."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from prefork_socketmap.daemon.backends import BackendReport
from prefork_socketmap.daemon.report import Counters, Finding, MapReport, Report, WorkerReport
from prefork_socketmap.socketmap.messages import printable

_QUANTILES = (0.5, 0.9, 0.99)
_GAP = "  "


def render(finding: Finding) -> str:
    """Return the lines, cut at the width of the terminal, if it is one."""
    lines = [finding.line, *_lines(finding.report)] if finding.report else [finding.line]
    if finding.problem:
        lines.insert(2, finding.problem)
    return _fit(lines)


def _fit(lines: list[str]) -> str:
    """Return *lines*, cut at the width of the terminal, if it is one."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        lines = [line[:width] for line in lines]
    return "".join(f"{line}\n" for line in lines)


def render_rates(finding: Finding, before: Report | None, seconds: float) -> str:
    """Return what has happened since *before*, *seconds* ago, for a screen that somebody leaves open.

    None: since the server started.
    """
    report = finding.report
    if report is None:
        return render(finding)
    if before is None or before.started != report.started:
        before, seconds, period = None, max(time.time() - report.started, 1.0), "since the start"
    else:
        period = f"in the last {_duration(seconds)}"
    lines = [finding.line, *([finding.problem] if finding.problem else []), *_rates(report, before, seconds, period)]
    return _fit(lines)


def _rates(report: Report, before: Report | None, seconds: float, period: str) -> Iterator[str]:
    former = {each.name: each.counters for each in before.maps} if before else {}
    maps = [(each, each.counters.since(former.get(each.name, Counters()))) for each in report.maps]
    lookups, failures = (sum(getattr(each, name) for _, each in maps) for name in ("jobs", "failures"))
    yield f"{period}: {_rate(lookups, seconds)} lookups/s, {_rate(failures, seconds)} failed/s"
    states = ", ".join(f"{count} {state}" for state, count in report.count_states().items() if count)
    yield f"generation {report.generation}, workers: {states}"
    yield f"connections: {report.active} active, {report.silent} silent"
    events = [
        f"{number} {group} {name.replace('_', ' ')}"
        for group, names in report.events.items()
        for name, number in _since(names, before.events[group] if before else {}).items()
        if number
    ]
    yield f"{period}: {', '.join(events) or 'no event'}"
    yield from _unknown(report)
    yield ""
    yield from _table([_rate_row(each, new, seconds) for each, new in maps], left=("map",))
    yield from _backends(report)
    busy = [each for each in report.workers if each.map]
    if busy:
        yield ""
        yield from _table([_busy_row(each) for each in busy], left=("map", "client"))


def _since(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: number - before.get(name, 0) for name, number in now.items()}


def _rate_row(each: MapReport, new: Counters, seconds: float) -> Mapping[str, str]:
    cache = each.cache
    asked = cache.hits + cache.misses
    return {
        "map": printable(each.name),
        "lookups/s": _rate(new.jobs, seconds),
        **{f"{word}/s": _rate(number, seconds) if number else "" for word, number in new.replies.items()},
        **{f"p{round(share * 100)}": _duration(new.quantile(share)) for share in _QUANTILES},
        "worst ever": _duration(each.counters.worst if each.counters.jobs else None),
        "cached": f"{100 * cache.hits / asked:.0f}%" if asked else "",
        "deaths": str(each.deaths) if each.deaths else "",
        "lookups ever": str(each.counters.jobs),
    }


def _busy_row(each: WorkerReport) -> Mapping[str, str]:
    return {
        "busy worker": str(each.pid),
        "for": _duration(each.lookup_seconds),
        "map": printable(each.map or ""),
        "client": printable(each.client or ""),
    }


def _rate(number: int, seconds: float) -> str:
    rate = number / seconds
    return f"{rate:.0f}" if rate >= 100 or not rate else f"{rate:.1f}" if rate >= 0.1 else "<0.1"


def _unknown(report: Report) -> Iterator[str]:
    if report.unknown:
        yield f"asked for, but no map: {', '.join(printable(each) for each in report.unknown)}"


def _lines(report: Report) -> Iterator[str]:
    number = len(report.workers)
    states = ", ".join(f"{count} {state}" for state, count in report.count_states().items() if count)
    yield f"generation {report.generation}, {number} worker{'s' if number != 1 else ''}" + (
        f": {states}" if states else ""
    )
    yield f"connections: {report.active} active, {report.silent} silent; {_events(report, 'connections')}"
    yield f"workers: {_events(report, 'workers')}; reloads: {_events(report, 'reloads')}"
    yield from _unknown(report)
    yield ""
    yield from _table([_map_row(each) for each in report.maps], left=("map",))
    yield from _backends(report)
    yield ""
    yield from _table([_worker_row(each) for each in report.workers], left=("state", "map", "client"))


def _events(report: Report, group: str) -> str:
    return ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in report.events[group].items())


def _map_row(each: MapReport) -> Mapping[str, str]:
    counters, cache = each.counters, each.cache
    row = {"map": printable(each.name)} | _counts(counters)
    row |= {f"p{round(share * 100)}": _duration(counters.quantile(share)) for share in _QUANTILES}
    row |= {"worst": _duration(counters.worst if counters.jobs else None)}
    asked = cache.hits + cache.misses
    row["cached"] = f"{100 * cache.hits / asked:.0f}%" if asked else ""
    row["entries"] = str(cache.entries) if cache.exists else ""
    row["stale"] = str(cache.stale) if cache.exists else ""
    row["deaths"] = str(each.deaths) if each.deaths else ""
    return row | {flaw: str(number or "") for flaw, number in each.flaws.items()}


def _backends(report: Report) -> Iterator[str]:
    if report.backends:
        yield ""
        yield from _table([_backend_row(each) for each in report.backends], left=("backend", "state"))


def _backend_row(each: BackendReport) -> Mapping[str, str]:
    return {
        "backend": each.name,
        "state": "up" if each.is_up else "down",
        "for": _duration(each.down_seconds) if each.down_seconds is not None else "",
        "connections": str(each.connections),
    }


def _worker_row(each: WorkerReport) -> Mapping[str, str]:
    counters = each.counters
    asked = each.map and f"{printable(each.map)} ({_duration(each.lookup_seconds)})"
    return {
        "slot": str(each.slot),
        "pid": str(each.pid),
        "gen": str(each.generation),
        "state": each.state,
        "for": _duration(max(time.time() - each.since, 0.0)),
        **_counts(counters),
        "mean": _duration(counters.mean),
        "worst": _duration(counters.worst if counters.jobs else None),
        "map": asked or "",
        "client": printable(each.client or ""),
    }


def _counts(counters: Counters) -> dict[str, str]:
    replies = {word: str(number) for word, number in counters.replies.items()}
    return {"lookups": str(counters.jobs), **replies}


def _table(rows: Sequence[Mapping[str, str]], left: Sequence[str]) -> Iterator[str]:
    """Yield the table's lines. Columns in which nothing stands are left out; those in *left* are aligned left."""
    titles = [title for title in (rows[0] if rows else ()) if any(row[title] for row in rows)]
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in titles}
    for row in ({title: title for title in titles}, *rows) if titles else ():
        cells = (
            row[title].ljust(widths[title]) if title in left else row[title].rjust(widths[title]) for title in titles
        )
        yield _GAP.join(cells).rstrip()


def _duration(seconds: float | None) -> str:
    """Return a time in two or three digits, in the unit that fits."""
    if seconds is None:
        return "-"
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min")):
        if seconds < limit:
            value = seconds * factor
            return f"{value:.1f}{unit}" if value < 10 and unit != "us" else f"{value:.0f}{unit}"
    return f"{seconds / 3600:.0f}h"
