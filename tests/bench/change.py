"""A file of a million lines is replaced under load: how long lookups wait meanwhile, and how long otherwise."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.bench.backends import file
from tests.bench.load import Load, Loaders, Outcome
from tests.bench.maps import daemon
from tests.bench.report import percentile, table

LOAD = Load(8, interval=0.05)
"""Not as fast as they can: then what is measured is who gets the processors."""
LIMITS = {"lookup_timeout": 1, "min_spare": 8, "process_limit": 8}

_HEADINGS = ["late", "p50 us", "p99 us", "p99.9 us", "worst us"]


def run(seconds: float, rounds: int, processes: int) -> str:
    """Measure in alternating rounds, without and with a change; return the report, with the ratios of the rounds."""
    with tempfile.TemporaryDirectory(prefix="socketmap-bench-") as place, file(Path(place)) as backend:
        source = Path(str(backend.table["path"]))
        with daemon(Path(place), backend.table, LIMITS) as server:

            def measure() -> list[float]:
                with Loaders(server.port, LOAD, processes) as loaders:
                    outcome = loaders.run(seconds)
                if outcome.wrong:
                    raise RuntimeError(f"{outcome.wrong} wrong answers")
                return _figures(outcome)

            while measure()[0]:  # warms up: it accepts connections before it has the table
                pass
            resting, changing = [], []
            for _ in range(rounds):
                resting.append(measure())
                shutil.copy(source, source.with_suffix(".new"))
                source.with_suffix(".new").replace(source)
                changing.append(measure())
    ratios = [
        [mine / max(other, 1) for mine, other in zip(*pair, strict=True)]
        for pair in zip(changing, resting, strict=True)
    ]
    return table(
        [
            [str(LOAD), *_HEADINGS],
            ["resting", *_medians(resting, "{:.0f}")],
            ["while the file is read", *_medians(changing, "{:.0f}")],
            ["ratio", *_medians(ratios, "{:.2f} x")],
        ]
    )


def _figures(outcome: Outcome) -> list[float]:
    ordered = sorted(outcome.latencies)
    return [outcome.late, *(percentile(ordered, share) for share in (0.5, 0.99, 0.999)), ordered[-1] / 1000]


def _medians(rounds: Sequence[Sequence[float]], form: str) -> list[str]:
    return [form.format(statistics.median(column)) for column in zip(*rounds, strict=True)]
