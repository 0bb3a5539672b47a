"""How a worker waits: for a connection from any source, or for its silent client, and always for signals too."""

from __future__ import annotations

import select
import selectors
import socket
from collections.abc import Sequence

from prefork_socketmap.prefork.channel import Channel
from prefork_socketmap.prefork.listener import Listener
from prefork_socketmap.prefork.signals import Signals

Source = Listener | Channel

LONGEST_WAIT = 1e6
"""Seconds that one wait may take: the kernel counts milliseconds in 32 bits. Whoever waits longer asks again."""


class SourceWait:
    """Waits until a source may have a connection, or a signal has arrived.

    All workers wait on the same sources. With EPOLLEXCLUSIVE (Linux) a connection wakes one of them; elsewhere all
    that are idle wake, and the losers find nothing.
    """

    def __init__(self, sources: Sequence[Source], signals: Signals) -> None:
        self._signals = signals
        self._sources = {_fileno(source): source for source in sources}
        self._epoll: select.epoll | None = None
        if hasattr(select, "epoll"):
            self._epoll = select.epoll()
            self._epoll.register(signals.fileno(), select.EPOLLIN)
            for fd in self._sources:
                self._epoll.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        else:
            self._selector = selectors.DefaultSelector()
            for fd in [signals.fileno(), *self._sources]:
                self._selector.register(fd, selectors.EVENT_READ)

    def wait(self) -> list[Source]:
        """Return the sources that are ready; none when a signal was the reason to wake up."""
        ready = self._ready()
        if self._signals.fileno() in ready:
            self._signals.take()
        return [self._sources[fd] for fd in ready if fd in self._sources]

    def _ready(self) -> list[int]:
        if self._epoll:
            return [fd for fd, _ in self._epoll.poll()]
        return [key.fd for key, _ in self._selector.select()]


class SilenceWait:
    """Waits for a silent client, for signals, and for the end of the master."""

    def __init__(self, signals: Signals, lot: Channel) -> None:
        self._signals = signals
        self._poll = select.poll()
        self._poll.register(signals.fileno(), select.POLLIN)
        # No event is asked for, so parked connections of others do not wake us; the end of the channel does.
        self._lot = lot.fileno()
        self._poll.register(self._lot, 0)

    def wait(self, sock: socket.socket, timeout: float | None) -> set[int]:
        """Return the descriptors that are ready within *timeout* seconds (None: without limit): perhaps *sock*'s.

        None may be ready a little earlier, when *timeout* is longer than LONGEST_WAIT.
        """
        self._poll.register(sock, select.POLLIN)
        try:
            ready = {fd for fd, _ in self._poll.poll(None if timeout is None else min(timeout, LONGEST_WAIT) * 1000)}
        finally:
            self._poll.unregister(sock)
        if self._signals.fileno() in ready:
            self._signals.take()
        return ready

    def master_is_gone(self, ready: set[int]) -> bool:
        """Whether what ``wait`` returned says that the master is gone."""
        return self._lot in ready


def _fileno(source: Source) -> int:
    return source.sock.fileno()
