"""The type ``lmdb``: an LMDB database file, as postmap(1) makes one, opened for reading only.

Postfix does without LMDB's own locks, and so without its lock file; it locks the database file itself, as is done
here. So an update in place is seen as a whole, at once, and a file that takes the old one's place is opened.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import lmdb

from prefork_socketmap.maps.watched import WatchedFileMap
from prefork_socketmap.socketmap.messages import to_bytes, to_text


class Database:
    """An open database. Construction raises OSError, or ValueError when it is none."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        try:
            self._environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, create=False)
        except lmdb.Error as error:
            self._file.close()
            reason = str(error).rpartition(": ")[2]  # without the path in front of it
            raise ValueError(f"is no LMDB database: {reason}") from None
        self._close = weakref.finalize(self, _close, self._environment, self._file)

    def get(self, *keys: bytes) -> bytes | None:
        """Return the value of the first of *keys* that is there, or None."""
        with self._locked(), self._transaction() as transaction:
            for key in keys:
                with contextlib.suppress(lmdb.BadValsizeError):  # a key that is too long to be there
                    value = transaction.get(key)
                    if value is not None:
                        return bytes(value)
        return None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _transaction(self) -> lmdb.Transaction:
        try:
            return self._environment.begin()
        except lmdb.MapResizedError:
            # Somebody has written more than the file had room for.
            self._environment.set_mapsize(0)
            return self._environment.begin()


def _close(environment: lmdb.Environment, file: BinaryIO) -> None:
    environment.close()
    file.close()


# By file. A process must not open a database twice, but two maps may have the same.
_databases: weakref.WeakValueDictionary[bytes, Database] = weakref.WeakValueDictionary()


class LmdbMap(WatchedFileMap[Database]):
    """Answers with the value of the key in a database file."""

    is_text = False

    def tag(self, status: os.stat_result) -> bytes:
        """Return what tells one file from another: what changes within it is seen anyway."""
        return b"%d %d" % (status.st_dev, status.st_ino)

    def read(self, file: BinaryIO) -> Database:
        """Open the database."""
        tag = self.tag(os.fstat(file.fileno()))
        database = _databases.get(tag)
        if database is None:
            database = _databases[tag] = Database(Path(file.name))
        return database

    def find(self, key: str) -> Sequence[str] | None:
        """Return the value at *key*."""
        asked = to_bytes(key)
        # postmap ends keys and values with a NUL.
        value = self.content().get(asked + b"\0", asked)
        return None if value is None else (to_text(value.removesuffix(b"\0")),)
