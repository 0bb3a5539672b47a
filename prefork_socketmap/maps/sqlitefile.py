"""Files of SQLite that many workers write: made by whichever is first, without one being in another's way."""

from __future__ import annotations

import sqlite3
import time

_PAUSE = 0.01  # seconds


def use_wal(connection: sqlite3.Connection, seconds: float) -> None:
    """Have who reads and who writes not wait for each other; wait up to *seconds* for others who do this now.

    SQLite itself waits for locks, but not for this one, which it takes while it holds another
    (sqlite3_busy_handler: it is not invoked where that could be a deadlock). Raises sqlite3.Error.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() >= deadline:
                raise
            time.sleep(_PAUSE)
        else:
            return


def _is_busy(error: sqlite3.Error) -> bool:
    return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
