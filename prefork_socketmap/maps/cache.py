"""Remembered answers: one cache per worker and map, for as long as the settings say.

An answer is fresh for ``ttl`` seconds (``negative_ttl`` if it is "not found"), and for ``stale_ttl`` more it stands
in when a new lookup fails. Failures are not remembered, nor are answers to keys that are longer than any address: who
sends them could fill the memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, MutableSequence
from typing import NamedTuple

from cachetools import TLRUCache

from prefork_socketmap.maps.ratelimit import RateLimitedLogger
from prefork_socketmap.socketmap.messages import Reply, Status

_LONGEST_KEY = 1000  # characters; RFC 5321 ends at 256 octets for an address
_HITS, _MISSES, _STALE, _SIZE = range(4)


class _Entry(NamedTuple):
    reply: Reply
    fresh_until: float


class Cache:
    """Answers of *look_up*, at most *size* of them; the least recently used goes first. Times are in seconds."""

    def __init__(
        self,
        look_up: Callable[[str], Reply],
        complaints: RateLimitedLogger,
        *,
        size: int,
        ttl: float,
        negative_ttl: float,
        stale_ttl: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look_up = look_up
        self._complaints = complaints
        self._ttl = {Status.OK: ttl, Status.NOT_FOUND: negative_ttl}
        self._clock = clock
        self._entries = TLRUCache[str, _Entry](
            size, ttu=lambda _key, entry, _now: entry.fresh_until + stale_ttl, timer=clock
        )
        self._counts: MutableSequence[int] = [0, 0, 0, 0]

    @property
    def hits(self) -> int:
        """How many lookups a fresh answer spared."""
        return self._counts[_HITS]

    @property
    def misses(self) -> int:
        """How many lookups asked the map."""
        return self._counts[_MISSES]

    @property
    def stale(self) -> int:
        """How many of these failed, and got the last known answer."""
        return self._counts[_STALE]

    def count_in(self, cells: MutableSequence[int]) -> None:
        """Count in *cells*, on from what stands there: hits, misses, stale answers; the fourth is set to the size.

        That is the size at the latest new answer: what has expired since is still in it.
        """
        self._counts = cells
        self._note_size()

    def _note_size(self) -> None:
        self._counts[_SIZE] = len(self)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Reply:
        """Return the answer for *key*: a fresh one from memory, else a new one, else, if that fails, a stale one."""
        entry = self._entries.get(key)
        if entry is not None and self._clock() < entry.fresh_until:
            self._counts[_HITS] += 1
            return entry.reply
        self._counts[_MISSES] += 1
        try:
            reply = self._look_up(key)
        except Exception as error:
            if entry is None:
                raise
            return self._stand_in(entry, key, error)
        if reply.status not in self._ttl:
            return reply if entry is None else self._stand_in(entry, key, reply.text)
        if len(key) <= _LONGEST_KEY:
            self._entries[key] = _Entry(reply, self._clock() + self._ttl[reply.status])
            self._note_size()
        return reply

    def _stand_in(self, entry: _Entry, key: str, problem: object) -> Reply:
        self._counts[_STALE] += 1
        self._complaints.log(logging.WARNING, "%r: the last known answer is given (stale_ttl): %s", key, problem)
        return entry.reply
