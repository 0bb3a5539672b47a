"""Record locks of fcntl(2): who holds one. The kernel knows, and takes it back from a process that ends."""

from __future__ import annotations

import fcntl
import os
import struct

# Linux's struct flock: type, whence, start, length, pid; padded to the alignment of its largest member.
_FLOCK = struct.Struct("@hhqqi0q")


def holder(descriptor: int, start: int = 0, length: int = 0) -> int | None:
    """Return the pid of another process that has a lock there, or None. *length* 0: up to the end, wherever that is.

    Unlike an attempt to lock, the question disturbs nobody.
    """
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
    return None if kind == fcntl.F_UNLCK else pid
