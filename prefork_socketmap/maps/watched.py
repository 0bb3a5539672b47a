"""What the map types have in common that answer from a file which each worker reads, or opens, for itself.

A lookup looks at the file's status first: who changes the file need not reload. A file that is gone, or cannot be
read, changes nothing. Text files with as many entries as there are addresses are the business of ``sharedtable``.
"""

from __future__ import annotations

import abc
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from prefork_socketmap import settings
from prefork_socketmap.maps import filestate
from prefork_socketmap.maps.base import Map, reason
from prefork_socketmap.maps.ratelimit import RateLimitedLogger
from prefork_socketmap.maps.setting import setting

T = TypeVar("T")


def _keep(_content: object) -> None:
    """Let go of nothing."""


class FollowedFile(Generic[T]):
    """What *read* makes of the file *path*, as the file is now.

    *read* raises OSError or ValueError for a file that is not what it should be. *dispose* lets go of what a newer
    content has replaced, *tag* tells one state of the file from another. What goes wrong later, when it is read
    again, is logged with *complaints*; *outcome* says what follows.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[BinaryIO], T],
        complaints: RateLimitedLogger,
        *,
        outcome: str = "the table stays as it was",
        dispose: Callable[[T], None] = _keep,
        tag: Callable[[os.stat_result], bytes] = filestate.tag,
    ) -> None:
        self._path = path
        self._make = read
        self._complaints = complaints
        self._outcome = outcome
        self._dispose = dispose
        self._tag_of = tag
        self._content: T
        self._tag = b""
        # Tag of a file that could not be read: reading it again would not change that.
        self._refused = b""

    def read(self) -> T:
        """Read the file. Raises OSError or ValueError."""
        with self._path.open("rb") as file:
            tag = self._tag_of(filestate.settled(file.fileno()))
            try:
                new = self._make(file)
            except ValueError:
                self._refused = tag
                raise
        if self._tag:
            self._dispose(self._content)
        self._content, self._tag = new, tag
        return new

    def content(self) -> T:
        """Return what the file has now or, if it cannot be read, what it had at the last ``read`` that could."""
        try:
            tag = self._tag_of(self._path.stat())
            if tag not in (self._tag, self._refused):
                self.read()
        except (OSError, ValueError) as error:
            self._complaints.log(logging.ERROR, "%s: %s; %s", self._path, reason(error), self._outcome)
        return self._content

    def close(self) -> None:
        """Let go of what was read."""
        self._dispose(self._content)
        del self._content
        self._tag = self._refused = b""


class WatchedFileMap(Map, Generic[T]):
    """A map that answers from a file. *T* is what the file is read into.

    A type defines ``read``, and asks for ``content()`` in ``find``.
    """

    path = setting(settings.text)
    """The file."""

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
            self.base / self.path, self.read, self.complaints, dispose=self.dispose, tag=self.tag
        )
        try:
            self._followed.read()
        except (OSError, ValueError) as error:
            problem = f"{settings.shown(self.path)}: {reason(error)}"
            raise settings.SettingError(f"maps.{self.name}.path", problem) from None
        self.content = self._followed.content  # type: ignore[method-assign]  # one call less for each lookup

    def release(self) -> None:
        """Let go of what was read."""
        self._followed.close()

    def content(self) -> T:
        """Return what the file has now or, if it cannot be read, what it had."""
        return self._followed.content()
