"""The type ``sqlite``: an SQLite database, in the terms of sqlite_table(5), opened for reading only."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from urllib.parse import quote

from prefork_socketmap import settings
from prefork_socketmap.maps import sql
from prefork_socketmap.maps.base import LookupFailedError, Map, log
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.socketmap.messages import Reply, to_text


class SqliteMap(Map):
    """Answers with every column of every row that the query finds."""

    dbpath = setting(settings.text)
    """The database file."""
    query = setting(sql.query)
    """The statement; parts of the key are bound as its parameters."""
    timeout = setting(settings.seconds, 5.0)
    """How long to wait while a writer holds the database locked."""

    _connection: sqlite3.Connection

    def prepare(self) -> None:
        """Open the database. Raises SettingError when there is none."""
        path = self.base / self.dbpath
        try:
            self._connection = sqlite3.connect(
                f"file:{quote(str(path))}?mode=ro", uri=True, timeout=self.timeout, isolation_level=None
            )
        except sqlite3.Error as error:
            raise settings.SettingError(f"maps.{self.name}.dbpath", f"cannot open {path}: {error}") from error
        self._connection.text_factory = to_text
        self._statement = self.query.statement("?")

    def release(self) -> None:
        """Close the database."""
        self._connection.close()

    def find(self, key: str) -> Sequence[str] | None:
        """Run the query for *key*."""
        parameters = self.query.parameters(key)
        log.debug("map %s: %s with %r", self.name, self._statement, parameters)
        try:
            return sql.values(self._connection.execute(self._statement, parameters))
        except sqlite3.Error as error:
            self.complaints.log(logging.ERROR, "%r: %s", key, error)
            raise LookupFailedError(Reply.temp_fail(f"map {self.name}: the query failed")) from error
