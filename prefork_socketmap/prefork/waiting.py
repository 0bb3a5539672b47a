"""How a worker waits for a silent client whose connection it cannot park: for signals and the master's end, too."""

from __future__ import annotations

import select
import socket

from prefork_socketmap.prefork.signals import Signals

LONGEST_WAIT = 1e6
"""Seconds that one wait may take, since the kernel counts milliseconds in 32 bits. For more, ask again."""


class SilenceWait:
    """Waits for a silent client. *lifeline* is a descriptor that ends with the master."""

    def __init__(self, signals: Signals, lifeline: int) -> None:
        self._signals = signals
        self._poll = select.poll()
        self._poll.register(signals.fileno(), select.POLLIN)
        self._poll.register(lifeline, select.POLLIN)

    def wait(self, sock: socket.socket, timeout: float) -> bool:
        """Return whether *sock* has something to read within *timeout* seconds; False, too, when more has."""
        self._poll.register(sock, select.POLLIN)
        try:
            ready = {fd for fd, _ in self._poll.poll(timeout * 1000)}
        finally:
            self._poll.unregister(sock)
        self._signals.take()
        return ready == {sock.fileno()}
