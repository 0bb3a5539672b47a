"""Where TLS policies are remembered: in one place for all workers, which outlives them, and the server.

And who looks for one: a *claim* on a key lets one process at a time do that. It ends by itself, so that whoever
dies with it keeps the others waiting for a moment only. What is written under a claim that has ended, or whose key
has been forgotten meanwhile, is not remembered.

SQLite needs nothing but a file. ``policyredis`` is for several machines that shall share what they know. Times are of
``time.time``, for the file may outlive the machine's start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prefork_socketmap.maps.sqlitefile import use_wal

if TYPE_CHECKING:
    from prefork_socketmap.maps.backend import Links

_LAYOUT = 1
_PATIENCE = 5.0  # seconds for another process to finish writing
_BETWEEN_TIDYINGS = 60.0


class StoreError(OSError):
    """The store cannot be read or written; the text says why."""


class Stored(NamedTuple):
    """What is remembered of a next hop."""

    answer: str
    """What Postfix is told; "" for "not found"."""
    failure: str
    """Why there is no answer; "" if there is one."""
    basis: str
    """The settings that the answer depends on."""
    stored: float
    refresh_after: float
    """From then on whoever asks has it refreshed, beside his lookup."""
    usable_until: float
    """Until then it answers lookups."""
    kept_until: float
    """Until then it is remembered, for its details."""
    details: str
    """What the next refresh goes by."""


class Store(Protocol):
    """What the map needs of a store. All of these but the first two raise StoreError."""

    def share(self, links: Callable[[], Links]) -> None:
        """Take connections, if there are any, from those that the maps of this process share."""

    def verify(self) -> None:
        """Find out whether the store can be used, by waiting if need be. Raises SettingError or UncheckedError."""

    def prepare(self) -> None:
        """Find out whether the store can be used, as far as that needs no waiting."""

    def get(self, key: str) -> Stored | None:
        """Return what is remembered of *key*."""

    def put(self, key: str, stored: Stored, claim: str) -> None:
        """Remember *stored*, and end *claim*; do nothing if that has ended."""

    def claim(self, key: str, seconds: float) -> str | None:
        """Claim *key* for so long; return the claim, None while somebody else has one."""

    def give_back(self, key: str, claim: str) -> None:
        """End *claim* without an answer."""

    def all(self) -> Iterator[tuple[str, Stored]]:
        """Iterate over what is remembered, by key."""

    def remove(self, key: str) -> bool:
        """Forget *key*; return whether anything was remembered."""

    def clear(self) -> int:
        """Forget everything; return how much it was."""

    def close(self) -> None:
        """Close this thread's connection."""


_COLUMNS = ", ".join(Stored._fields)
_TABLE = """
CREATE TABLE IF NOT EXISTS policies (
    map TEXT, key TEXT, answer TEXT, failure TEXT, basis TEXT, stored REAL, refresh_after REAL, usable_until REAL,
    kept_until REAL, details TEXT, claim TEXT NOT NULL DEFAULT '', claimed_until REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (map, key)
) WITHOUT ROWID
"""
_GET = f"SELECT {_COLUMNS} FROM policies WHERE map = ? AND key = ? AND stored IS NOT NULL"  # noqa: S608
# Of two processes that do this at a time, one changes the row.
_CLAIM = """
INSERT INTO policies (map, key, claim, claimed_until) VALUES (?1, ?2, ?3, ?4)
ON CONFLICT DO UPDATE SET claim = ?3, claimed_until = ?4 WHERE claim = '' OR claimed_until <= ?5
"""


class SqliteStore:
    """A store in the file *path*, for the map *name*: of at most *size* next hops, about."""

    def __init__(self, path: Path, name: str, size: int) -> None:
        self._path = path
        self._name = name
        self._size = size
        self._next_tidying = 0.0
        # A connection for each thread; those of threads that have ended are closed with them.
        self._local = threading.local()

    def share(self, links: Callable[[], Links]) -> None:
        """Do nothing: there is a file."""

    def verify(self) -> None:
        """Do nothing: ``prepare`` has done it."""

    def prepare(self) -> None:
        """Make the file, if need be. Raises StoreError when it cannot be used."""
        directory = self._path.parent
        try:
            status = directory.stat()
            if status.st_mode & 0o022 or (status.st_uid != os.geteuid() and os.geteuid() != 0):
                raise StoreError(f"{directory} must belong to user {os.geteuid()}, and nobody else may write there")
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if os.geteuid() == 0:
                    # The command query, say. The file is for the workers; SQLite gives those beside it its owner.
                    os.fchown(descriptor, status.st_uid, status.st_gid)
            finally:
                os.close(descriptor)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(error.strerror or str(error)) from error
        with self._errors():
            connection = self._connection()
            use_wal(connection, _PATIENCE)
            with self._transaction() as connection:
                if connection.execute("PRAGMA user_version").fetchone()[0] != _LAYOUT:
                    connection.execute("DROP TABLE IF EXISTS policies")
                    connection.execute(f"PRAGMA user_version = {_LAYOUT}")
                connection.execute(_TABLE)

    def get(self, key: str) -> Stored | None:
        """Return what is remembered of *key*."""
        try:
            row = self._connection().execute(_GET, (self._name, key)).fetchone()
        except sqlite3.Error as error:
            raise StoreError(str(error)) from error
        return None if row is None else Stored._make(row)

    def put(self, key: str, stored: Stored, claim: str) -> None:
        """Remember *stored*, and end *claim*; do nothing if that has ended."""
        assignments = ", ".join(f"{column} = ?" for column in Stored._fields)
        with self._transaction() as connection:
            connection.execute(
                f"UPDATE policies SET {assignments}, claim = '', claimed_until = 0 "  # noqa: S608
                "WHERE map = ? AND key = ? AND claim = ?",
                (*stored, self._name, key, claim),
            )
            self._tidy(connection)

    def claim(self, key: str, seconds: float) -> str | None:
        """Claim *key* for so long; return the claim, None while somebody else has one."""
        token = secrets.token_hex(8)
        now = time.time()
        with self._transaction() as connection:
            changed = connection.execute(_CLAIM, (self._name, key, token, now + seconds, now)).rowcount
        return token if changed else None

    def give_back(self, key: str, claim: str) -> None:
        """End *claim* without an answer."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE policies SET claim = '', claimed_until = 0 WHERE map = ? AND key = ? AND claim = ?",
                (self._name, key, claim),
            )

    def all(self) -> Iterator[tuple[str, Stored]]:
        """Iterate over what is remembered, by key."""
        with self._errors():
            for key, *row in self._connection().execute(
                f"SELECT key, {_COLUMNS} FROM policies WHERE map = ? AND stored IS NOT NULL ORDER BY key",  # noqa: S608
                (self._name,),
            ):
                yield key, Stored(*row)

    def remove(self, key: str) -> bool:
        """Forget *key*; return whether anything was remembered."""
        with self._transaction() as connection:
            known = "SELECT 1 FROM policies WHERE map = ? AND key = ? AND stored IS NOT NULL"
            found = connection.execute(known, (self._name, key)).fetchone()
            connection.execute("DELETE FROM policies WHERE map = ? AND key = ?", (self._name, key))
        return found is not None

    def clear(self) -> int:
        """Forget everything; return how much it was."""
        with self._transaction() as connection:
            known = "SELECT count(*) FROM policies WHERE map = ? AND stored IS NOT NULL"
            number: int = connection.execute(known, (self._name,)).fetchone()[0]
            connection.execute("DELETE FROM policies WHERE map = ?", (self._name,))
        return number

    def close(self) -> None:
        """Close this thread's connection."""
        connection: sqlite3.Connection | None = self._local.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def _tidy(self, connection: sqlite3.Connection) -> None:
        """Now and then, remove what has expired and, beyond the size, what protects least: no policy before one."""
        now = time.time()
        if now < self._next_tidying:
            return
        self._next_tidying = now + _BETWEEN_TIDYINGS
        connection.execute(
            "DELETE FROM policies WHERE map = ? AND coalesce(kept_until, 0) < ? AND claimed_until < ?",
            (self._name, now, now),
        )
        count = connection.execute("SELECT count(*) FROM policies WHERE map = ?", (self._name,)).fetchone()[0]
        if count > self._size:
            connection.execute(
                "DELETE FROM policies WHERE map = ?1 AND key IN (SELECT key FROM policies WHERE map = ?1 "
                "AND claim = '' ORDER BY answer LIKE 'secure%', usable_until LIMIT ?2)",
                (self._name, count - self._size),
            )

    def _connection(self) -> sqlite3.Connection:
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            found = sqlite3.connect(self._path, timeout=_PATIENCE, isolation_level=None, cached_statements=32)
            # What a power failure costs is the last few answers, which are looked for again.
            found.execute("PRAGMA synchronous = NORMAL")
            self._local.connection = found
        return found

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors():
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(str(error)) from error
