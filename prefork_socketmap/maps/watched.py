"""What the map types have in common that answer from a file which each worker reads, or opens, for itself.

A lookup looks at the file's status first: who changes the file need not reload. A file that is gone, or cannot be
read, changes nothing. To open a database takes no time; a text is read by a thread of its own, while lookups go on
with what there was. Texts with as many entries as there are addresses are the business of ``sharedtable``.
"""

from __future__ import annotations

import abc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, ClassVar, Generic, TypeVar

from prefork_socketmap import settings
from prefork_socketmap.maps import filestate
from prefork_socketmap.maps.base import Map, reason
from prefork_socketmap.maps.ratelimit import RateLimitedLogger
from prefork_socketmap.maps.setting import setting

T = TypeVar("T")

# Seconds until a file is read again that could not be.
_PAUSE = 5.0
# Seconds that a lookup waits, at each of its system calls, for a thread that reads: a fifth of Python's default.
_SWITCH_INTERVAL = 0.001


def _keep(_content: object) -> None:
    """Let go of nothing."""


class FollowedFile(Generic[T]):
    """What *read* makes of the file *name* below *base*, as the file is now.

    *read* raises OSError or ValueError for a file that is not what it should be. What goes wrong later, when it is
    read again, is logged with *complaints*; *outcome* says what follows. *is_text*: whether the file has to be
    parsed, which may take long; otherwise it is just opened. *dispose* lets go of what a newer content has replaced,
    *tag* tells one state of the file from another.
    """

    def __init__(
        self,
        base: Path,
        name: str,
        read: Callable[[BinaryIO], T],
        complaints: RateLimitedLogger,
        *,
        outcome: str = "the table stays as it was",
        is_text: bool = True,
        dispose: Callable[[T], None] = _keep,
        tag: Callable[[os.stat_result], bytes] = filestate.tag,
    ) -> None:
        self._name = name
        self._path = base / name
        self._make = read
        self._complaints = complaints
        self._outcome = outcome
        self._is_text = is_text
        self._dispose = dispose
        self._tag_of = tag
        self._content: T
        self._thread: threading.Thread | None = None
        self._next_reading = 0.0
        self._tag = b""
        # Tag of a file that could not be read: reading it again would not change that.
        self._refused = b""

    def open(self) -> None:
        """Read the file. Raises OSError or ValueError."""
        self._read(filestate.settled)

    def close(self) -> None:
        """Let go of what was read."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._dispose(self._content)
        del self._content
        self._tag = self._refused = b""

    def content(self) -> T:
        """Return what the file has or, while that is read, and if it cannot be, what it had."""
        try:
            tag = self._tag_of(self._path.stat())
            if tag not in (self._tag, self._refused):
                self._follow()
        except (OSError, ValueError) as error:
            self._complain(error)
        return self._content

    def _follow(self) -> None:
        if not self._is_text:
            self._read(filestate.settled)
        elif (self._thread is None or not self._thread.is_alive()) and time.monotonic() >= self._next_reading:
            self._thread = threading.Thread(target=self._read_beside, name=f"reader of {self._name}", daemon=True)
            self._thread.start()

    def _read_beside(self) -> None:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        try:
            self._read(filestate.left_alone)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                self._next_reading = time.monotonic() + _PAUSE
            self._complain(error)
        finally:
            sys.setswitchinterval(interval)

    def _complain(self, error: Exception) -> None:
        self._complaints.log(logging.ERROR, "%s: %s; %s", self._name, reason(error), self._outcome)

    def _read(self, wait: Callable[[int], os.stat_result]) -> None:
        """Read the file, once *wait* tells its state."""
        with filestate.open_regular(self._path) as file:
            status = wait(file.fileno())
            tag = self._tag_of(status)
            try:
                try:
                    new = self._make(file)
                finally:
                    if self._is_text:  # before any other verdict on what was read
                        filestate.refuse_change(file, filestate.tag(status))
            except ValueError:
                self._refused = tag
                raise
        if self._tag:
            self._dispose(self._content)
        self._content, self._tag = new, tag


class WatchedFileMap(Map, Generic[T]):
    """A map that answers from a file. *T* is what the file is read into.

    A type defines ``read``, and asks for ``content()`` in ``find``.
    """

    path = setting(settings.text)
    """The file."""

    is_text: ClassVar[bool] = True
    """Whether the file has to be parsed, which may take long. Otherwise it is just opened."""

    _followed: FollowedFile[T]

    @abc.abstractmethod
    def read(self, file: BinaryIO) -> T:
        """Return what *file* has. Raises OSError, or ValueError when it is not what it should be."""

    def dispose(self, content: T) -> None:
        """Let go of *content*, which a newer one has replaced."""

    def tag(self, status: os.stat_result) -> bytes:
        """Return what tells one state of the file from another."""
        return filestate.tag(status)

    def prepare(self) -> None:
        """Read the file. Raises SettingError when that is not possible."""
        self._followed = FollowedFile(
            self.base,
            self.path,
            self.read,
            self.complaints,
            is_text=self.is_text,
            dispose=self.dispose,
            tag=self.tag,
        )
        try:
            self._followed.open()
        except (OSError, ValueError) as error:
            problem = f"{settings.shown(self.path)}: {reason(error)}"
            raise settings.SettingError(f"maps.{self.name}.path", problem) from None
        self.content = self._followed.content  # type: ignore[method-assign]  # one call less for each lookup

    def release(self) -> None:
        """Let go of what was read."""
        self._followed.close()

    def content(self) -> T:
        """Return what the file has or, while that is read, and if it cannot be, what it had."""
        return self._followed.content()
