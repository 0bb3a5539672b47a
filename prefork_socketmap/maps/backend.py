"""A backend, as the maps of a process know it: is it up, may one more connection be opened, whose turn is it to try.

A *backend* is a server (or several that stand for each other) and the account that is used there; its **standing**
is what is known of it. A server gives all its workers the same standing (``Sharing``), so that one of them learns of
an outage and all know, and that all together stay within ``max_connections``. Without a server a process has a
standing of its own, and no limits (``Private``).

A *link* is a connection of this process to a backend. Maps with the same backend and the same settings for the
connection have the same link (``Links``).

What stands in shared cells may have been written by a worker whose code somebody has captured. So nothing here counts
on it: times that cannot be are taken as none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import zlib
from collections.abc import Hashable, Iterable, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

log = logging.getLogger("prefork_socketmap.worker.maps")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 0.4
"""Seconds between two attempts to reach a backend that is down. One process tries, so they can be short."""
LONGEST_LEAVE = 60.0
"""A server that asks to be left alone until tomorrow shall not keep mail waiting when it has changed its mind."""

_NEVER = float("inf")

C = TypeVar("C")
D = TypeVar("D", contravariant=True)
Cell = MutableSequence[float]


def _cell() -> Cell:
    return [0.0]


@dataclass
class Cells:
    """What is known of a backend's health. Times are CLOCK_MONOTONIC seconds, 0.0: none."""

    trouble: Cell = field(default_factory=_cell)
    """Not 0.0 if anything below has to be looked at: for the lookups of a backend that is well."""
    since: Cell = field(default_factory=_cell)
    """Since when it is down."""
    retry: Cell = field(default_factory=_cell)
    """When somebody shall try again."""
    pause: Cell = field(default_factory=_cell)
    """How long the latest pause was."""
    suspect: Cell = field(default_factory=_cell)
    """Stands for the key whose answer has broken since the last one that was whole."""
    leave: Cell = field(default_factory=_cell)
    """Until when the server wants to be left alone."""
    limit: Cell = field(default_factory=_cell)
    """How many connections the server takes in all, as far as it has told; -1.0: it has been asked in vain."""


class Slot(Protocol):
    """The right to one connection. It ends with the process, however that ends."""

    used: Cell
    """When the connection was used last."""

    def is_wanted(self) -> bool:
        """Whether another process waits for it."""

    def free(self) -> None:
        """Let another process have it."""


class Standing(Protocol):
    """What the processes that ask a backend know of it, and take from each other."""

    cells: Cells

    def take_turn(self) -> bool:
        """Become the one who tries whether the backend is up; return False if another process is."""

    def end_turn(self) -> None:
        """Let another process be that."""

    def enter(self, share: float) -> bool:
        """Count this process among those with a lookup there; return False, and do not, if they are too many.

        That is more than *share* of all workers.
        """

    def leave(self) -> None:
        """End that."""

    def take_slot(self, most: int) -> Slot | None:
        """Return the right to one of *most* connections; None: not now."""

    def serves_others(self) -> bool:
        """Whether other processes have connections there, and used one just now."""

    def ask_for_slot(self, most: int) -> float:
        """Ask a process that has a connection and does not use it to give it up. To be called again and again.

        Return how long to wait before the next look, in seconds.
        """


class _PrivateSlot:
    def __init__(self) -> None:
        self.used: Cell = [0.0]

    def is_wanted(self) -> bool:
        return False

    def free(self) -> None:
        pass


class Private:
    """The standing of a backend for a process that is alone."""

    def __init__(self) -> None:
        self.cells = Cells()

    def take_turn(self) -> bool:
        """Take it."""
        return True

    def end_turn(self) -> None:
        """Do nothing."""

    def enter(self, share: float) -> bool:  # noqa: ARG002 - a Standing
        """Enter."""
        return True

    def leave(self) -> None:
        """Do nothing."""

    def take_slot(self, most: int) -> Slot | None:  # noqa: ARG002
        """Return one."""
        return _PrivateSlot()

    def serves_others(self) -> bool:
        """Know of none."""
        return False

    def ask_for_slot(self, most: int) -> float:  # noqa: ARG002
        """Do nothing."""
        return 0.0


class Sharing(Protocol):
    """Where standings come from."""

    def standing(self, identity: Hashable, label: str) -> Standing:
        """Return that of the backend *identity*, whose ``repr`` may hold secrets. *label* is shown, and has none."""

    def set_alarm(self, seconds: float) -> None:
        """Have ``Links.look`` called after so many seconds; what was set before is forgotten."""


class Alone:
    """A process without a server around it."""

    def standing(self, identity: Hashable, label: str) -> Standing:  # noqa: ARG002 - a Sharing
        """Return a new one."""
        return Private()

    def set_alarm(self, seconds: float) -> None:
        """Do nothing: such a process does not live long."""


class Health:
    """Tells whether a backend may be asked, and learns from how that ends."""

    def __init__(self, standing: Standing, label: str) -> None:
        self._standing = standing
        self._label = label
        self.cells = standing.cells
        self.is_trying = False
        """Whether this process is the one that tries whether the backend is up."""

    def refuses(self) -> bool:
        """Whether this process shall not ask now; if it may and the backend is down, it is the one that tries."""
        now = time.monotonic()
        cells = self.cells
        if now < cells.leave[0] <= now + LONGEST_LEAVE:
            return True
        retry = cells.retry[0]
        if not 0.0 < retry <= now + LONGEST_PAUSE:
            return False  # it is not down; or nobody of ours has written this
        if now < retry:
            return True
        if not self.is_trying:
            self.is_trying = self._standing.take_turn()
        return not self.is_trying

    def end_attempt(self) -> None:
        """Let another process try, if it was this one's turn."""
        if self.is_trying:
            self.is_trying = False
            self._standing.end_turn()

    def note_whole_answer(self) -> None:
        """Note that the backend is up. To be called only if ``cells.trouble`` is set, since it costs something."""
        cells = self.cells
        now = time.monotonic()
        since = cells.since[0]
        for cell in (cells.since, cells.retry, cells.pause, cells.suspect):
            cell[0] = 0.0
        if not now < cells.leave[0] <= now + LONGEST_LEAVE:
            cells.leave[0] = cells.trouble[0] = 0.0
        if 0.0 < since <= now:
            log.info("%s answers again, after %.1f s", self._label, now - since)

    def note_outage(self) -> float:
        """Note that the backend is down; return how long nobody tries again, in seconds."""
        cells = self.cells
        now = time.monotonic()
        left = cells.retry[0] - now
        if not self.is_trying and 0.0 < left <= LONGEST_PAUSE:
            return left  # another process was quicker
        before = cells.pause[0]
        pause = min(2 * before, LONGEST_PAUSE) if FIRST_PAUSE <= before <= LONGEST_PAUSE else FIRST_PAUSE
        cells.pause[0] = pause
        if not 0.0 < cells.since[0] <= now:
            cells.since[0] = now
        # Shorter by up to a quarter, so that not all who have lost a server come back at once.
        pause *= 1 - os.urandom(1)[0] / 1024
        cells.retry[0] = now + pause
        cells.trouble[0] = 1.0
        return pause

    def note_broken_answer(self, key: str, *, is_slow: bool) -> bool:
        """Note that an answer has broken, or (*is_slow*) not come in time; return whether that is an outage.

        A server that answers others may break off, or not answer, for one key. So it is the trouble of *key* until
        the answer to another one breaks, too, with none between the two that is whole. Not so for one that twice does
        not come: nobody shall wait again and again for the one key that a frozen server is asked for.
        """
        cells = self.cells
        mark = 1.0 + zlib.crc32(key.encode("utf-8", "surrogateescape"))
        suspect = cells.suspect[0]
        if suspect and (suspect != mark or is_slow):
            return True
        cells.suspect[0] = mark
        cells.trouble[0] = 1.0
        return False

    def leave_alone(self, seconds: float) -> None:
        """Ask nothing for so long: the server has said so."""
        cells = self.cells
        cells.leave[0] = max(cells.leave[0], time.monotonic() + min(seconds, LONGEST_LEAVE))
        cells.trouble[0] = 1.0


class Owner(Protocol[D]):
    """A map, as far as it looks after its connection."""

    errors: ClassVar[tuple[type[Exception], ...]]

    def hang_up(self, connection: D) -> None:
        """Close *connection*."""


class Link(Generic[C]):
    """A connection of this process to a backend, or the place for one."""

    def __init__(self, links: Links, owner: Owner[C], hosts: Sequence[str], standing: Standing, label: str) -> None:
        """*owner* is one of the maps that use it."""
        self.connection: C | None = None
        self.hosts = hosts
        self.host = 0
        """Which of the hosts is asked: the position in ``hosts``, counted on in a circle."""
        self.label = label
        self.standing = standing
        self.health = Health(standing, label)
        self.max_idle = 0.0
        """How long it is kept without use, in seconds."""
        self.most = 0
        """How many such connections all workers may have."""
        self._links = links
        self._owner = owner
        self._slot: Slot | None = None
        self._is_busy = False
        self._is_wanted = False

    @property
    def has_slot(self) -> bool:
        """Whether it has the right to a connection."""
        return self._slot is not None

    def take_slot(self, most: int) -> bool:
        """Get the right to a connection, one of *most*; return whether it has one now."""
        if self._slot is None:
            self._links.drop_idle(self.standing)
            self._slot = self.standing.take_slot(most)
        return self._slot is not None

    def begin(self) -> None:
        """Begin a lookup: nobody shall take the connection away."""
        self._is_busy = True

    def end(self) -> None:
        """End a lookup."""
        if self._slot is not None:
            self._slot.used[0] = time.monotonic()
        self._is_busy = False
        if self._is_wanted or self.connection is None:
            self.drop()

    def opened(self, connection: C) -> None:
        """Go on with *connection*."""
        self.connection = connection
        if self._slot is not None:
            self._slot.used[0] = time.monotonic()
        self._links.look()

    def drop(self) -> None:
        """Close the connection, which may be broken, and let others have the right to it."""
        connection, self.connection = self.connection, None
        slot, self._slot = self._slot, None
        self._is_wanted = False
        try:
            if connection is not None:
                with contextlib.suppress(*self._owner.errors):
                    self._owner.hang_up(connection)
        finally:
            if slot is not None:
                slot.free()

    def look(self, now: float) -> float:
        """Drop the connection if others want it or nobody has used it for long; return when that will be."""
        slot = self._slot
        if slot is None:
            return _NEVER
        self._is_wanted = self._is_wanted or slot.is_wanted()
        if self._is_busy:
            return now + self.max_idle
        due = slot.used[0] + self.max_idle
        if self._is_wanted or not now < due:
            self.drop()
            return _NEVER
        return due


class Links:
    """The links of this process, by what makes one differ from another."""

    def __init__(self, sharing: Sharing | None = None) -> None:
        self._sharing = sharing or Alone()
        self._links: dict[Hashable, Link[Any]] = {}
        self._standings: dict[Hashable, Standing] = {}

    def link(
        self, owner: Owner[C], backend: Hashable, settings: Hashable, hosts: Sequence[str], label: str
    ) -> Link[C]:
        """Return the link to *backend*, on a connection with *settings*.

        Both may hold secrets; *label* is shown, and has none.
        """
        if backend not in self._standings:
            self._standings[backend] = self._sharing.standing(backend, label)
        identity = (backend, settings)
        if identity not in self._links:
            self._links[identity] = Link(self, owner, hosts, self._standings[backend], label)
        return self._links[identity]

    def look(self) -> None:
        """Let go of connections that others want, and of those that nobody has used for long.

        May be called at any time, from a signal handler too: a connection in use is left alone.
        """
        now = time.monotonic()
        due = min((link.look(now) for link in self._of_all()), default=_NEVER)
        if due < _NEVER:
            self._sharing.set_alarm(max(due - now, 0.001))

    def most_at(self, hosts: Sequence[str]) -> int:
        """Return how many connections all workers may have to *hosts*, whatever the account."""
        most: dict[int, int] = {}
        for link in self._of_all():
            if link.hosts == hosts:
                most[id(link.standing)] = max(link.most, most.get(id(link.standing), 0))
        return sum(most.values())

    def drop_idle(self, standing: Standing) -> None:
        """Let go of this process's other connections to a backend: it needs one of another kind."""
        for link in self._of_all():
            if link.standing is standing and link.has_slot and not link._is_busy:
                link.drop()

    def _of_all(self) -> Iterable[Link[Any]]:
        return list(self._links.values())  # a signal handler may come in between
