"""The type ``sqlite``: an SQLite database, in the terms of sqlite_table(5), opened for reading only."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from prefork_socketmap import settings
from prefork_socketmap.maps import sql
from prefork_socketmap.maps.base import LookupFailedError, Map, UncheckedError, log, reason
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.sqltext import SQLITE
from prefork_socketmap.socketmap.messages import Reply, to_text


class SqliteMap(Map):
    """Answers with the first column of every row that the query finds.

    As Postfix's sqlite: does; its mysql: and pgsql: take every column.
    """

    dbpath = setting(settings.text)
    """The database file."""
    query = sql.query(SQLITE)
    """The statement; parts of the key are bound as its parameters."""
    timeout = setting(settings.seconds, 5.0)
    """How long to wait while a writer holds the database locked."""

    _connection: sqlite3.Connection
    _identity: tuple[int, int] | None = None

    def prepare(self) -> None:
        """Open the database and prepare the query. Raises SettingError when either fails."""
        self._path = self.base / self.dbpath
        self._statement = sql.statement(self.query, SQLITE)
        try:
            self._connect()
        except (OSError, sqlite3.Error) as error:
            problem = f"cannot open {settings.shown(self.dbpath)}: {reason(error)}"
            raise settings.SettingError(f"maps.{self.name}.dbpath", problem) from None
        try:
            self.verify()
        except UncheckedError as doubt:
            log.info("map %s: %s", self.name, doubt.problem)
        except settings.SettingError:
            self.release()
            raise

    def verify(self) -> None:
        """Prepare the query, with all that is bound to it, and do not run it."""
        nothing = [None] * len(self._statement.parameters)
        try:
            self._connection.execute(f"EXPLAIN {self._statement.text}", nothing).close()
        except (sqlite3.Error, sqlite3.Warning) as error:  # a second statement is a Warning, before Python 3.12
            key = f"maps.{self.name}.query"
            if _is_locked(error):
                raise UncheckedError(key, f"cannot be checked: {error}") from error
            if _code(error) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CANTOPEN):
                key = f"maps.{self.name}.dbpath"
            raise settings.SettingError(key, str(error)) from error

    def release(self) -> None:
        """Close the database."""
        self._connection.close()
        self._identity = None

    def find(self, key: str) -> Sequence[str] | None:
        """Run the query for *key*."""
        values = self._statement.values(key)
        log.debug("map %s: %s with %r", self.name, self._statement.text, values)
        try:
            self._reconnect_if_replaced()
            return sql.values(row[:1] for row in self._connection.execute(self._statement.text, values))
        except sqlite3.Error as error:
            self.complaints.log(logging.ERROR, "%r: %s", key, error)
            raise LookupFailedError(Reply.temp_fail(f"map {self.name}: the query failed")) from error

    def _reconnect_if_replaced(self) -> None:
        """Open the file that has the name now: SQLite would go on reading the one that had it at first.

        While there is none, the old one answers: who replaces a file may remove it first.
        """
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if _identity(self._path) != self._identity:
                old = self._connection
                self._connect()
                old.close()

    def _connect(self) -> None:
        identity = _identity(self._path)
        self._connection = sqlite3.connect(
            f"file:{quote(str(self._path))}?mode=ro", uri=True, timeout=self.timeout, isolation_level=None
        )
        self._connection.text_factory = to_text
        self._identity = identity


def _is_locked(error: Exception) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _code(error: Exception) -> int | None:
    """Return SQLite's code for *error*, without what extends it; the module's own errors have none."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
