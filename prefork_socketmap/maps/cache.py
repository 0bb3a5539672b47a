"""Remembered answers: one cache for a map, shared by all workers, for as long as the settings say.

An answer is fresh for ``ttl`` seconds (``negative_ttl`` if it is "not found"), and for ``stale_ttl`` more it stands
in when a new lookup fails. Failures are not remembered.

While one process asks the map for a key, others that want the same wait for what it hears, be it a failure; only if
that takes long and there is an answer that may stand in, they take that.

How answers are stored, and how processes keep out of each other's way, is in ``store`` and ``flight``. Times are of
the clock on the wall, because a store may outlive the machine's start; where it was set back, answers from what is
now the future are not taken for fresh.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, MutableSequence
from typing import NamedTuple

from prefork_socketmap.maps import store as stores
from prefork_socketmap.maps.base import LookupFailedError
from prefork_socketmap.maps.flight import LONGEST_TEXT, Flight, Outcome
from prefork_socketmap.maps.memory import Remembered
from prefork_socketmap.maps.page import Entry
from prefork_socketmap.maps.ratelimit import RateLimitedLogger
from prefork_socketmap.maps.store import Shared, Store
from prefork_socketmap.socketmap.messages import Reply, Status, to_bytes, to_text

_HITS, _MISSES, _STALE, _SIZE = range(4)
_HALF = (1 << 32) - 1
_KINDS = tuple(Status)
_OK, _NOT_FOUND = (_KINDS.index(each) for each in (Status.OK, Status.NOT_FOUND))
_FOUND = Status.OK  # Enum looks its members up in a slow way
_NONE = Reply.not_found()

_UNTOLD = Outcome(len(_KINDS), b"")
"""There is an answer, but it is not remembered, and too long to be told: so all who wait ask for themselves."""

_PATIENCE = 0.1  # seconds: so long a process waits for another one's answer if it has an old one
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.01
_SLACK = 1.0  # seconds that clocks may be set back unnoticed


class _Question(NamedTuple):
    key: str
    data: bytes
    """The key, as it is stored."""
    before: Entry | None
    """What was remembered when the question came,"""
    came: float
    """and when that was."""


class Cache:
    """Answers of *look_up*. Until it is told where others have theirs (``share``) it has a store of its own.

    *pages* is the size of that (see ``store.pages_for``). Times are in seconds.
    """

    def __init__(
        self,
        look_up: Callable[[str], Reply],
        complaints: RateLimitedLogger,
        *,
        pages: int,
        ttl: float,
        negative_ttl: float,
        stale_ttl: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._look_up = look_up
        self._complaints = complaints
        self._pages = pages
        self._ttl = {Status.OK: ttl, Status.NOT_FOUND: negative_ttl}
        self._stale_ttl = stale_ttl
        self._clock = clock
        self._shared: Store | None = None
        self._counts: MutableSequence[int] = [0, 0, 0, 0]

    def share(self, shared: Shared) -> None:
        """Have the answers there."""
        self._shared = Store(shared)

    @property
    def _store(self) -> Store:
        if self._shared is None:
            fd = stores.create("", self._pages)
            weakref.finalize(self, os.close, fd)
            self._shared = Store(stores.shared(fd))
        return self._shared

    @property
    def hits(self) -> int:
        """How many lookups a fresh answer spared."""
        return self._counts[_HITS]

    @property
    def misses(self) -> int:
        """How many lookups found no fresh answer."""
        return self._counts[_MISSES]

    @property
    def stale(self) -> int:
        """How many of these got the last known answer."""
        return self._counts[_STALE]

    def count_in(self, cells: MutableSequence[int]) -> None:
        """Count in *cells*, on from what stands there: hits, misses, stale answers.

        The fourth has in its upper half when, in seconds since the epoch, this process has last seen how many answers
        there are, and in the lower one how many. What has expired since is still among them.
        """
        self._counts = cells
        self._note_size()

    def _note_size(self) -> None:
        self._counts[_SIZE] = (int(self._clock()) & _HALF) << 32 | min(len(self), _HALF)

    def __len__(self) -> int:
        return self._store.answers

    # Lookups.

    def get(self, key: str) -> Reply:
        """Return the answer for *key*: the remembered one if it is fresh, else a new one, else the old one."""
        data = to_bytes(key)
        entry = (self._shared or self._store).get(data)
        if entry is not None and entry.stored - _SLACK <= self._clock() < entry.fresh_until:
            self._counts[_HITS] += 1
            return Reply(_FOUND, to_text(entry.value)) if entry.kind == _OK else _NONE
        return self._renew(_Question(key, data, entry, self._clock()))

    def _renew(self, question: _Question) -> Reply:
        """Ask the map, or wait for another process that does."""
        begin = time.monotonic()
        pause = _FIRST_PAUSE
        with self._store.flight(question.data) as flight:
            while not flight.take():
                if (answer := self._overhear(question, flight)) is not None:
                    return answer
                if time.monotonic() - begin > _PATIENCE and (old := self._usable(question)) is not None:
                    self._counts[_MISSES] += 1
                    return self._stand_in(
                        old, question.key, "another process has been waiting for an answer for long"
                    )
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            # It may have come since this process looked, or while it waited.
            answer = self._overhear(question, flight)
            return self._ask(question, flight) if answer is None else answer

    def _overhear(self, question: _Question, flight: Flight) -> Reply | None:
        """Return what another process has heard of the map since the question came; None if it has heard nothing."""
        entry = self._store.get(question.data)
        if entry is not None and entry != question.before and self._is_news(entry, question.came):
            self._counts[_HITS] += 1
            return _reply(entry)
        outcome = flight.told()
        if outcome is None:
            return None
        if outcome.kind >= len(_KINDS):
            return self._ask(question, flight)
        reply = Reply(_KINDS[outcome.kind], to_text(outcome.text))
        if reply.status in self._ttl:
            self._counts[_HITS] += 1
            return reply
        self._counts[_MISSES] += 1
        return self._old_or(reply, question)

    def _ask(self, question: _Question, flight: Flight) -> Reply:
        self._counts[_MISSES] += 1
        purges = self._store.purges
        try:
            reply = self._look_up(question.key)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # the end of the time for a lookup is no Exception
            told = _told(error)
            flight.tell(_outcome(told))
            if self._usable(question) is None:
                raise
            return self._old_or(told, question, error)
        if reply.status in self._ttl:
            if not self._remember(question.data, reply, purges):
                flight.tell(_outcome(reply))
            return reply
        flight.tell(_outcome(reply))
        return self._old_or(reply, question)

    def _remember(self, data: bytes, reply: Reply, purges: int) -> bool:
        """Remember an answer, if that is wanted and possible; return whether it is remembered."""
        if not (self._ttl[reply.status] or self._stale_ttl):
            return False
        with contextlib.suppress(UnicodeEncodeError, OSError):  # it cannot be sent, either; or the disk is full
            now = self._clock()
            fresh_until = now + self._ttl[reply.status]
            entry = Entry(
                _KINDS.index(reply.status), to_bytes(reply.text), now, fresh_until, fresh_until + self._stale_ttl
            )
            is_there = self._store.put(data, entry, purges)
            self._note_size()
            return is_there
        return False

    def _is_news(self, entry: Entry, came: float) -> bool:
        """Whether *entry* is an answer to a question that came at that time."""
        return entry.stored >= came - _SLACK or self._clock() < entry.fresh_until

    def _usable(self, question: _Question) -> Entry | None:
        """Return what may be given in place of an answer that does not come."""
        # Read again: what was read while somebody wrote may not have been found.
        entry = self._store.get(question.data)
        return entry if entry is not None and self._is_kept(entry) else None

    def _is_kept(self, entry: Entry) -> bool:
        return self._clock() < entry.kept_until

    def _old_or(self, failure: Reply, question: _Question, error: BaseException | None = None) -> Reply:
        """Return the last known answer if there is one, else *failure*, which came of *error* if of any."""
        old = self._usable(question)
        return failure if old is None else self._stand_in(old, question.key, error or failure.text)

    def _stand_in(self, old: Entry, key: str, problem: object) -> Reply:
        self._counts[_STALE] += 1
        self._complaints.log(logging.WARNING, "%r: the last known answer is given (stale_ttl): %s", key, problem)
        return _reply(old)

    # As the command ``cache`` sees it.

    def recall(self, key: str) -> Remembered | None:
        """Return what is remembered of *key*."""
        data = to_bytes(key)
        entry = self._store.get(data)
        return _remembered(data, entry) if entry is not None and self._is_kept(entry) else None

    def recall_all(self) -> Iterator[Remembered]:
        """Iterate over all that is remembered, in no order."""
        return (_remembered(data, entry) for data, entry in self._store if self._is_kept(entry))

    def forget(self, key: str) -> bool:
        """Forget what is remembered of *key*; return whether it was anything."""
        return self._store.remove(to_bytes(key))

    def forget_all(self) -> int:
        """Forget everything; return how many answers it was."""
        return self._store.clear()


def _reply(entry: Entry) -> Reply:
    return Reply(_FOUND, to_text(entry.value)) if entry.kind == _OK else _NONE


def _remembered(data: bytes, entry: Entry) -> Remembered:
    return Remembered(to_text(data), _reply(entry), entry.stored, entry.fresh_until, entry.kept_until)


def _outcome(reply: Reply) -> Outcome:
    """Return what those are told who wait for *reply*; the reason of a failure may be cut off."""
    try:
        text = to_bytes(reply.text)
    except UnicodeEncodeError:  # it cannot be sent, either
        return _UNTOLD
    is_told = reply.status is not _FOUND or len(text) <= LONGEST_TEXT
    return Outcome(_KINDS.index(reply.status), text) if is_told else _UNTOLD


def _told(error: BaseException) -> Reply:
    """Return what those hear who wait for a lookup that has raised *error*."""
    if isinstance(error, LookupFailedError):
        return error.reply
    if isinstance(error, TimeoutError) or not isinstance(error, Exception):
        return Reply.timeout("lookup timed out")
    return Reply.temp_fail("lookup failed")
