"""Locks in a file that processes share, and with them: one process at a time asks for a key, and others hear of it.

They are locks of fcntl(2): they end with the process that holds them, however it ends, and whatever children it has
left behind. They lock bytes that do not exist. Nobody waits here for longer than he wants.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

_FLIGHTS = 1 << 62  # the first of the bytes that stand for keys
_TO_THE_END = 0
_HASH = 7  # bytes of a tag that tell which one
_PATIENCE = 0.02  # seconds: who holds a page for longer is stopped, or hostile
_PAUSE = 0.0002

_SLOT = 128
_OUTCOME = struct.Struct("<16sIQBB")  # tag, checksum of what follows, when, kind, size of the text
_CHECKED = 20
LONGEST_TEXT = _SLOT - _OUTCOME.size


def read(fd: int, size: int, place: int) -> bytes:
    """Return *size* bytes at *place*, fewer if there are no more; none if they cannot be read."""
    try:
        return os.pread(fd, size, place)
    except OSError:
        return b""


@contextlib.contextmanager
def locked(fd: int, byte: int, *, wait: bool = True) -> Iterator[bool]:
    """Lock a byte of *fd* for a moment; yield whether it is locked, which it is not if somebody else keeps it."""
    deadline = time.monotonic() + (_PATIENCE if wait else 0.0)
    try:
        while not (is_ours := _try_lock(fd, byte)) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        yield is_ours
    finally:
        # Even if it is not ours: an interruption may have come between the lock and our knowing of it.
        _unlock(fd, byte, 1)


def _try_lock(fd: int, byte: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError:  # as a rule somebody else has it
        return False
    return True


def _unlock(fd: int, byte: int, size: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.lockf(fd, fcntl.LOCK_UN, size, byte)


class Outcome(NamedTuple):
    """What came of asking, where that is not remembered: a number of the caller's, and a text."""

    kind: int
    text: bytes


class Flight:
    """The right to ask for one key, while nobody else does; use it as a context manager, and ``take`` it inside.

    Who has not got it is told what comes of it, unless that is remembered.
    """

    def __init__(self, fd: int, tag: bytes, outcomes: range) -> None:
        """*tag* stands for the key. *outcomes*: the bytes of *fd* that have room for those."""
        self._fd = fd
        self._tag = tag
        self._byte = _FLIGHTS + int.from_bytes(tag[:_HASH], "little")
        slots = len(outcomes) // _SLOT
        self._slot = outcomes.start + int.from_bytes(tag[_HASH:], "little") % slots * _SLOT
        self._before: bytes | None = None

    def __enter__(self) -> Flight:
        return self

    def take(self) -> bool:
        """Return whether this process may ask now."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._byte)
        except (BlockingIOError, PermissionError):  # either says that somebody else has it
            return False
        except OSError:  # the system has no more locks, or the file is gone: then everybody asks
            return True
        return True

    def tell(self, outcome: Outcome) -> None:
        """Tell those who wait what came of asking; a text that is too long is cut off."""
        text = outcome.text[:LONGEST_TEXT]
        slot = _OUTCOME.pack(self._tag, 0, time.monotonic_ns(), outcome.kind, len(text)) + text
        checksum = crc32(slot[_CHECKED:]).to_bytes(4, "little")
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, self._tag + checksum + slot[_CHECKED:], self._slot)

    def told(self) -> Outcome | None:
        """Return what another process has told, if it has since this was called for the first time."""
        slot = read(self._fd, _SLOT, self._slot)
        if self._before is None:
            self._before = slot
        if slot == self._before or len(slot) < _SLOT:
            return None
        tag, checksum, _, kind, size = _OUTCOME.unpack_from(slot)
        end = _OUTCOME.size + size
        if tag != self._tag or crc32(slot[_CHECKED:end]) != checksum:
            return None
        return Outcome(kind, slot[_OUTCOME.size : end])

    def __exit__(self, *_: object) -> None:
        try:
            self._land()
        except BaseException:  # an interruption of the lookup, which must not keep others waiting
            self._land()
            raise

    def _land(self) -> None:
        _unlock(self._fd, _FLIGHTS, _TO_THE_END)
