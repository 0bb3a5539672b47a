"""What the scoreboard of a running server says, in the words of those who run it.

Everything is read from shared memory: no process is asked, and none has to answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prefork_socketmap.daemon.backends import BackendReport
from prefork_socketmap.maps.srsaddress import Flaw
from prefork_socketmap.prefork.counters import OTHER, SERVER_COUNTERS, JobCounters, Totals
from prefork_socketmap.prefork.scoreboard import Row, Scoreboard, State
from prefork_socketmap.service import ANY_OTHER_MAP, ENDINGS, NO_SUCH_MAP
from prefork_socketmap.socketmap.messages import Status

_STATES = {
    State.STARTING: "starting",
    State.IDLE: "idle",
    State.RESERVE: "idle",
    State.SERVING: "busy",
    State.BUSY: "busy",
    State.LEAVING: "leaving",
    State.STOPPED: "stopped",
}
_WITH_A_CLIENT = (State.SERVING, State.BUSY)
_NOT_IN_THE_FILE = (OTHER, ANY_OTHER_MAP, NO_SUCH_MAP)


class Counters(Totals):
    """Lookups, by reply and by the time they took."""

    @property
    def replies(self) -> dict[str, int]:
        """How many replies there were with each status word."""
        return {status.value: number for status, number in zip(ENDINGS, self.endings, strict=False)}

    @property
    def failures(self) -> int:
        """How many replies there were that make Postfix defer mail."""
        return self.jobs - sum(self.replies[status.value] for status in (Status.OK, Status.NOT_FOUND))

    def since(self, before: Counters) -> Counters:
        """Return what has been counted since *before*. The longest time remains that of all."""
        return Counters(
            [new - old for new, old in zip(self.endings, before.endings, strict=True)],
            self.seconds - before.seconds,
            self.worst,
            [new - old for new, old in zip(self.buckets, before.buckets, strict=True)],
        )


@dataclass
class CacheReport:
    """The cache of one map, which all workers share."""

    hits: int = 0
    misses: int = 0
    stale: int = 0
    entries: int = 0

    def __post_init__(self) -> None:
        self._seen = 0

    def add(self, extras: Sequence[int]) -> None:
        """Add what a worker has counted. How many entries there are, the one tells that has seen it last."""
        hits, misses, stale, seen = extras
        self.hits += hits
        self.misses += misses
        self.stale += stale
        # The time, in seconds, in the upper half; the number in the lower one.
        self._seen = max(self._seen, seen)
        self.entries = self._seen % (1 << 32)

    @property
    def exists(self) -> bool:
        """Whether any worker has such a cache, as far as can be told: one that nobody asked has left no trace."""
        return bool(self.hits or self.misses)


@dataclass
class MapReport:
    """One map, in all workers together, those included that have ended."""

    name: str
    counters: Counters = field(default_factory=Counters)
    cache: CacheReport = field(default_factory=CacheReport)
    flaws: dict[str, int] = field(default_factory=lambda: dict.fromkeys((flaw.value for flaw in Flaw), 0))
    """How many addresses a map of the type ``srs`` has found with each flaw."""
    deaths: int = 0
    """How many workers died in a lookup in it, or had to be killed."""

    def add(self, one: JobCounters) -> None:
        """Add what one worker has counted."""
        self.counters.add(one)
        self.cache.add(one.extras)
        for name, number in zip(self.flaws, one.own, strict=True):
            self.flaws[name] += number

    @property
    def is_of_interest(self) -> bool:
        """Whether it is a map of the config file, or has been asked."""
        return self.name not in _NOT_IN_THE_FILE or bool(self.counters.jobs)


@dataclass(frozen=True)
class WorkerReport:
    """A worker. Its counters are those of its slot: its predecessors' are included."""

    slot: int
    pid: int
    generation: int
    state: str
    since: float
    """When it entered its state, in seconds since the epoch."""
    map: str | None
    """The map that is asked at this moment."""
    lookup_seconds: float | None
    """How long the lookup under way has taken until now."""
    client: str | None
    counters: Counters


@dataclass(frozen=True)
class Report:
    """A running server at one moment. Times are in seconds, ``started`` since the epoch."""

    pid: int
    started: float
    generation: int
    active: int
    """Connections that workers are serving."""
    silent: int
    """Connections that nobody is serving."""
    events: Mapping[str, Mapping[str, int]]
    """The SERVER_COUNTERS, by group and name."""
    maps: Sequence[MapReport]
    workers: Sequence[WorkerReport]
    unknown: Sequence[str] = ()
    """Names that were asked for last, and are no map's."""
    backends: Sequence[BackendReport] = ()

    def count_states(self) -> dict[str, int]:
        """Return how many workers are in each state, for all states."""
        counts = dict.fromkeys(_STATES.values(), 0)
        for worker in self.workers:
            counts[worker.state] += 1
        return counts


@dataclass(frozen=True)
class Finding:
    """What was found: an exit code, a line that says so, and the details, where there are any."""

    code: int
    line: str
    pid: int | None = None
    report: Report | None = None
    problem: str | None = None
    """Why there are no details, or why the last reload was refused."""

    @property
    def runs(self) -> bool:
        """Whether the server runs."""
        return self.code == os.EX_OK


def make(board: Scoreboard, backends: Sequence[BackendReport] = ()) -> Report:
    """Read *board*; *backends* is what is known of those."""
    rows = board.rows()
    maps = [MapReport(name, deaths=deaths) for name, deaths in zip(board.names(), board.deaths, strict=False)]
    workers = list(_read_slots(board, rows, maps))
    active = sum(row.state in _WITH_A_CLIENT and bool(row.held) for row in rows)
    return Report(
        pid=board.pid,
        started=board.started,
        generation=board.generation,
        active=active,
        silent=max(board.connections - active, 0),
        events=_read_events(board),
        maps=sorted((each for each in maps if each.is_of_interest), key=lambda each: each.name),
        workers=workers,
        unknown=sorted(_read_unknown(board, rows)),
        backends=backends,
    )


def _read_events(board: Scoreboard) -> Mapping[str, Mapping[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for counter, number in zip(SERVER_COUNTERS, board.server_counters(), strict=True):
        groups.setdefault(counter.group, {})[counter.name] = number
    return groups


def _read_unknown(board: Scoreboard, rows: Sequence[Row]) -> set[str]:
    """Return the names that workers have noted, each the last one that it was asked for."""
    names = board.names()
    if NO_SUCH_MAP not in names:
        return set()
    index = names.index(NO_SUCH_MAP)
    found = (list(board.counters(row.slot))[index:] for row in rows)
    return {each[0].note for each in found if each and each[0].note}


def _read_slots(board: Scoreboard, rows: Sequence[Row], maps: Sequence[MapReport]) -> Iterator[WorkerReport]:
    """Add the counters of all slots to *maps*; yield the workers that there are."""
    for row in rows:
        state = row.state
        counters = Counters()
        # A name may have been added since the names were read.
        for one, each in zip(board.counters(row.slot), maps, strict=False):
            counters.add(one)
            each.add(one)
        if state is not State.FREE:
            yield _worker(row, state, counters, maps)


def _worker(row: Row, state: State, counters: Counters, maps: Sequence[MapReport]) -> WorkerReport:
    now = time.monotonic()
    started, name = row.job_started, row.job_name
    return WorkerReport(
        slot=row.slot,
        pid=row.pid,
        generation=row.generation,
        state=_STATES[state],
        since=time.time() - (now - row.since),
        map=maps[name].name if started and name < len(maps) else None,
        lookup_seconds=max(now - started, 0.0) if started else None,
        client=row.client if state in _WITH_A_CLIENT else None,
        counters=counters,
    )
