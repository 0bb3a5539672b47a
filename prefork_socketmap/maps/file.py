"""The type ``file``: a text file of ``key value`` lines, reread when it changes, held once for all workers."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prefork_socketmap import settings
from prefork_socketmap.maps.base import Map, reason
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.sharedtable import SharedTable, make_private
from prefork_socketmap.socketmap.messages import to_bytes, to_text


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
        file = self.base / self.path
        self._table = SharedTable(file, directory, fold=self.fold)
        try:
            self._table.refresh(wait=True)
        except (OSError, ValueError) as error:
            problem = f"{settings.shown(self.path)} cannot be read: {reason(error)}"
            raise settings.SettingError(f"maps.{self.name}.path", problem) from None

    def release(self) -> None:
        """Let go of the table."""
        self._table.close()

    def find(self, key: str) -> Sequence[str] | None:
        """Return the value at *key*, of the file as it is now."""
        try:
            self._table.refresh(wait=False)
        except (OSError, ValueError) as error:
            self.complaints.log(logging.ERROR, "%s: %s; the table stays as it was", self.path, reason(error))
        value = self._table.get(to_bytes(key))
        return None if value is None else (to_text(value),)

    def _index_directory(self) -> Path:
        if self.index_dir is None:
            return Path(tempfile.gettempdir(), f"prefork-socketmap-{os.geteuid()}")
        return self.base / self.index_dir
