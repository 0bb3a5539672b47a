"""Tallies: shared counters, one set per name and worker, of how jobs ended and how long they took.

What the names and the columns mean is the handler's business. A worker writes its own tallies with plain stores, no
system call and no lock (see ``scoreboard``); they go on when the next worker takes its slot, so the total is the sum
over all slots, and nothing has to be saved at a worker's end.

Times are counted in buckets of a power of two: bucket n holds those below 2**n microseconds, the last one the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field

COLUMNS = 8
"""How many ways there are for a job to end."""
EXTRAS = 4
"""How many numbers of the handler's own a tally has."""
BUCKETS = 28

MAX_NAMES = 256
OTHER = "(other)"
"""The first name: its tally takes the jobs of all that have none of their own."""
LABEL_SIZE = 128

_LAST_BUCKET = BUCKETS - 1
# Words of a tally; the buckets come last.
_SECONDS = COLUMNS
_WORST = _SECONDS + 1
_EXTRAS = _WORST + 1
_BUCKETS = _EXTRAS + EXTRAS
TALLY_SIZE = 512
"""In bytes. It is a divisor of a page, so that no tally touches two."""

BOUNDS = tuple((1 << n) / 1e6 for n in range(_LAST_BUCKET))
"""The upper bounds of the buckets but the last, in seconds: 1 us to 67 s."""


def label(name: str) -> bytes:
    """Return *name* as it is stored: its UTF-8, cut off where there is no more room."""
    return name.encode("utf-8", "surrogateescape")[:LABEL_SIZE]


class Tally:
    """The counters of one name in one slot."""

    def __init__(self, index: int, memory: memoryview) -> None:
        """*index*: the position of the name. *memory*: TALLY_SIZE bytes, which may be read-only for a reader."""
        self.index = index
        self._words = memory.cast("Q")
        self._times = memory.cast("d")

    def count(self, column: int, seconds: float) -> None:
        """Count a job that ended as *column* says and took *seconds*."""
        words = self._words
        words[column] += 1
        bucket = int(seconds * 1e6).bit_length()
        words[_BUCKETS + (bucket if bucket < _LAST_BUCKET else _LAST_BUCKET)] += 1
        times = self._times
        times[_SECONDS] += seconds
        if seconds > times[_WORST]:
            times[_WORST] = seconds

    @property
    def columns(self) -> Sequence[int]:
        """How many jobs ended in each of the ways."""
        return self._words[:COLUMNS]

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
    def buckets(self) -> Sequence[int]:
        """How many jobs took how long."""
        return self._words[_BUCKETS : _BUCKETS + BUCKETS]


class Tallies:
    """The tallies of one slot, by name."""

    def __init__(self, labels: Sequence[bytes], memory: memoryview) -> None:
        """*labels*: the names, OTHER first, as ``label`` gives them. *memory* holds as many tallies."""
        self._labels = labels
        self._memory = memory

    def __getitem__(self, name: str) -> Tally:
        wanted = label(name)
        return self._tally(self._labels.index(wanted) if wanted in self._labels else 0)

    def __iter__(self) -> Iterator[Tally]:
        return map(self._tally, range(len(self._labels)))

    def _tally(self, index: int) -> Tally:
        return Tally(index, self._memory[index * TALLY_SIZE : (index + 1) * TALLY_SIZE])


@dataclass
class Totals:
    """Tallies added up. Times are in seconds."""

    columns: list[int] = field(default_factory=lambda: [0] * COLUMNS)
    seconds: float = 0.0
    worst: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, tally: Tally) -> None:
        """Add *tally*."""
        self.columns = [a + b for a, b in zip(self.columns, tally.columns, strict=True)]
        self.buckets = [a + b for a, b in zip(self.buckets, tally.buckets, strict=True)]
        self.seconds += tally.seconds
        self.worst = max(self.worst, tally.worst)

    @property
    def jobs(self) -> int:
        """How many jobs there were."""
        return sum(self.columns)

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
