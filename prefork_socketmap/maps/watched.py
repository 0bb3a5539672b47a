"""What the map types have in common that answer from a file which each worker reads, or opens, for itself.

A lookup looks at the file's status first: who changes the file need not reload. A file that is gone, or cannot be
read, changes nothing. Text files with as many entries as there are addresses are the business of ``sharedtable``.
"""

from __future__ import annotations

import abc
import logging
import os
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from prefork_socketmap import settings
from prefork_socketmap.maps import filestate
from prefork_socketmap.maps.base import Map, reason
from prefork_socketmap.maps.setting import setting

T = TypeVar("T")


class WatchedFileMap(Map, Generic[T]):
    """A map that answers from a file. *T* is what the file is read into.

    A type defines ``read``, and asks for ``content()`` in ``find``.
    """

    path = setting(settings.text)
    """The file."""

    _content: T
    _tag = b""
    # Tag of a file that could not be read: reading it again would not change that.
    _refused = b""

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
        try:
            self._read()
        except (OSError, ValueError) as error:
            problem = f"{settings.shown(self.path)}: {reason(error)}"
            raise settings.SettingError(f"maps.{self.name}.path", problem) from None

    def release(self) -> None:
        """Let go of what was read."""
        self.dispose(self._content)
        del self._content
        self._tag = self._refused = b""

    def content(self) -> T:
        """Return what the file has now or, if it cannot be read, what it had."""
        try:
            tag = self.tag(self._file.stat())
            if tag not in (self._tag, self._refused):
                self._read()
        except (OSError, ValueError) as error:
            self.complaints.log(logging.ERROR, "%s: %s; the table stays as it was", self.path, reason(error))
        return self._content

    @property
    def _file(self) -> Path:
        return self.base / self.path

    def _read(self) -> None:
        with self._file.open("rb") as file:
            tag = self.tag(filestate.settled(file.fileno()))
            try:
                new = self.read(file)
            except ValueError:
                self._refused = tag
                raise
        if self._tag:
            self.dispose(self._content)
        self._content, self._tag = new, tag
