"""What tells one state of a file from another, so that a change is noticed by looking at its status alone."""

from __future__ import annotations

import os
import stat
import struct
import time
from pathlib import Path
from typing import BinaryIO

# File times advance with the kernel's tick, at most 10 ms: a file younger than that may change once more and look the
# same.
_TICK = 0.02
_QUIET = 1.0
_LONGEST_WAIT = 10.0
_TAG = struct.Struct("=QQQq")


def tag(status: os.stat_result) -> bytes:
    """Return what tells one state of a file from another, always as many bytes."""
    return _TAG.pack(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_regular(path: Path) -> BinaryIO:
    """Open the file at *path* for reading. Raises OSError when it is none: a pipe would keep its reader waiting."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no regular file")
    return file


def settled(descriptor: int) -> os.stat_result:
    """Return the file's status once its next change will show in it."""
    age = time.time() - os.fstat(descriptor).st_mtime
    if 0 <= age < _TICK:
        time.sleep(_TICK - age)
    return os.fstat(descriptor)


def left_alone(descriptor: int) -> os.stat_result:
    """Return the file's status once nobody has written for a second, who may be in the middle of it.

    Waits for ten seconds at most.
    """
    deadline = time.monotonic() + _LONGEST_WAIT
    # Not the time of the change that whoever writes can set.
    while 0 <= (age := time.time() - os.fstat(descriptor).st_ctime) < _QUIET and time.monotonic() < deadline:
        time.sleep(_QUIET - age)
    return settled(descriptor)


def refuse_change(file: BinaryIO, before: bytes) -> None:
    """Raise OSError when *file*, which has been read, is not as it was: then what was read is neither old nor new."""
    if tag(os.fstat(file.fileno())) != before:
        raise OSError("it is being written")
