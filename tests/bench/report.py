"""Figures of one run, and the report: medians over the rounds, as figures and as ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.load import Outcome


@dataclass(frozen=True)
class Figures:
    """What one contender achieved in one round."""

    lookups_per_second: float
    p50: float
    p99: float
    p99_9: float
    """Latencies, in microseconds."""
    cpu_per_lookup: float
    """CPU time of all the server's processes, in microseconds."""
    pss: float
    """Memory of all the server's processes, in MiB."""
    fairness: float
    """What the slowest connection got, as a share of what the median one got."""
    failures: int
    """Wrong and late answers."""
    hangups: int

    @classmethod
    def of(cls, outcome: Outcome, cpu: float, pss: int) -> Figures:
        """Compute them from what the clients saw and what the server used (seconds, bytes)."""
        waited = sorted(outcome.latencies) or [0]
        answers = len(outcome.latencies)
        return cls(
            lookups_per_second=answers / outcome.elapsed,
            p50=percentile(waited, 0.5),
            p99=percentile(waited, 0.99),
            p99_9=percentile(waited, 0.999),
            cpu_per_lookup=cpu * 1e6 / max(answers, 1),
            pss=pss / 2**20,
            fairness=min(outcome.per_connection) / max(statistics.median(outcome.per_connection), 1),
            failures=outcome.wrong + outcome.late,
            hangups=outcome.hangups,
        )


def percentile(ordered: Sequence[int], share: float) -> float:
    """Return a percentile of latencies in ns, sorted, in us."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] / 1000


# Heading, how to read it from the figures, how to print it; and whether a ratio of it says something.
_COLUMNS: Sequence[tuple[str, Callable[[Figures], float], str, bool]] = [
    ("lookups/s", lambda figures: figures.lookups_per_second, "{:.0f}", True),
    ("p50 us", lambda figures: figures.p50, "{:.0f}", True),
    ("p99 us", lambda figures: figures.p99, "{:.0f}", True),
    ("p99.9 us", lambda figures: figures.p99_9, "{:.0f}", True),
    ("CPU us/lookup", lambda figures: figures.cpu_per_lookup, "{:.1f}", True),
    ("PSS MiB", lambda figures: figures.pss, "{:.1f}", True),
    ("slowest/median", lambda figures: figures.fairness, "{:.2f}", False),
    ("failed", lambda figures: figures.failures, "{:.0f}", False),
    ("hung up", lambda figures: figures.hangups, "{:.0f}", False),
]


def render(title: str, rounds: Mapping[str, Sequence[Figures]]) -> str:
    """Return the report of one load: a line per contender, and a line for each but the first in relation to it."""
    rows = [[title, *(heading for heading, *_ in _COLUMNS)]]
    rows += [[name, *_figures(figures)] for name, figures in rounds.items()]
    (first, reference), *others = rounds.items()
    rows += [[f"{first} / {name}", *_ratios(reference, figures)] for name, figures in others]
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return *rows* as lines with aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def _figures(figures: Sequence[Figures]) -> list[str]:
    return [form.format(statistics.median(map(read, figures))) for _, read, form, _ in _COLUMNS]


def _ratios(reference: Sequence[Figures], others: Sequence[Figures]) -> list[str]:
    """Return the median of the rounds' ratios: what disturbs the machine for a while disturbs both sides of one."""
    cells = []
    for _, read, _, comparable in _COLUMNS:
        pairs = [(read(mine), read(other)) for mine, other in zip(reference, others, strict=True)]
        ratios = [mine / other for mine, other in pairs if other]
        cells.append(f"{statistics.median(ratios):.2f} x" if comparable and ratios else "")
    return cells


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([row[0].ljust(len(name)), *cells]).rstrip()
