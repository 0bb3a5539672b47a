"""What the master and its workers share, made before the first fork: memory, connections, the ways to talk."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import mmap
import os
import select
import socket
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from prefork_socketmap.prefork.channel import Inbox, Sender
    from prefork_socketmap.prefork.scoreboard import Scoreboard
    from prefork_socketmap.prefork.table import ConnectionTable


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_VIEWS_KEEP = sys.implementation.name == "cpython"
_EFD_SEMAPHORE = 1  # sys/eventfd.h
_EVENTFD_SIZE = 8
# PyPy has no such thing.
freeze: Callable[[], None] = getattr(gc, "freeze", lambda: None)
unfreeze: Callable[[], None] = getattr(gc, "unfreeze", lambda: None)
_MAP_FAILED = ctypes.c_void_p(-1).value


class _Linger(ctypes.Structure):
    _fields_ = (("is_on", ctypes.c_int), ("seconds", ctypes.c_int))


def create_memory(name: str, size: int = 0) -> int:
    """Return the descriptor of new memory of *size* zero bytes; what is never touched takes no room.

    It is a file without a name: unlike an anonymous mapping it survives execve(2). Nobody can make it smaller, which
    would kill whoever has mapped it (SIGBUS).
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def view(fd: int, size: int = 0, offset: int = 0) -> memoryview:
    """Map *size* bytes of *fd* (0: the whole of it), shared and writable. Raises OSError.

    The memory goes with the last view of it; on PyPy, where a view does not keep what it shows, with the process.
    Unlike a ``mmap.mmap`` it has no descriptor of its own: who closes the one that there is cannot change the size of
    the file any more.
    """
    size = size or os.fstat(fd).st_size
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = (ctypes.c_ubyte * size).from_address(address)
    if _VIEWS_KEEP:
        weakref.finalize(memory, _libc.munmap, address, size).atexit = False
    return memoryview(memory).cast("B")


def let_go(fd: int) -> None:
    """Close *fd*, which a worker has sent, at once: it may have asked close(2) to wait for what is not delivered."""
    linger = _Linger()
    size = ctypes.c_uint(ctypes.sizeof(linger))
    _libc.getsockopt(fd, socket.SOL_SOCKET, socket.SO_LINGER, ctypes.byref(linger), ctypes.byref(size))
    if linger.seconds:
        _libc.setsockopt(fd, socket.SOL_SOCKET, socket.SO_LINGER, ctypes.byref(_Linger()), size)
    with contextlib.suppress(OSError):
        os.close(fd)


def is_ready(fd: int, events: int = select.POLLIN, milliseconds: float = 0) -> bool:
    """Whether one of *events*, or the end, has come to *fd*; waits for it for so long."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(milliseconds))


def make_eventfd(number: int = 0, flags: int = 0) -> int:
    """Return the descriptor of a new eventfd(2) at *number*; os.eventfd is what PyPy does not have."""
    fd = _libc.eventfd(number, flags | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(fd)


def make_semaphore() -> int:
    """Return the descriptor of a new semaphore, at 0; it is readable while there is something to take."""
    return make_eventfd(0, os.O_NONBLOCK | _EFD_SEMAPHORE)


def give(semaphore: int, number: int = 1) -> None:
    """Let as many take one. Never blocks."""
    os.set_blocking(semaphore, False)  # all processes share this, and any may have changed it
    with contextlib.suppress(BlockingIOError):  # it is full: enough for everybody
        os.write(semaphore, number.to_bytes(_EVENTFD_SIZE, sys.byteorder))


def take(semaphore: int) -> bool:
    """Take one, if there is one; return whether. Never blocks."""
    os.set_blocking(semaphore, False)
    with contextlib.suppress(BlockingIOError):
        os.read(semaphore, _EVENTFD_SIZE)
        return True
    return False


class Bell:
    """Wakes one process that waits for it, from any other. To ring again before it has looked changes nothing."""

    def __init__(self, fd: int = -1) -> None:
        """Make a new one, or go on with the one whose descriptor is *fd*."""
        self._fd = make_eventfd(0, os.O_NONBLOCK) if fd < 0 else fd

    def fileno(self) -> int:
        """Return the descriptor, which is readable when somebody has rung."""
        return self._fd

    def ring(self) -> None:
        """Ring. Never blocks."""
        give(self._fd)

    def silence(self) -> None:
        """Take note."""
        take(self._fd)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


@dataclass
class Lifeline:
    """A pipe whose end ``held`` the master alone holds: ``fd`` becomes readable when it is gone, however it ended."""

    fd: int
    held: int

    @classmethod
    def new(cls) -> Self:
        """Make a new one."""
        return cls(*os.pipe())

    def leave_to_child(self) -> None:
        """In a worker: let go of the master's end."""
        os.close(self.held)

    def close(self) -> None:
        """Close both ends."""
        os.close(self.fd)
        os.close(self.held)


@dataclass
class Shared:
    """The scoreboard, the connection table, the master's bell, both ends of its inbox, the lifeline."""

    board: Scoreboard
    table: ConnectionTable
    bell: Bell
    inbox: Inbox
    to_master: Sender
    lifeline: Lifeline

    def leave_to_child(self) -> None:
        """In a new worker: close what is the master's alone."""
        self.inbox.close()
        self.lifeline.leave_to_child()

    def close(self) -> None:
        """Close everything."""
        for each in (self.board, self.table, self.bell, self.inbox, self.to_master, self.lifeline):
            each.close()
