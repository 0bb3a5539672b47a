"""What a remembered answer costs: the cache that workers share, and what it might have been made of instead.

In one process, with no server around it: a hit is what a lookup costs beside reading and writing it, a miss what it
costs to remember an answer. The others are as bare as can be: they forget nothing, and let all processes ask at once.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cachetools
import lmdb

from prefork_socketmap.maps.cache import Cache
from prefork_socketmap.maps.ratelimit import RateLimitedLogger
from prefork_socketmap.maps.store import pages_for
from prefork_socketmap.socketmap.messages import Reply, to_bytes, to_text
from tests.bench.report import table

ANSWERS = 5000
_BATCH = 100  # lookups between two looks at the clock
_FOR_EVER = 1e9

Get = Callable[[str], Reply]


def _ask(key: str) -> Reply:
    return Reply.ok(f"mailbox of {key}")


@contextlib.contextmanager
def _shared(_directory: Path) -> Iterator[Get]:
    complaints = RateLimitedLogger(logging.getLogger("bench"))
    pages = pages_for(2 * ANSWERS)
    yield Cache(_ask, complaints, pages=pages, ttl=_FOR_EVER, negative_ttl=0, stale_ttl=0).get


@contextlib.contextmanager
def _cachetools(_directory: Path) -> Iterator[Get]:
    """What was there before, for each worker by itself: an entry is a reply and until when it is fresh."""

    def until(_key: str, entry: tuple[Reply, float], _now: float) -> float:
        return entry[1]

    entries = cachetools.TLRUCache[str, tuple[Reply, float]](2 * ANSWERS, ttu=until, timer=time.monotonic)

    def get(key: str) -> Reply:
        entry = entries.get(key)
        if entry is not None and time.monotonic() < entry[1]:
            return entry[0]
        reply = _ask(key)
        entries[key] = reply, time.monotonic() + _FOR_EVER
        return reply

    yield get


@contextlib.contextmanager
def _lmdb(directory: Path) -> Iterator[Get]:
    environment = lmdb.open(str(directory / "lmdb"), map_size=1 << 30, sync=False, writemap=False)

    def get(key: str) -> Reply:
        data = to_bytes(key)
        with environment.begin() as transaction:
            value = transaction.get(data)
        if value is not None:
            return Reply.ok(to_text(value))
        reply = _ask(key)
        with environment.begin(write=True) as transaction:
            transaction.put(data, to_bytes(reply.text))
        return reply

    with contextlib.closing(environment):
        yield get


@contextlib.contextmanager
def _sqlite(directory: Path) -> Iterator[Get]:
    database = sqlite3.connect(directory / "sqlite", isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = OFF")
    database.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def get(key: str) -> Reply:
        row = database.execute("SELECT value FROM answers WHERE key = ?", [key]).fetchone()
        if row:
            return Reply.ok(row[0])
        reply = _ask(key)
        database.execute("REPLACE INTO answers VALUES (?, ?)", [key, reply.text])
        return reply

    with contextlib.closing(database):
        yield get


CONTENDERS = {
    "shared by all workers": _shared,
    "cachetools, in each worker": _cachetools,
    "LMDB": _lmdb,
    "SQLite, WAL": _sqlite,
}


def run(seconds: float, rounds: int) -> str:
    """Let them take turns; return the report."""
    hits: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    misses: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with contextlib.ExitStack() as stack:
        caches: dict[str, Get] = {}
        for name, contender in CONTENDERS.items():
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="socketmap-bench-", dir=_memory()))
            caches[name] = stack.enter_context(contender(Path(directory)))
        keys = [f"someone{number}@example.com" for number in range(ANSWERS)]
        numbers = itertools.count()
        for get in caches.values():
            for key in keys:
                get(key)
        for _ in range(rounds):
            for name, get in caches.items():
                hits[name].append(_time(get, itertools.cycle(keys), seconds))
                misses[name].append(_time(get, (f"new{number}@example.com" for number in numbers), seconds / 10))
                for key in keys:
                    get(key)
    rows = [[f"{ANSWERS} answers, in one process", "us per hit", "us per miss"]]
    rows += [
        [name, f"{statistics.median(hits[name]):.2f}", f"{statistics.median(misses[name]):.1f}"] for name in hits
    ]
    return table(rows)


def _memory() -> str | None:
    """Return a directory in memory, where files cost what they cost without a disk; None if there is none."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _time(get: Get, keys: Iterator[str], seconds: float) -> float:
    """Look *keys* up for a while; return how many microseconds of CPU time each took."""
    lookups = 0
    begin, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        for key in itertools.islice(keys, _BATCH):
            get(key)
        lookups += _BATCH
    return (time.process_time() - cpu) / lookups * 1e6
