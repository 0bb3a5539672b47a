"""What a program pays for importing the library, above the bare interpreter: time and memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from time import perf_counter

from tests.bench.report import table

PROGRAMS = {
    "a server": "from prefork_socketmap import Config, Reply, Server",
    "a client": "from prefork_socketmap.client import SocketmapClient",
    "the codec": "from prefork_socketmap.socketmap.netstring import Decoder",
    "all that serves": "import prefork_socketmap.server, prefork_socketmap.foreground",
}
_BARE = "pass"
_MEMORY = "; print(next(line.split()[1] for line in open('/proc/self/smaps_rollup') if line.startswith('Rss:')))"


def run(rounds: int) -> str:
    """Measure in alternating rounds; return the report, with the medians of what is more than the interpreter's."""
    times: dict[str, list[float]] = {program: [] for program in (_BARE, *PROGRAMS.values())}
    for number in range(rounds + 1):
        for program, found in times.items():
            begun = perf_counter()
            _run(program)
            if number:  # the first round compiles, and fills the page cache
                found.append(perf_counter() - begun)
    return table(
        [["import", "ms", "MiB"], *([name, *_figures(program, times)] for name, program in PROGRAMS.items())]
    )


def _figures(program: str, times: dict[str, list[float]]) -> Sequence[str]:
    seconds = statistics.median(mine - bare for mine, bare in zip(times[program], times[_BARE], strict=True))
    return [f"{seconds * 1000:.1f}", f"{memory(program) / 1024**2:.1f}"]


def memory(program: str) -> int:
    """Return how many bytes more than the bare interpreter a program has in memory."""
    return 1024 * (int(_run(program + _MEMORY)) - int(_run(_BARE + _MEMORY)))


def _run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
