"""The type ``file``: a text file of ``key value`` lines, read once for all workers, and again when it changes."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prefork_socketmap import settings
from prefork_socketmap.maps.base import LookupFailedError, Map, reason
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.sharedtable import NoTableError, SharedTable, make_private
from prefork_socketmap.socketmap.messages import Reply, to_bytes, to_text


class FileMap(Map):
    """Answers with the value of the line that begins with the key."""

    path = setting(settings.text)
    """The text file, in the format of postmap(1)."""
    index_dir = setting(settings.text, None)
    """Directory for indexes, made if need be; it must belong to the workers' user, and nobody else may write there.
    Default: ``prefork-socketmap-UID`` in the directory for temporary files."""

    _table: SharedTable

    def prepare(self) -> None:
        """Read the file, unless another worker has. Raises SettingError when that is not possible."""
        directory = self._index_directory()
        try:
            make_private(directory)
        except OSError as error:
            problem = f"{settings.shown(self.index_dir)} cannot be used: {reason(error)}"
            raise settings.SettingError(f"maps.{self.name}.index_dir", problem) from None
        self._table = SharedTable(self.base / self.path, directory, fold=self.fold)
        try:
            self._table.open()
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from None
        if self._table.problem is not None:
            self.complaints.log(logging.ERROR, "%s; an earlier table answers", self._unreadable(self._table.problem))

    def verify(self) -> None:
        """Tell when the table is an earlier one, since the file is not what it should be."""
        if self._table.problem is not None:
            raise self._unreadable(self._table.problem)

    def release(self) -> None:
        """Let go of the table."""
        self._table.close()

    def find(self, key: str) -> Sequence[str] | None:
        """Return the value at *key*. When the file has changed it is read meanwhile, by another process."""
        try:
            self._table.refresh()
        except OSError as error:
            self.complaints.log(logging.ERROR, "%s: %s; the table stays as it was", self.path, reason(error))
        try:
            value = self._table.get(to_bytes(key))
        except NoTableError as error:
            raise LookupFailedError(Reply.temp_fail(f"map {self.name}: the file is being read")) from error
        return None if value is None else (to_text(value),)

    def _unreadable(self, error: Exception) -> settings.SettingError:
        problem = f"{settings.shown(self.path)} cannot be read: {reason(error)}"
        return settings.SettingError(f"maps.{self.name}.path", problem)

    def _index_directory(self) -> Path:
        if self.index_dir is None:
            return Path(tempfile.gettempdir(), f"prefork-socketmap-{os.geteuid()}")
        return self.base / self.index_dir
