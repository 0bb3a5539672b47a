"""What the map types have in common that ask a server over the network: one kept connection per worker and map.

How one talks to the server is the type's business; this file decides when to connect, to which of the ``hosts``, when
a lookup is tried again, and how long a server that is down is left alone. smtpd(8) remembers a failed lookup as long
as its process lives, so a connection that broke unnoticed must not become a failure; and a worker that waits for a
dead server answers nobody, so a known outage must be answered at once.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Generic, NoReturn, TypeVar

from prefork_socketmap import settings
from prefork_socketmap.maps import host as host_setting
from prefork_socketmap.maps.base import LookupFailedError, Map, UncheckedError, log
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.socketmap.messages import Reply

C = TypeVar("C")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0


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


class UnreachableError(Exception):
    """No host answers."""


class NetworkMap(Map, Generic[C]):
    """A map that asks a server. *C* is the type of the connection.

    A type defines ``dial``, ``ask``, ``hang_up`` and ``trouble``, and names its driver's errors in ``errors``.
    """

    hosts = setting(host_setting.hosts)
    """Servers. The first is used until it fails, then the next, and so on in a circle."""
    connect = setting(_when, "first-use")
    """``"start"``: connect when the worker starts, which it does not if no host can be reached. So a reload, for one,
    is refused then."""
    timeout = setting(settings.seconds, 5.0)
    """How long connecting, to whichever host, may take, and as long again a query."""

    errors: ClassVar[tuple[type[Exception], ...]]
    """What the driver raises, OSError among it if it lets that through."""
    one_key_can_break_it: ClassVar[bool] = False
    """Whether a server that answers others may break off, or not answer, for one key. Then an answer that breaks is
    that key's trouble, until another key's breaks, too, with none between the two that is whole."""

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        if not self.timeout:
            raise settings.wrong(f"maps.{name}.timeout", table["timeout"], "a time above 0")
        self._connection: C | None = None
        self._host = 0
        self._pause = 0.0
        self._resume = float("-inf")
        # The key whose answer has broken since the last one that was whole.
        self._suspect: str | None = None

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
        if self.connect == "start":
            try:
                self.examine(self.connect_now())
            except UnreachableError as error:
                raise settings.SettingError(f"maps.{self.name}.hosts", str(error)) from error

    def connect_now(self) -> C:
        """Connect, whatever ``connect`` says, unless there is a connection. Raises UnreachableError."""
        if self._connection is None:
            self._connection = self._dial_hosts()
        return self._connection

    def release(self) -> None:
        """Close the connection."""
        self._drop()

    def find(self, key: str) -> Sequence[str] | None:
        """Ask the server; once more on a new connection if the one that was there turns out to be broken."""
        if time.monotonic() < self._resume:
            raise self._unavailable()
        if self._connection is not None:
            try:
                return self._ask(self._connection, key)
            except _ConnectionLostError as error:
                log.info("map %s: connection lost, connecting again: %s", self.name, error)
        try:
            return self._ask(self._connect(), key)
        except _ConnectionLostError as error:
            raise self._broken(key, f"connection lost: {error}", Trouble.LOST) from error

    def leave_alone(self, seconds: float) -> None:
        """Ask nothing for so long: the server has said so."""
        self._resume = max(self._resume, time.monotonic() + seconds)

    def _ask(self, connection: C, key: str) -> Sequence[str] | None:
        try:
            values = self.ask(connection, key)
        except LookupFailedError:
            self._suspect = None
            raise
        except TimeoutError:
            # How the watchdog interrupts a lookup. The connection is in the middle of something.
            self._drop()
            raise
        except self.errors as error:
            self._judge(connection, key, error)
        except BaseException:
            self._drop()
            raise
        self._pause = 0.0
        self._suspect = None
        return values

    def _judge(self, connection: C, key: str, error: Exception) -> NoReturn:
        """Raise what follows from *error*, after the connection is dropped if it is not good any more."""
        trouble = self.trouble(connection, error)
        if trouble is Trouble.REFUSED:
            self._pause = 0.0
            self._suspect = None
            self.complaints.log(logging.ERROR, "%s", error)
            raise LookupFailedError(Reply.temp_fail(f"map {self.name}: the query failed")) from error
        self._drop()
        self._host += 1
        if trouble is Trouble.LOST:
            raise _ConnectionLostError(str(error)) from error
        raise self._broken(key, f"no answer within {self.timeout:g} s: {error}", Trouble.SLOW) from error

    def _broken(self, key: str, problem: str, trouble: Trouble) -> LookupFailedError:
        """Return the error to raise for *key*, whose answer has broken although the server could be reached."""
        # Nobody waits again and again for the one key that a frozen server is asked for.
        excused = (None,) if trouble is Trouble.SLOW else (None, key)
        if not self.one_key_can_break_it or self._suspect not in excused:
            return self._outage(problem)
        self._suspect = key
        self.complaints.log(logging.ERROR, "%r: %s", key, problem)
        return self._unavailable()

    def _connect(self) -> C:
        """Connect. Raises LookupFailedError."""
        try:
            return self.connect_now()
        except UnreachableError as error:
            raise self._outage(str(error)) from error

    def _dial_hosts(self) -> C:
        """Connect to the first host that answers, beginning with the current one. Raises UnreachableError."""
        deadline = time.monotonic() + self.timeout
        problems = []
        for left in range(len(self.hosts), 0, -1):
            host = self.hosts[self._host % len(self.hosts)]
            try:
                # Each host gets its share, so that a dead one leaves time for the next; never 0, which drivers
                # take for "as long as it takes".
                connection = self.dial(host, max((deadline - time.monotonic()) / left, 0.1))
            except self.errors as error:
                problems.append(f"{host}: {error}")
                self._host += 1
            else:
                log.info("map %s: connected to %s", self.name, host)
                return connection
        raise UnreachableError("cannot connect: " + "; ".join(problems))

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*self.errors):
                self.hang_up(connection)

    def _outage(self, problem: str) -> LookupFailedError:
        """Begin a pause, longer than the one before; return the error to raise."""
        self._pause = min(self._pause * 2, LONGEST_PAUSE) or FIRST_PAUSE
        self._resume = time.monotonic() + self._pause
        text = "map %s: %s; next attempt in %.1f s"
        log.error(text, self.name, problem, self._pause, extra={"map": self.name})
        return self._unavailable()

    def _unavailable(self) -> LookupFailedError:
        return LookupFailedError(Reply.temp_fail(f"map {self.name}: the backend is not available"))


class _ConnectionLostError(Exception):
    """The connection broke under a lookup."""
