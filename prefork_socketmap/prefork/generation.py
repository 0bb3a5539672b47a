"""Generations: the workers of one plan, and the listeners that they share.

A reload makes a new generation out of a new plan. It takes over the listeners that both name, binds what is new, and
gives up only after it has proved itself (``commit``); until then it can be undone without a trace
(``close_listeners``).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from typing import Self

from prefork_socketmap.prefork.duty import Duty
from prefork_socketmap.prefork.listener import Endpoint, Listener, open_listener, resolve, take_in
from prefork_socketmap.prefork.plan import Plan

log = logging.getLogger("prefork_socketmap.master")


class Generation:
    """A plan with a number, its listeners, and its places on duty."""

    def __init__(
        self, number: int, plan: Plan, duty: Duty, existing: Sequence[Listener], inherited: Sequence[Listener]
    ) -> None:
        """Bind what *plan* names and *existing* does not have. Raises ListenError; then nothing has changed."""
        self.number = number
        self.plan = plan
        self.duty = duty
        self._kept: list[tuple[Listener, Endpoint]] = []
        self._given: list[Listener] = []
        self._opened: list[Listener] = []
        self._inherited = inherited
        try:
            for endpoint in plan.endpoints:
                for address in resolve(endpoint):
                    self._bind(address, existing)
            for sock in plan.sockets:
                self._take_in(sock, existing)
        except OSError:
            self.close_listeners()
            raise

    @classmethod
    def resume(
        cls, number: int, plan: Plan, duty: Duty, listeners: Sequence[Listener], inherited: Sequence[Listener]
    ) -> Self:
        """Go on with a generation of the program that was here before; *plan* is what it would be by now."""
        generation = cls.__new__(cls)
        generation.number = number
        generation.plan = plan
        generation.duty = duty
        generation._kept = [(listener, listener.wanted) for listener in listeners]
        generation._given = []
        generation._opened = []
        generation._inherited = inherited
        return generation

    def _bind(self, address: Endpoint, existing: Sequence[Listener]) -> None:
        for listener in existing:
            if address in (listener.wanted, listener.endpoint) and listener.is_in_place():
                self._kept.append((listener, address))
                return
        self._opened.append(open_listener(address, self.plan.limits.backlog))

    def _take_in(self, sock: socket.socket, existing: Sequence[Listener]) -> None:
        for listener in (*existing, *self._opened):
            if listener.is_of(sock):
                self._given.append(listener)
                return
        self._opened.append(take_in(sock, self.plan.limits.backlog))

    @property
    def listeners(self) -> list[Listener]:
        """The listeners that its workers accept from: the configured, the given, and all that were inherited."""
        kept = [listener for listener, _ in self._kept]
        return list(dict.fromkeys([*kept, *self._given, *self._opened, *self._inherited]))

    def commit(self) -> None:
        """Apply to the listeners that were kept what the plan says of them."""
        for listener, endpoint in self._kept:
            try:
                listener.set_up(endpoint, self.plan.limits.backlog)
            except (OSError, ValueError) as error:
                log.warning("%s keeps its old permissions: %s", listener.endpoint, error)

    def close_listeners(self) -> None:
        """Close what this generation has opened, and remove what it has bound."""
        for listener in self._opened:
            listener.close(unlink=True)
        self._opened.clear()
