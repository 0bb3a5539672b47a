"""Messages between the master and its workers: short datagrams that may carry a connection.

There are two channels, both shared by all workers. In the *inbox* workers report to the master (ready, failed, no
spare worker left, here is a connection to park). The *lot* carries parked connections to whichever worker takes
them first; as a worker's end of it closes only with the master, it tells the workers, too, that the master is gone.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from typing import NamedTuple

_HEADER = struct.Struct("=BIH")  # kind, pid of the sender, address family of the connection
_MAX_TEXT = 4000
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Kind(enum.IntEnum):
    """What a message says."""

    READY = 1
    FAILED = 2  # to start; the text says why
    SPARE = 3  # too few idle workers are left
    CONNECTION = 4  # with a descriptor: a connection that changes hands


class Message(NamedTuple):
    """One message; ``connection`` is a socket that now belongs to the receiver."""

    kind: Kind
    pid: int
    text: str = ""
    connection: socket.socket | None = None


class Channel:
    """One end of a channel. ``send`` on one end, ``receive`` on the other; ``receive`` never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Return the receiving and the sending end of a new channel."""
        # Packets keep their boundaries, and unlike datagrams they have an end that can be seen.
        receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        receiver.setblocking(False)
        return cls(receiver), cls(sender)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self.sock.fileno()

    def send(self, kind: Kind, text: str = "", connection: socket.socket | None = None) -> None:
        """Send a message, with a duplicate of *connection*'s descriptor: the caller closes its own.

        Raises BlockingIOError on a non-blocking channel that is full, another OSError when nobody receives.
        """
        family = connection.family if connection else 0
        header = _HEADER.pack(kind, os.getpid(), family)
        if connection:
            socket.send_fds(self.sock, [header], [connection.fileno()])
        else:
            self.sock.send(header + text.encode("utf-8", "replace")[:_MAX_TEXT])

    def receive(self) -> Message | None:
        """Return the next message, or None when there is none. Raises EOFError when no sender is left."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.sock, _HEADER.size + _MAX_TEXT, 1, _CLOSE_ON_EXEC)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        kind, pid, family = _HEADER.unpack_from(data)
        # The family is told, not asked: socket.socket(fileno=...) alone costs three system calls.
        connection = socket.socket(family, socket.SOCK_STREAM, 0, descriptors[0]) if descriptors else None
        return Message(Kind(kind), pid, data[_HEADER.size :].decode("utf-8", "replace"), connection)

    def close(self) -> None:
        """Close this end."""
        self.sock.close()
