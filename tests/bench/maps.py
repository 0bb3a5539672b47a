"""Map types beside their bare drivers: how much of a lookup's CPU time is this server's own."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tests.bench.backends import BACKENDS, Backend, LookUp, keys
from tests.bench.load import Load
from tests.bench.measure import ServerProcess
from tests.bench.report import Figures, table
from tests.bench.servers.table import MAP
from tests.integration.servers.process import free_port

LOAD = Load(8)

_HEADINGS = [
    "lookups/s",
    "p50 us",
    "p99 us",
    "CPU us/lookup",
    "PSS MiB",
    "bare lookups/s",
    "bare CPU us",
    "own share",
]
_BATCH = 100  # lookups between two looks at the clock

Measure = Callable[[ServerProcess, Load], Figures]


class Bare(NamedTuple):
    """What the bare driver achieved in one process."""

    lookups_per_second: float
    cpu_per_lookup: float
    """In microseconds."""


def run(measure: Measure, seconds: float, rounds: int) -> str:
    """Measure every map type and its bare driver in alternating rounds; return the report."""
    rows = [[f"{LOAD}; the bare driver: one process", *_HEADINGS]]
    for name, prepare in BACKENDS.items():
        with tempfile.TemporaryDirectory(prefix="socketmap-bench-") as directory, prepare(Path(directory)) as backend:
            rows.append([name, *_compare(backend, Path(directory), measure, seconds, rounds)])
    return table(rows)


def _compare(backend: Backend, directory: Path, measure: Measure, seconds: float, rounds: int) -> Sequence[str]:
    served, bare = [], []
    with daemon(directory, backend.table) as server:
        measure(server, LOAD)  # warms up
        for _ in range(rounds):
            served.append(measure(server, LOAD))
            bare.append(_ask_bare(backend.connect, seconds))
    shares = [1 - alone.cpu_per_lookup / figures.cpu_per_lookup for figures, alone in zip(served, bare, strict=True)]
    if failures := sum(figures.failures for figures in served):
        raise RuntimeError(f"{failures} lookups in {backend.table} failed")
    return [
        f"{statistics.median(figures.lookups_per_second for figures in served):.0f}",
        f"{statistics.median(figures.p50 for figures in served):.0f}",
        f"{statistics.median(figures.p99 for figures in served):.0f}",
        f"{statistics.median(figures.cpu_per_lookup for figures in served):.1f}",
        f"{statistics.median(figures.pss for figures in served):.1f}",
        f"{statistics.median(alone.lookups_per_second for alone in bare):.0f}",
        f"{statistics.median(alone.cpu_per_lookup for alone in bare):.1f}",
        f"{statistics.median(shares):.0%}",
    ]


def daemon(
    directory: Path, settings: Mapping[str, object], limits: Mapping[str, object] = MappingProxyType({})
) -> ServerProcess:
    """Return the daemon with one map, of those settings."""
    port = free_port()
    path = directory / "prefork-socketmap.toml"
    lines = [f'listen = ["inet:127.0.0.1:{port}"]', f'runtime_dir = "{directory}"', *_lines(limits)]
    path.write_text("\n".join([*lines, f"[maps.{MAP}]", *_lines(settings)]))
    return ServerProcess("prefork_socketmap", ["serve", "-c", str(path)], port)


def _lines(settings: Mapping[str, object]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in settings.items()]


def _toml(value: object) -> str:
    # Of strings, numbers and lists of them, JSON is TOML.
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {json.dumps(entry)}" for key, entry in value.items()) + "}"
    return json.dumps(value)


def _ask_bare(connect: Callable[[], LookUp], seconds: float) -> Bare:
    """Ask in a process of its own, as a worker is one."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_be_bare, args=(connect, seconds, theirs), daemon=True)
    process.start()
    result: Bare = ours.recv()
    process.join()
    return result


def _be_bare(connect: Callable[[], LookUp], seconds: float, pipe: Connection) -> None:
    look_up = connect()
    asked = keys()
    lookups = 0
    begin, cpu = time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - begin) < seconds:
        for _ in range(_BATCH):
            assert look_up(next(asked))
        lookups += _BATCH
    pipe.send(Bare(lookups / elapsed, (time.process_time() - cpu) / lookups * 1e6))
