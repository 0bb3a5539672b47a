"""What the types that ask a server over the network have in common: connections, retries, and outages.

How one talks to the server is the type's business; this file decides when to connect, to which of the ``hosts``, and
when a lookup is tried again. What the processes of a server know of it together, and how many connections all of them
may have, is the business of ``backend``. smtpd(8) remembers a failed lookup as long as its process lives, so a
connection that broke unnoticed must not become a failure; and a worker that waits for a dead server answers nobody,
so a known outage must be answered at once.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

from prefork_socketmap import settings
from prefork_socketmap.maps import host as host_setting
from prefork_socketmap.maps.backend import Link, Links
from prefork_socketmap.maps.base import LookupFailedError, Map, UncheckedError, log
from prefork_socketmap.maps.setting import declared, setting
from prefork_socketmap.socketmap.messages import Reply

C = TypeVar("C")

_MOST_CONNECTIONS = 512
_FOREVER = float("inf")


class Trouble(enum.Enum):
    """What an error during a lookup means for the connection."""

    LOST = enum.auto()
    """The connection is gone: the lookup is tried once more, on a new one."""
    SLOW = enum.auto()
    """No answer in time: the connection is given up, and trying again would only take as long again."""
    REFUSED = enum.auto()
    """The server answered, with an error: the connection is good."""


def _when(key: str, value: object) -> str:
    return settings.choice(key, value, ("start", "first-use"))


def _most(key: str, value: object) -> int:
    return settings.count(key, value, 1, _MOST_CONNECTIONS)


def _share(key: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise settings.wrong(key, value, "a number above 0, up to 1")


class UnreachableError(Exception):
    """No host answers."""


class NetworkMap(Map, Generic[C]):
    """A map that asks a server. *C* is the type of the connection.

    A type defines ``dial``, ``ask``, ``hang_up`` and ``trouble``, and names its driver's errors in ``errors``.
    Outages, retries and the number of connections are looked after here.
    """

    hosts = setting(host_setting.hosts)
    """Servers. The first is used until it fails, then the next, and so on in a circle."""
    connect = setting(_when, "first-use")
    """``"start"``: connect when the worker starts, which it does not if no host can be reached. So a reload, for one,
    is refused then."""
    timeout = setting(settings.seconds, 5.0)
    """How long connecting, to whichever host, may take, as long again a query, and before both the wait for one of
    ``max_connections``."""
    max_connections = setting(_most, 20)
    """The most connections of all workers together to the same hosts with the same account, and how many of them are
    opened in a second."""
    max_connection_idle = setting(settings.seconds, 60.0)
    """A connection that is not used for so long is closed. 0: never."""
    max_workers_share = setting(_share, 0.75)
    """The most workers that may be held by lookups there at a time, as a share of ``process_limit``."""

    errors: ClassVar[tuple[type[Exception], ...]]
    """What the driver raises, OSError among it if it lets that through."""
    account: ClassVar[Sequence[str]] = ()
    """The settings that make, with ``hosts``, a backend: which server is asked, and who asks."""
    of_the_query: ClassVar[Sequence[str]] = ()
    """The settings, apart from those that every map has, that concern no connection: maps that differ in nothing else
    share one."""
    asks_as: ClassVar[type[NetworkMap[Any]] | None] = None
    """The type whose backends and connections this one has, if they are not its own."""

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        if not self.timeout:
            raise settings.wrong(f"maps.{name}.timeout", table["timeout"], "a time above 0")
        self._links: Callable[[], Links] | None = None
        self._link: Link[C] | None = None

    @abc.abstractmethod
    def dial(self, host: str, timeout: float) -> C:
        """Connect to *host* and log in, within *timeout* seconds; give queries ``self.timeout``.

        Raises one of ``errors``.
        """

    @abc.abstractmethod
    def ask(self, connection: C, key: str) -> Sequence[str] | None:
        """Return the values at *key*: the contract of ``find``, but that it may raise one of ``errors``, too."""

    @abc.abstractmethod
    def hang_up(self, connection: C) -> None:
        """Close *connection*, which may be broken."""

    @abc.abstractmethod
    def trouble(self, connection: C, error: Exception) -> Trouble:
        """Tell what *error*, raised by ``ask``, means."""

    def examine(self, connection: C) -> None:
        """Raise SettingError if no lookup can succeed on *connection*, UnreachableError if the server is silent."""

    def server_limit(self, connection: C) -> int | None:  # noqa: ARG002
        """Return how many connections the server takes in all; None if it does not say. Raises one of ``errors``."""
        return None

    def share(self, links: Callable[[], Links]) -> None:
        """Share connections with other maps of this process, and what is known of backends with other processes."""
        self._links = links

    @property
    def links(self) -> Links:
        """The connections of this process."""
        if self._links is None:
            own = Links()
            self._links = lambda: own
        return self._links()

    @property
    def own_link(self) -> Link[C]:
        """The connection to the ``hosts``, or the place for it."""
        if self._link is None:
            self._link = self.link_to(self.hosts)
        return self._link

    def link_to(self, hosts: Sequence[str]) -> Link[C]:
        """Return the connection to *hosts*, or the place for it."""
        kind = self._own_type
        backend = (kind.__module__, kind.__qualname__, tuple(hosts), *(getattr(self, name) for name in self.account))
        link: Link[C] = self.links.link(self, backend, self._settings_of_connection(), hosts, self._label(hosts))
        link.max_idle = max(link.max_idle, self.max_connection_idle or _FOREVER)
        link.most = max(link.most, self.max_connections)
        return link

    @property
    def _own_type(self) -> type[NetworkMap[Any]]:
        return self.asks_as or type(self)

    def _settings_of_connection(self) -> Hashable:
        apart = {*dict(declared(NetworkMap)), *self.of_the_query} - {"timeout"}
        own = ((name, getattr(self, name)) for name, _ in declared(type(self)) if name not in apart)
        return (self._own_type, self.base, *((name, _frozen(value)) for name, value in own))

    def _label(self, hosts: Sequence[str]) -> str:
        """Return how the backend is called where everybody may read it."""
        kind = self._own_type.__name__.removesuffix("Map").lower()
        who = next((f"{user}@" for name in ("user", "bind_dn") if (user := getattr(self, name, ""))), "")
        others = f" and {len(hosts) - 1} more" if len(hosts) > 1 else ""
        return f"{kind} {who}{hosts[0]}{others}"

    def blamed(self, error: Exception) -> str:  # noqa: ARG002
        """Return the key that is to blame for *error*, which ``dial`` has raised."""
        return "hosts"

    def verify(self) -> None:
        """Connect to each host, and examine what is there. It is enough if one is, but the others are told of."""
        problems: dict[str, str] = {}
        for host in self.hosts:
            try:
                connection = self.dial(host, self.timeout / len(self.hosts))
            except self.errors as error:
                problems[host] = f"{host}: {error}"
                if (key := self.blamed(error)) not in ("hosts", "url"):
                    raise settings.SettingError(f"maps.{self.name}.{key}", problems[host]) from error
                continue
            try:
                self.examine(connection)
            except UnreachableError as error:
                problems[host] = f"{host}: {error}"
            finally:
                with contextlib.suppress(*self.errors):
                    self.hang_up(connection)
        if len(problems) == len(self.hosts):
            key = self.blamed(OSError())
            raise UncheckedError(f"maps.{self.name}.{key}", f"cannot connect: {'; '.join(problems.values())}")
        for problem in problems.values():
            log.warning("map %s: cannot connect: %s", self.name, problem, extra={"map": self.name})

    def prepare(self) -> None:
        """Connect, if ``connect`` says so, and examine the connection. Raises SettingError when either fails."""
        link = self.own_link
        if self.connect != "start":
            return
        link.begin()
        try:
            # If there is no room for it, those who have connected have found out.
            if link.take_slot(self.max_connections):
                self.examine(self._dial(link))
        except UnreachableError as error:
            link.drop()
            raise settings.SettingError(f"maps.{self.name}.hosts", str(error)) from error
        finally:
            link.end()

    def connect_now(self) -> C:
        """Connect, whatever ``connect`` says, unless there is a connection. Raises UnreachableError."""
        if not self.own_link.take_slot(self.max_connections):
            raise UnreachableError(self._no_room())
        return self._dial(self.own_link)

    def release(self) -> None:
        """Close the connection."""
        self.own_link.drop()

    def find(self, key: str) -> Sequence[str] | None:
        """Ask the server; once more on a new connection if the one that was there turns out to be broken."""
        return self.find_at(self._link or self.own_link, key)

    def find_at(self, link: Link[C], key: str) -> Sequence[str] | None:
        """Do so at the other end of *link*."""
        health, standing = link.health, link.standing
        if health.cells.trouble[0] and health.refuses():
            raise self._unavailable()
        if not standing.enter(self.max_workers_share):
            health.end_attempt()
            problem = f"max_workers_share = {self.max_workers_share:g} of all workers wait for the backend"
            raise LookupFailedError(Reply.temp_fail(f"map {self.name}: {problem}"))
        link.begin()
        try:
            connection = link.connection
            if connection is not None:
                try:
                    return self._ask(link, connection, key)
                except _ConnectionLostError as error:
                    log.info("map %s: connection lost, connecting again: %s", self.name, error)
            try:
                return self._ask(link, self._connect(link), key)
            except _ConnectionLostError as error:
                raise self._broken(link, key, f"connection lost: {error}", is_slow=False) from error
        finally:
            link.end()
            standing.leave()
            if health.is_trying:
                health.end_attempt()

    def leave_alone(self, seconds: float) -> None:
        """Ask nothing for so long: the server has said so."""
        self.own_link.health.leave_alone(seconds)

    def _ask(self, link: Link[C], connection: C, key: str) -> Sequence[str] | None:
        try:
            values = self.ask(connection, key)
        except LookupFailedError:
            self._note_whole_answer(link)
            raise
        except TimeoutError:
            # How the watchdog interrupts a lookup. The connection is in the middle of something.
            link.drop()
            raise
        except self.errors as error:
            self._judge(link, connection, key, error)
        except BaseException:
            link.drop()
            raise
        self._note_whole_answer(link)
        return values

    def _note_whole_answer(self, link: Link[C]) -> None:
        if link.health.cells.trouble[0]:
            link.health.note_whole_answer()

    def _judge(self, link: Link[C], connection: C, key: str, error: Exception) -> NoReturn:
        """Raise what follows from *error*, after the connection is dropped if it is not good any more."""
        trouble = self.trouble(connection, error)
        if trouble is Trouble.REFUSED:
            self._note_whole_answer(link)
            self.complaints.log(logging.ERROR, "%s", error)
            raise LookupFailedError(Reply.temp_fail(f"map {self.name}: the query failed")) from error
        link.drop()
        link.host += 1
        if trouble is Trouble.LOST:
            raise _ConnectionLostError(str(error)) from error
        problem = f"no answer within {self.timeout:g} s: {error}"
        raise self._broken(link, key, problem, is_slow=True) from error

    def _broken(self, link: Link[C], key: str, problem: str, *, is_slow: bool) -> LookupFailedError:
        """Return the error to raise for *key*, whose answer has broken although the server could be reached."""
        if link.health.note_broken_answer(key, is_slow=is_slow):
            return self._outage(link, problem)
        self.complaints.log(logging.ERROR, "%r: %s", key, problem)
        return self._unavailable()

    def _connect(self, link: Link[C]) -> C:
        """Connect. Raises LookupFailedError."""
        if not link.take_slot(self.max_connections):
            self._await_slot(link)
        try:
            return self._dial(link)
        except UnreachableError as error:
            if link.health.is_trying or not link.standing.serves_others():
                raise self._outage(link, str(error)) from error
            # The trouble is ours: the server has no room for one more connection, say, or this process has none.
            self.complaints.log(logging.ERROR, "%s", error)
            raise self._unavailable() from error

    def _await_slot(self, link: Link[C]) -> None:
        """Wait until there may be one more connection. Raises LookupFailedError."""
        deadline = time.monotonic() + self.timeout
        health = link.health
        while not link.take_slot(self.max_connections):
            if health.cells.trouble[0] and health.refuses():
                raise self._unavailable()
            if time.monotonic() >= deadline:
                self.complaints.log(logging.WARNING, "%s", self._no_room())
                raise LookupFailedError(Reply.temp_fail(f"map {self.name}: {self._no_room()}"))
            time.sleep(link.standing.ask_for_slot(self.max_connections))

    def _no_room(self) -> str:
        return f"all connections that may be to the backend (max_connections = {self.max_connections}) are in use"

    def _dial(self, link: Link[C]) -> C:
        """Connect to the first host that answers, beginning with the current one. Raises UnreachableError."""
        if link.connection is not None:
            return link.connection
        deadline = time.monotonic() + self.timeout
        problems = []
        for left in range(len(link.hosts), 0, -1):
            host = link.hosts[link.host % len(link.hosts)]
            try:
                # Each host gets its share, so that a dead one leaves time for the next; never 0, which drivers
                # take for "as long as it takes".
                connection = self.dial(host, max((deadline - time.monotonic()) / left, 0.1))
            except self.errors as error:
                problems.append(f"{host}: {error}")
                link.host += 1
            else:
                log.info("map %s: connected to %s", self.name, host)
                link.opened(connection)
                self._compare_limits(link, connection)
                return connection
        raise UnreachableError("cannot connect: " + "; ".join(problems))

    def _compare_limits(self, link: Link[C], connection: C) -> None:
        """Warn, once for all workers, if the server takes fewer connections than ``max_connections``."""
        limit = link.health.cells.limit
        if limit[0]:
            return
        limit[0] = -1.0
        try:
            found = self.server_limit(connection)
        except self.errors as error:
            log.debug("map %s: the server does not say how many connections it takes: %s", self.name, error)
            return
        if found is None:
            return
        limit[0] = float(found)
        wanted = max(self.max_connections, self.links.most_at(link.hosts))
        if found < wanted:
            text = "map %s: the server takes %d connections in all, and max_connections of the maps that ask it is %d"
            log.warning(text, self.name, found, wanted, extra={"map": self.name})

    def _outage(self, link: Link[C], problem: str) -> LookupFailedError:
        """Begin a pause, longer than the one before; return the error to raise."""
        pause = link.health.note_outage()
        text = "map %s: %s; next attempt in %.1f s"
        log.error(text, self.name, problem, pause, extra={"map": self.name})
        return self._unavailable()

    def _unavailable(self) -> LookupFailedError:
        return LookupFailedError(Reply.temp_fail(f"map {self.name}: the backend is not available"))


class _ConnectionLostError(Exception):
    """The connection broke under a lookup."""


def _frozen(value: Any) -> Hashable:
    """Return what stands for a setting's value in a key of a dictionary."""
    if isinstance(value, dict):
        return tuple((name, _frozen(entry)) for name, entry in value.items())
    return value if isinstance(value, Hashable) else repr(value)
