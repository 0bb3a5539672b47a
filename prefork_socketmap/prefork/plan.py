"""What the program that embeds the process model gives it: a plan, its limits, and an observer of what happens."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from setproctitle import setproctitle

from prefork_socketmap.prefork.connection import Handler, Timeouts
from prefork_socketmap.prefork.counters import SlotCounters
from prefork_socketmap.prefork.listener import Endpoint

log = logging.getLogger("prefork_socketmap.master")


class Limits(Timeouts, Protocol):
    """Times in seconds; 0 switches a limit off. ``prefork_socketmap.Config`` has all of them, and documents them."""

    @property
    def process_limit(self) -> int: ...  # noqa: D102
    @property
    def min_spare(self) -> int: ...  # noqa: D102
    @property
    def max_use(self) -> int: ...  # noqa: D102
    @property
    def max_idle(self) -> float: ...  # noqa: D102
    @property
    def max_connections(self) -> int: ...  # noqa: D102
    @property
    def keepalive_timeout(self) -> float: ...  # noqa: D102
    @property
    def idle_timeout(self) -> float: ...  # noqa: D102
    @property
    def lookup_timeout(self) -> float: ...  # noqa: D102
    @property
    def stop_timeout(self) -> float: ...  # noqa: D102
    @property
    def backlog(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Plan:
    """What a generation of workers does.

    *endpoints*: where it listens, beside *sockets*, which the embedding program has bound and keeps, and those that
    the master inherited. *start* runs in each worker after the fork and returns what serves a connection; whatever it
    raises means that the worker cannot start. It gets the counters of its jobs, which *names* are for. *defers* tells
    in a worker in reserve, from how many there are, whether to leave a call to another one, which has to exist.
    *stop* runs in each worker that leaves, after its last job. *allow* tells from an IP address whether a TCP client
    may connect (None: all may). *title* begins the process titles, and the master's ends with *source*, a file.
    """

    endpoints: Sequence[Endpoint]
    limits: Limits
    start: Callable[[SlotCounters], Handler]
    names: Sequence[str] = ()
    defers: Callable[[int], bool] = lambda _number: False
    allow: Callable[[str], bool] | None = None
    title: str = "prefork-socketmap"
    source: str = ""
    stop: Callable[[], object] = lambda: None
    sockets: Sequence[socket.socket] = ()

    def set_master_title(self) -> None:
        """Set the master's process title."""
        setproctitle(f"{self.title}: master" + (f" [{self.source}]" if self.source else ""))


class Observer:
    """What the embedding program wants to know of the master's life. Called in the master's process."""

    def ready(self, generation: int) -> None:
        """The first generation serves."""

    def reloading(self) -> None:
        """A reload, or an upgrade, begins."""

    def reloaded(self, generation: int, problem: str | None) -> None:
        """It is over: *generation* serves now; *problem* is the reason when the change was refused."""

    def stopping(self) -> None:
        """The server stops serving."""

    def due(self, now: float) -> float:  # noqa: ARG002
        """Do what is to be done regularly, at *now* on the monotonic clock; return when to be called again."""
        return float("inf")


def tell(event: Callable[[], None]) -> None:
    """Tell an observer of *event*. What goes wrong there is no reason to stop serving."""
    try:
        event()
    except OSError as error:  # a disk that is full; where in our code it was found out says nothing
        log.error("a change of state could not be noted for others: %s", error)
    except Exception:
        log.exception("after-effects of a change of state are incomplete")
