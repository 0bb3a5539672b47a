"""Counters in shared memory: of jobs, one set per name and worker, and of what happens to the server as a whole.

What the names of jobs and the ways they end mean is the handler's business. A worker writes its own counters with
plain stores, no system call and no lock (see ``scoreboard``); they go on when the next worker takes its slot, so the
total is the sum over all slots, and nothing has to be saved at a worker's end.

Times are counted in buckets of a power of two: bucket n holds those below 2**n microseconds, the last one the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ENDINGS = 8
"""How many ways there are for a job to end."""
EXTRAS = 4
"""How many numbers of the handler's own are counted with each name."""
BUCKETS = 28
OWN = 5
"""How many numbers of a job's own are counted with each name."""

MAX_NAMES = 256
OTHER = "(other)"
"""The first name: its counters take the jobs of all that have none of their own."""
LABEL_SIZE = 128

_LAST_BUCKET = BUCKETS - 1
_LONGEST = float(1 << 40)  # seconds: what all jobs took together
# Words of a set of counters.
_SECONDS = ENDINGS
_WORST = _SECONDS + 1
_EXTRAS = _WORST + 1
_BUCKETS = _EXTRAS + EXTRAS
_OWN = _BUCKETS + BUCKETS
COUNTERS_SIZE = 512
"""In bytes. It is a divisor of a page, so that no set touches two."""

NOTE_SIZE = 128
"""Bytes of the handler's own text, at the end of a set of counters."""

BOUNDS = tuple((1 << n) / 1e6 for n in range(_LAST_BUCKET))
"""The upper bounds of the buckets but the last, in seconds: 1 us to 67 s."""

# How far one job changes the pace: one that was slow because the machine was busy must not make a map slow.
_LEARNING, _FORGETTING = 1 / 4, 1 / 16


class ServerCounter(NamedTuple):
    """A counter of what happens to the server: a group and a name in it, and what it counts."""

    group: str
    name: str
    what: str


SERVER_COUNTERS = (
    ServerCounter("connections", "accepted", "Connections accepted."),
    ServerCounter("connections", "refused", "Connections refused: not allowed, or beyond max_connections."),
    ServerCounter("connections", "evicted", "Silent connections closed to make room for new ones."),
    ServerCounter("connections", "expired", "Silent connections closed after keepalive_timeout."),
    ServerCounter("connections", "timed_out", "Connections closed after read_timeout or write_timeout."),
    ServerCounter("connections", "overflowed", "Connections closed because too many bytes wait for slow clients."),
    ServerCounter("connections", "lost", "Connections closed because their worker died."),
    ServerCounter("workers", "spawned", "Workers started."),
    ServerCounter("workers", "died", "Workers that ended unexpectedly."),
    ServerCounter("workers", "killed", "Workers killed because they were stuck."),
    ServerCounter("workers", "throttled", "Pauses because a worker could not start."),
    ServerCounter("workers", "exhausted", "Times that lookups had to wait because process_limit was reached."),
    ServerCounter("reloads", "good", "Reloads and upgrades that took effect."),
    ServerCounter("reloads", "refused", "Reloads and upgrades that were refused."),
)
"""All of them, in the order in which they are stored: whoever shows counters shows these."""


_INDEX = {(each.group, each.name): index for index, each in enumerate(SERVER_COUNTERS)}


def server_counter(group: str, name: str) -> int:
    """Return the index of a counter in SERVER_COUNTERS. Raises ValueError if there is none."""
    try:
        return _INDEX[group, name]
    except KeyError:
        raise ValueError(f"{(group, name)} is not in list SERVER_COUNTERS") from None


def label(name: str) -> bytes:
    """Return *name* as it is stored: its UTF-8, cut off where there is no more room."""
    return name.encode("utf-8", "surrogateescape")[:LABEL_SIZE]


class JobCounters:
    """The counters of one name in one slot. ``index`` is the position of the name.

    ``pace`` is a cell that all slots share: about how many seconds a job took lately, rather the long ones.
    """

    def __init__(self, index: int, memory: memoryview, pace: memoryview[float]) -> None:
        """*memory*: COUNTERS_SIZE bytes, which may be read-only for a reader; *pace*: one cell."""
        self.index = index
        self.pace = pace
        self._memory = memory
        self._words = memory.cast("Q")
        self._times = memory.cast("d")

    def count(self, ending: int, seconds: float) -> None:
        """Count a job that ended in the way *ending* and took *seconds*."""
        words = self._words
        words[ending] += 1
        bucket = int(seconds * 1e6).bit_length()
        words[_BUCKETS + (bucket if bucket < _LAST_BUCKET else _LAST_BUCKET)] += 1
        times = self._times
        times[_SECONDS] += seconds
        if seconds > times[_WORST]:
            times[_WORST] = seconds
        pace = self.pace
        before = pace[0]
        pace[0] = before + (seconds - before) * (_LEARNING if seconds > before else _FORGETTING)

    @property
    def endings(self) -> Sequence[int]:
        """How many jobs ended in each of the ways."""
        return self._words[:ENDINGS]

    @property
    def seconds(self) -> float:
        """How long all jobs took together."""
        return self._times[_SECONDS]

    @property
    def worst(self) -> float:
        """How long the longest job took, in seconds."""
        return self._times[_WORST]

    @property
    def extras(self) -> MutableSequence[int]:
        """The handler's own numbers, for it to write."""
        return self._words[_EXTRAS:_BUCKETS]  # type: ignore[return-value]  # a memoryview of integers is one

    @property
    def own(self) -> MutableSequence[int]:
        """The job's own numbers, for it to write."""
        return self._words[_OWN : _OWN + OWN]  # type: ignore[return-value]  # as above

    @property
    def note(self) -> str:
        """A text of the handler's own, cut off where there is no more room."""
        return bytes(self._memory[-NOTE_SIZE:]).rstrip(b"\0").decode("utf-8", "replace")

    @note.setter
    def note(self, text: str) -> None:
        self._memory[-NOTE_SIZE:] = text.encode("utf-8", "surrogateescape")[:NOTE_SIZE].ljust(NOTE_SIZE, b"\0")

    @property
    def buckets(self) -> Sequence[int]:
        """How many jobs took how long."""
        return self._words[_BUCKETS : _BUCKETS + BUCKETS]


class SlotCounters:
    """The counters of one slot, by name."""

    def __init__(self, labels: Sequence[bytes], memory: memoryview, paces: memoryview[float]) -> None:
        """*labels*: the names, OTHER first, as ``label`` gives them. *memory* and *paces* have room for as many."""
        self._labels = labels
        self._memory = memory
        self._paces = paces

    def __getitem__(self, name: str) -> JobCounters:
        wanted = label(name)
        return self._counters(self._labels.index(wanted) if wanted in self._labels else 0)

    def __iter__(self) -> Iterator[JobCounters]:
        return map(self._counters, range(len(self._labels)))

    def _counters(self, index: int) -> JobCounters:
        memory = self._memory[index * COUNTERS_SIZE : (index + 1) * COUNTERS_SIZE]
        return JobCounters(index, memory, self._paces[index : index + 1])


def _plausible(seconds: float) -> float:
    """Return a time that a worker has written; 0.0 when it is none: what is read may be anything."""
    return seconds if 0.0 <= seconds < _LONGEST else 0.0


@dataclass
class Totals:
    """Counters added up. Times are in seconds."""

    endings: list[int] = field(default_factory=lambda: [0] * ENDINGS)
    seconds: float = 0.0
    worst: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, counters: JobCounters) -> None:
        """Add *counters*."""
        self.endings = [a + b for a, b in zip(self.endings, counters.endings, strict=True)]
        self.buckets = [a + b for a, b in zip(self.buckets, counters.buckets, strict=True)]
        self.seconds += _plausible(counters.seconds)
        self.worst = max(self.worst, _plausible(counters.worst))

    @property
    def jobs(self) -> int:
        """How many jobs there were."""
        return sum(self.endings)

    @property
    def mean(self) -> float | None:
        """How long a job took on average; None when there was none."""
        return self.seconds / self.jobs if self.jobs else None

    def quantile(self, share: float) -> float | None:
        """Return the time within which *share* of all jobs was done, None when there was none.

        Inside a bucket the jobs are taken as spread evenly, as histogram_quantile() of Prometheus does.
        """
        wanted = share * sum(self.buckets)
        if not wanted:
            return None
        lower = 0.0
        for number, upper in zip(self.buckets, (*BOUNDS, self.worst), strict=True):
            if number >= wanted:
                return min(lower + (upper - lower) * wanted / number, self.worst)
            wanted -= number
            lower = upper
        return self.worst
