"""The pid file: one server at a time, found by whoever wants to signal it.

The number in the file is for people. What counts is the lock on the file: the kernel takes it from a process that
ends, however it ends, and tells the holder's pid. So a stale file is just a file without a lock, and a pid that has
been given to another process is never taken for the server.

Whatever lies at the path is at most locked, never written: the directory may once have been somebody else's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from prefork_socketmap.daemon import newfile, recordlock
from prefork_socketmap.daemon.owndescriptor import OwnDescriptor


class AlreadyRunningError(Exception):
    """Another process holds the lock; ``pid`` is its pid."""

    def __init__(self, path: Path, pid: int) -> None:
        super().__init__(f"already running with pid {pid} ({path} is locked)")
        self.pid = pid


class PidFile:
    """The pid file of this process, locked and written."""

    def __init__(self, path: Path, held: int | None = None) -> None:
        """Lock *path* and write our pid. Raises AlreadyRunningError, or OSError if it cannot be written.

        *held* is a descriptor that holds the lock already: of the program that was in this process before.
        """
        self.path = path
        # A child has no share in a lock of this kind (lockf(3)); it shall not have a way to write the file, either.
        self._descriptor = OwnDescriptor(held if held is not None and _is_at(path, held) else _take(path))

    def fileno(self) -> int:
        """Return the descriptor that holds the lock."""
        return self._descriptor.fileno()

    def remove(self) -> None:
        """Remove the file, and then give up the lock."""
        with contextlib.suppress(OSError):
            if _is_at(self.path, self.fileno()):
                self.path.unlink()
        self._descriptor.close()


def holder(path: Path) -> int | None:
    """Return the pid of the process that holds the lock on *path*, or None.

    Raises OSError if there is a file that cannot be read.
    """
    try:
        descriptor = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return recordlock.holder(descriptor)
    finally:
        os.close(descriptor)


def _take(path: Path) -> int:
    """Put a new file at *path*, with our pid, and return its descriptor, which holds the lock.

    Meanwhile the lock on the file before it, if need be an empty one, keeps others from doing so.
    """
    before = _lock(path)
    try:
        with newfile.in_place_of(path) as descriptor:
            os.write(descriptor, b"%d\n" % os.getpid())
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(before)
    return descriptor


def _lock(path: Path) -> int:
    """Return a descriptor of *path* that holds the lock."""
    while True:
        descriptor = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = recordlock.holder(descriptor)
            os.close(descriptor)
            if pid is None:
                continue  # it has ended in this moment
            raise AlreadyRunningError(path, pid) from None
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # its last owner removed the file between our open and our lock


def _open(path: Path, flags: int) -> int:
    """Open a file, and nothing that it may have been exchanged for: no link, nothing that blocks. Raises OSError."""
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileExistsError(errno.EEXIST, "not a file", str(path))
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False
