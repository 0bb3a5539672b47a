"""The database of original envelopes: senders that do not fit into an address, kept until nothing can come back.

The names that senders get, and what SQLite and Redis hold, are PostSRSd's: its database can be taken over. The other
servers need a table (see the manual). How one connects to them, when a lookup is tried again, and how long a server
that is down is left alone is the business of the map types of the same names, of which this file makes use: one to
write with, one to read, one to tidy up.
"""

from __future__ import annotations

import abc
import base64
import contextlib
import hashlib
import importlib
import logging
import random
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from prefork_socketmap import settings
from prefork_socketmap.maps.backend import Links
from prefork_socketmap.maps.base import LookupFailedError, Map, MissingLibraryError, log, reason
from prefork_socketmap.maps.setting import declared, read_table, setting
from prefork_socketmap.maps.sqlitefile import use_wal
from prefork_socketmap.socketmap.messages import Reply, to_text

DOMAIN = "1"
"""Stands in the place of the sender's domain in an address whose sender is in the database."""
DEFAULT = {"type": "sqlite", "dbpath": "/var/lib/prefork-socketmap/srs.sqlite"}

_TIDY_EVERY = 3600.0

# The key of a lookup is all that a map is given. So that of a write has its three values in it, SENDER@ALIAS.NUMBER,
# which are %u, %2 and %1, and that of a read two, ALIAS@NUMBER. The number is a time; Redis is told how long.
_READ = "SELECT sender FROM srs_envelopes WHERE alias = '%u' AND expires > '%1'"
_TIDY = "DELETE FROM srs_envelopes WHERE expires <= '%1'"
_WRITE = "INSERT INTO srs_envelopes (alias, sender, expires) SELECT '%2', '%u', '%1'"
_IF_IT_IS_THERE = {
    "postgresql": " ON CONFLICT (alias) DO UPDATE SET expires = EXCLUDED.expires",
    "mysql": " ON DUPLICATE KEY UPDATE expires = '%1'",
}
_OPTIONS: Mapping[str, Mapping[str, object]] = {"mysql": {"require_result_set": False}}
_TYPES = ("sqlite", "redis", "postgresql", "mysql")


class Envelopes(abc.ABC):
    """Senders by alias."""

    def share(self, links: Callable[[], Links]) -> None:  # noqa: B027 - SQLite asks no server
        """Take connections, as ``Map.share`` does."""

    @abc.abstractmethod
    def open(self) -> None:
        """Acquire what is needed. Raises SettingError."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of it."""

    @abc.abstractmethod
    def put(self, alias: str, sender: str, seconds: int) -> None:
        """Keep *sender* for so long. Raises LookupFailedError."""

    @abc.abstractmethod
    def get(self, alias: str) -> str | None:
        """Return what was put at *alias*, unless it has expired. Raises LookupFailedError."""

    def verify(self) -> None:  # noqa: B027 - a file that could be opened is right
        """Find out, for the command ``check``, what the first lookup would. Raises as ``Map.verify`` does."""


def alias_of(sender: str) -> str:
    """Return the name under which *sender* is kept: 32 letters and digits, in which case does not matter."""
    digest = hashlib.sha1(sender.encode("utf-8", "surrogateescape"), usedforsecurity=False).digest()
    return base64.b32hexencode(digest).decode()


def make(name: str, table: Mapping[str, object], base: Path) -> Envelopes:
    """Return the database that *table* tells of, and *name* names in errors and in the log. Raises SettingError."""
    key = f"maps.{name}.type"
    kind = settings.choice(key, table.get("type", DEFAULT["type"]), _TYPES)
    rest = {key: value for key, value in table.items() if key != "type"}
    if kind == "sqlite":
        return _Sqlite(name, rest, base)
    try:
        module = importlib.import_module(f"prefork_socketmap.maps.{kind}")
    except ImportError as error:
        problem = f"needs a Python package that is not there ({error}); install prefork-socketmap[{kind}]"
        raise MissingLibraryError(key, f'"{kind}" {problem}') from error
    owner: type[Map] = getattr(module, f"{kind.capitalize()}Map")
    # What the types have in common with all others speaks of keys and values that are none here.
    known = {key for key, _ in declared(owner)} - {key for key, _ in declared(Map)} - {"query", "require_result_set"}
    settings.reject_unknown(f"maps.{name}.", rest.keys(), known)

    def map_of(owner: type[Map], query: str) -> Map:
        return owner(name, {**rest, **_OPTIONS.get(kind, {}), "query": query}, base)

    if kind == "redis":
        return _Maps(map_of(module.RedisWriter, "SET PostSRSd/%2@1 %u EX %1"), map_of(owner, "GET PostSRSd/%u@1"))
    return _SqlMaps(map_of(owner, _WRITE + _IF_IT_IS_THERE[kind]), map_of(owner, _READ), map_of(owner, _TIDY))


class _Maps(Envelopes):
    """A database by way of maps, which have one connection. It forgets by itself."""

    def __init__(self, write: Map, read: Map, *others: Map) -> None:
        self._write, self._read = write, read
        self._maps = (write, read, *others)
        links = Links()
        self.share(lambda: links)

    def share(self, links: Callable[[], Links]) -> None:
        for each in self._maps:
            each.share(links)

    def open(self) -> None:
        for each in self._maps:
            each.open()

    def close(self) -> None:
        for each in self._maps:
            each.close()

    def put(self, alias: str, sender: str, seconds: int) -> None:
        self._write.find(f"{sender}@{alias}.{seconds}")

    def get(self, alias: str) -> str | None:
        values = self._read.find(f"{alias}@{int(time.time())}")
        return values[0] if values else None

    def verify(self) -> None:
        self._read.verify()  # to Redis all commands are alike


class _SqlMaps(_Maps):
    """The same, where what has expired has to be removed."""

    def __init__(self, write: Map, read: Map, tidy: Map) -> None:
        super().__init__(write, read, tidy)
        self._tidy = tidy
        # Not all workers at once.
        self._tidy_at = time.monotonic() + random.uniform(0, _TIDY_EVERY)  # noqa: S311

    def put(self, alias: str, sender: str, seconds: int) -> None:
        super().put(alias, sender, int(time.time()) + seconds)
        if time.monotonic() >= self._tidy_at:
            self._tidy_at = time.monotonic() + _TIDY_EVERY
            # What goes wrong, the map has logged.
            with contextlib.suppress(LookupFailedError):
                self._tidy.find(f"expired@{int(time.time())}")

    def verify(self) -> None:
        for each in self._maps:
            each.verify()


class _Sqlite(Envelopes):
    """A file of ours, which is made if need be."""

    dbpath = setting(settings.text, DEFAULT["dbpath"])
    timeout = setting(settings.seconds, 5.0)

    _connection: sqlite3.Connection

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        self.__dict__.update(read_table(type(self), f"maps.{name}.", table))
        self._name = name
        self._path = base / self.dbpath
        self._tidy_at = float("-inf")

    def open(self) -> None:
        try:
            self._connect()
        except sqlite3.Error as error:
            problem = f"cannot open {settings.shown(self.dbpath)}: {reason(error)}"
            raise settings.SettingError(f"maps.{self._name}.dbpath", problem) from None

    def _connect(self) -> None:
        with contextlib.ExitStack() as undo:
            self._connection = sqlite3.connect(self._path, timeout=self.timeout, isolation_level=None)
            undo.callback(self._connection.close)
            self._connection.text_factory = to_text
            # A crash of the machine may cost the last entries, but a crash of ours none; and nobody waits for a disk.
            use_wal(self._connection, self.timeout)
            self._connection.executescript(
                """
                PRAGMA synchronous = NORMAL;
                CREATE TABLE IF NOT EXISTS kv (
                    k TEXT NOT NULL UNIQUE ON CONFLICT REPLACE, v TEXT NOT NULL, lt INTEGER NOT NULL
                );
                CREATE INDEX IF NOT EXISTS ltidx ON kv (lt);
                """
            )
            undo.pop_all()

    def close(self) -> None:
        self._connection.close()

    def put(self, alias: str, sender: str, seconds: int) -> None:
        now = int(time.time())
        statement = "INSERT INTO kv (k, v, lt) VALUES (?, ?, ?)"
        self._execute(statement, f"{alias}@{DOMAIN}", sender, now + seconds)
        if time.monotonic() >= self._tidy_at:
            self._tidy_at = time.monotonic() + _TIDY_EVERY
            self._execute("DELETE FROM kv WHERE lt <= ?", now)

    def get(self, alias: str) -> str | None:
        statement = "SELECT v FROM kv WHERE k = ? AND lt > ?"
        rows = self._execute(statement, f"{alias}@{DOMAIN}", int(time.time()))
        return str(rows[0][0]) if rows else None

    def _execute(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            log.log(logging.ERROR, "map %s: %s", self._name, error, extra={"map": self._name})
            raise LookupFailedError(Reply.temp_fail(f"map {self._name}: the database failed")) from error
