"""What tells one state of a file from another, so that a change is noticed by looking at its status alone."""

from __future__ import annotations

import os
import struct
import time

# File times advance with the kernel's tick, at most 10 ms: a file younger than that may change once more and look the
# same.
_TICK = 0.02
_TAG = struct.Struct("=QQQq")


def tag(status: os.stat_result) -> bytes:
    """Return what tells one state of a file from another, always as many bytes."""
    return _TAG.pack(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def settled(descriptor: int) -> os.stat_result:
    """Return the file's status once its next change will show in it."""
    age = time.time() - os.fstat(descriptor).st_mtime
    if 0 <= age < _TICK:
        time.sleep(_TICK - age)
    return os.fstat(descriptor)
