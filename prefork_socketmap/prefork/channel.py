"""Messages between the master and its workers: short packets that may carry a connection.

All workers share one channel to the master, the *inbox*. A worker that asks for something encloses the end of a new
channel, for the answer: most never ask, and one that was made before the fork would have to be closed in all others.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from typing import NamedTuple

_HEADER = struct.Struct("=BIHIQ")  # kind, pid of the sender, address family of the connection, number, serial
_MAX_TEXT = 4000
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Kind(enum.IntEnum):
    """What a message says."""

    READY = 1
    FAILED = 2  # to start; the text says why
    SHORTAGE = 3  # fewer than min_spare workers are idle
    EMPTY_FRONT = 4  # no idle worker waits at the front, nor can one be called from the reserve
    PARK = 5  # here is a connection for the lot
    FETCH = 6  # give me the connection with this number, by the enclosed channel
    FETCHED = 7  # here it is, unless it is gone
    GONE = 8  # the connection with this number and serial has ended


class Message(NamedTuple):
    """One message; ``connection``, which was enclosed, is a socket that now belongs to the receiver."""

    kind: Kind
    pid: int
    number: int
    serial: int
    text: str
    connection: socket.socket | None


class Channel:
    """One end of a channel. ``send`` on one end, ``receive`` on the other; ``receive`` never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)  # whatever default the program has set
        self.sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Return the receiving and the sending end of a new channel."""
        # Packets keep their boundaries, and unlike datagrams they have an end that can be seen.
        receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(receiver), cls(sender)

    @classmethod
    def resume(cls, fd: int) -> Channel:
        """Go on with an end whose descriptor is *fd*."""
        return cls(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd))

    def not_blocking(self) -> Channel:
        """Return this end, which from now on does not block."""
        self.sock.setblocking(False)
        return self

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self.sock.fileno()

    def send(
        self, kind: Kind, *, number: int = 0, serial: int = 0, text: str = "", connection: socket.socket | None = None
    ) -> None:
        """Send a message, with a duplicate of *connection*'s descriptor: the caller keeps its own.

        Raises OSError when nobody receives.
        """
        header = _HEADER.pack(kind, os.getpid(), connection.family if connection else 0, number, serial)
        if connection:
            socket.send_fds(self.sock, [header], [connection.fileno()])
        else:
            self.sock.send(header + text.encode("utf-8", "replace")[:_MAX_TEXT])

    def receive(self) -> Message | None:
        """Return the next message; None when there is none, on a channel that does not block.

        Raises EOFError when no sender is left.
        """
        try:
            data, descriptors, _, _ = socket.recv_fds(self.sock, _HEADER.size + _MAX_TEXT, 1, _CLOSE_ON_EXEC)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        kind, pid, family, number, serial = _HEADER.unpack_from(data)
        # The family is told, not asked: socket.socket(fileno=...) alone costs three system calls.
        connection = socket.socket(family, socket.SOCK_STREAM, 0, descriptors[0]) if descriptors else None
        return Message(Kind(kind), pid, number, serial, data[_HEADER.size :].decode("utf-8", "replace"), connection)

    def close(self) -> None:
        """Close this end."""
        self.sock.close()
