"""Plans and generations: what workers are to do, and the listeners that one plan's workers share.

A reload makes a new generation out of a new plan. It takes over the listeners that both name, binds what is new, and
gives up only after it has proved itself (``commit``); until then it can be undone without a trace (``abandon``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from setproctitle import setproctitle

from prefork_socketmap.prefork.connection import Handler
from prefork_socketmap.prefork.limits import Limits
from prefork_socketmap.prefork.listener import Endpoint, Listener, open_listener, resolve
from prefork_socketmap.prefork.tallies import Tallies

log = logging.getLogger("prefork_socketmap.master")


@dataclass(frozen=True)
class Plan:
    """What a generation of workers does.

    *endpoints*: where it listens, beside the sockets that the master inherited. *start* runs in each worker after
    the fork and returns what serves a connection; whatever it raises means that the worker cannot start. It gets the
    tallies to count jobs with, which *names* are for. *allow* tells from an IP address whether a TCP client may
    connect (None: all may). *title* begins the process titles, and the master's ends with *source*, a file.
    """

    endpoints: Sequence[Endpoint]
    limits: Limits
    start: Callable[[Tallies], Handler]
    names: Sequence[str] = ()
    allow: Callable[[str], bool] | None = None
    title: str = "prefork-socketmap"
    source: str = ""

    def set_master_title(self) -> None:
        """Set the master's process title."""
        setproctitle(f"{self.title}: master" + (f" [{self.source}]" if self.source else ""))


class Generation:
    """A plan with a number and its listeners."""

    def __init__(self, number: int, plan: Plan, existing: Sequence[Listener], inherited: Sequence[Listener]) -> None:
        """Bind what *plan* names and *existing* does not have. Raises ListenError; then nothing has changed."""
        self.number = number
        self.plan = plan
        self._kept: list[tuple[Listener, Endpoint]] = []
        self._opened: list[Listener] = []
        self._inherited = inherited
        try:
            for endpoint in plan.endpoints:
                for address in resolve(endpoint):
                    self._bind(address, existing)
        except OSError:
            self.abandon()
            raise

    @classmethod
    def resume(cls, number: int, plan: Plan, listeners: Sequence[Listener], inherited: Sequence[Listener]) -> Self:
        """Go on with a generation of the program that was here before; *plan* is what it would be by now."""
        generation = cls.__new__(cls)
        generation.number = number
        generation.plan = plan
        generation._kept = [(listener, listener.wanted) for listener in listeners]
        generation._opened = []
        generation._inherited = inherited
        return generation

    def _bind(self, address: Endpoint, existing: Sequence[Listener]) -> None:
        for listener in existing:
            if address in (listener.wanted, listener.endpoint):
                self._kept.append((listener, address))
                return
        self._opened.append(open_listener(address, self.plan.limits.backlog))

    @property
    def listeners(self) -> list[Listener]:
        """The listeners that its workers accept from: the configured ones, and all that were inherited."""
        kept = [listener for listener, _ in self._kept]
        return list(dict.fromkeys([*kept, *self._opened, *self._inherited]))

    def commit(self) -> None:
        """Apply to the listeners that were kept what the plan says of them."""
        for listener, endpoint in self._kept:
            try:
                listener.set_up(endpoint, self.plan.limits.backlog)
            except (OSError, ValueError) as error:
                log.warning("%s keeps its old permissions: %s", listener.endpoint, error)

    def abandon(self) -> None:
        """Close and remove what this generation has bound."""
        for listener in self._opened:
            listener.close(unlink=True)
        self._opened.clear()
