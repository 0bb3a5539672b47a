"""Messages between the workers and the master: short packets that may carry descriptors.

All workers share one way to the master, its ``Inbox``. A worker that wants an answer encloses the end of a new
channel for it: most never ask, and one that was made before the fork would have to be closed in all others.

The master takes no worker's word for anything. Who sent a packet is what the kernel says (SCM_CREDENTIALS, unix(7)),
and one that is not a message by the letter is a ``BadMessageError``: it costs its sender its life, and nobody else
anything.
"""

from __future__ import annotations

import array
import enum
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prefork_socketmap.prefork.shared import let_go

_HEADER = struct.Struct("=BQQ")  # kind, number, serial
_MAX_TEXT = 4000
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_MAX_ENCLOSED = 1
_PLACE = struct.Struct("=IQQH")  # of an answer: number, serial, arrival, address family
# Descriptors in one packet. The kernel takes 253 (SCM_MAX_FD), but on their way they have numbers below those of
# connections, where there may be few (see ``master``).
_BATCH = 32
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


class Kind(enum.IntEnum):
    """What a message says. The comments tell what *number* and *serial* are, and what is enclosed."""

    READY = 1
    FAILED = 2  # to start; the text says why; number: whether a setting is wrong
    KEEP = 3  # the new connection with this number and serial, which is in the set by now
    OFFER = 4  # the same, but to be decided upon, since there are many connections
    FETCH = 5  # all connections that came after arrival number *serial*; a channel for the answers
    GONE = 6  # the connection with this number and serial is over: end it for everybody
    ENDED = 7  # it is over, and ends by itself when the client has its last reply


_ENCLOSED = {Kind.READY: 0, Kind.FAILED: 0, Kind.KEEP: 1, Kind.OFFER: 1, Kind.FETCH: 1, Kind.GONE: 0, Kind.ENDED: 0}


class BadMessageError(Exception):
    """The process *pid* has sent something that is no message."""

    def __init__(self, pid: int, problem: str, enclosed: Sequence[int] = ()) -> None:
        """*enclosed*: the descriptors that came with it, which nobody has closed yet."""
        super().__init__(problem)
        self.pid = pid
        self.enclosed = enclosed


class InboxClosedError(Exception):
    """Nobody can send anything any more: a worker has shut down what all of them share."""


@dataclass(frozen=True)
class Message:
    """One message. ``enclosed`` are descriptors that now belong to the receiver, ``family`` is the connection's."""

    kind: Kind
    pid: int
    number: int
    serial: int
    text: str
    enclosed: Sequence[int]
    family: int


def _send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send a packet, now. (``socket.send_fds`` and ``recv_fds`` of Python 3.11 take flags, and ignore them.)"""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class Sender:
    """The workers' end of the way to the master."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._sock.fileno()

    def send(
        self, kind: Kind, number: int = 0, serial: int = 0, text: str = "", enclosed: Sequence[socket.socket] = ()
    ) -> None:
        """Send a message, with duplicates of the descriptors of *enclosed*: the caller keeps its own.

        Never blocks. Raises OSError when nobody receives: BlockingIOError when the master has not read for long.
        """
        data = _HEADER.pack(kind, number, serial) + text.encode("utf-8", "replace")[:_MAX_TEXT]
        _send(self._sock, data, [each.fileno() for each in enclosed])

    def close(self) -> None:
        """Close the descriptor."""
        self._sock.close()


class Inbox:
    """The master's end."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock = sock

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._sock.fileno()

    def receive(self) -> Message | None:
        """Return the next message, None when there is none. Raises BadMessageError, InboxClosedError."""
        room = socket.CMSG_SPACE(_MAX_ENCLOSED * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(_HEADER.size + _MAX_TEXT, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        pid, descriptors = 0, array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) // 4 * 4])
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])[0]
        if not (data or ancillary):  # an empty packet would have a sender
            raise InboxClosedError
        try:
            return _read(pid, data, flags, descriptors)
        except BadMessageError:
            for fd in descriptors:
                let_go(fd)
            raise

    def close(self) -> None:
        """Close the descriptor."""
        self._sock.close()


def _read(pid: int, data: bytes, flags: int, descriptors: Sequence[int]) -> Message:
    """Return the message in a packet. Raises BadMessageError, when it owns none of *descriptors*."""
    if len(data) < _HEADER.size or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise BadMessageError(pid, f"a packet of {len(data)} bytes with {len(descriptors)} descriptors")
    code, number, serial = _HEADER.unpack_from(data)
    try:
        kind = Kind(code)
    except ValueError:
        raise BadMessageError(pid, f"a message of the unknown kind {code}") from None
    if len(descriptors) != _ENCLOSED[kind]:
        raise BadMessageError(pid, f"{kind.name} with {len(descriptors)} descriptors")
    family = 0
    if kind in (Kind.KEEP, Kind.OFFER):
        family = _family(pid, descriptors[0], "a connection", _FAMILIES, socket.SOCK_STREAM)
    elif kind is Kind.FETCH:
        _family(pid, descriptors[0], "a channel", (socket.AF_UNIX,), socket.SOCK_SEQPACKET)
    return Message(kind, pid, number, serial, data[_HEADER.size :].decode("utf-8", "replace"), descriptors, family)


def _family(pid: int, fd: int, what: str, families: Sequence[int], wanted: int) -> int:
    """Return the address family of a socket. Raises BadMessageError if *fd* is not *what* it should be."""
    try:
        probe = socket.socket(fileno=fd)
    except OSError as error:
        raise BadMessageError(pid, f"{what} that is no socket: {error.strerror}") from None
    family, type_ = probe.family, probe.type
    listens = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    probe.detach()
    if family not in families or type_ != wanted:
        raise BadMessageError(pid, f"{what} of family {family}, type {type_}")
    if listens:
        raise BadMessageError(pid, f"{what} that is a listening socket")
    return family


def make_inbox() -> tuple[Inbox, Sender]:
    """Return the two ends of a new way to the master."""
    # Packets keep their boundaries, and unlike datagrams they are not lost.
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Inbox(receiver), Sender(sender)


def resume_inbox(fds: tuple[int, int]) -> tuple[Inbox, Sender]:
    """Go on with ends whose descriptors are *fds*."""
    receiver, sender = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd) for fd in fds)
    return Inbox(receiver), Sender(sender)


class Given(NamedTuple):
    """A connection as the master gives it to a worker. As it arrives, *fd* is a duplicate."""

    number: int
    serial: int
    arrival: int
    family: int
    fd: int
    keeper: int = 0
    """The process id of the worker that accepted it, as far as the master knows."""


def answer(fd: int, connections: Sequence[Given]) -> bool:
    """Answer a worker, over the channel whose descriptor is *fd*, by *connections*: it gets duplicates.

    Closes *fd*: its end is the last word. Never blocks: a worker that does not read gets no more. Return whether all
    was sent; not so, too, when *fd* is no such channel.
    """
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
    except OSError:
        os.close(fd)
        return False
    try:
        with sock:
            for begin in range(0, len(connections), _BATCH):
                batch = connections[begin : begin + _BATCH]
                data = b"".join(_PLACE.pack(each.number, each.serial, each.arrival, each.family) for each in batch)
                _send(sock, data, [each.fd for each in batch])
    except OSError:
        return False
    return True


def read_answer(sock: socket.socket) -> list[Given]:
    """Return the next packet of an answer; nothing when that was all. Raises OSError, as ``sock`` does."""
    data, ancillary, _, _ = sock.recvmsg(_BATCH * _PLACE.size, socket.CMSG_SPACE(_BATCH * 4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i", b"".join(content for _, _, content in ancillary))
    return [
        Given(number, serial, arrival, family, fd)
        for (number, serial, arrival, family), fd in zip(_PLACE.iter_unpack(data), fds, strict=True)
    ]
