"""How a worker waits for a silent client whose connection it cannot park: for the master's end, too."""

from __future__ import annotations

import select
import socket

LONGEST_WAIT = 1e6
"""Seconds that one wait may take, since the kernel counts milliseconds in 32 bits. For more, ask again."""


def wait_for_words(sock: socket.socket, lifeline: int, timeout: float) -> bool:
    """Return whether *sock* has something to read within *timeout* seconds; False, too, when *lifeline* has."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(lifeline, select.POLLIN)
    return {fd for fd, _ in poll.poll(timeout * 1000)} == {sock.fileno()}
