"""What map types answer from in the bench: each is filled, configured, and asked by its bare driver as well."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg
import redis

from tests.bench.servers.table import ENTRIES, entries
from tests.integration.servers.postgresql import Postgresql
from tests.integration.servers.redis import Redis

LookUp = Callable[[str], str | None]

# For the tables that are meant to be large.
_MANY = 1_000_000
_QUERY = "SELECT mailbox FROM users WHERE address = {}"


@dataclass(frozen=True)
class Backend:
    """A prepared backend."""

    table: Mapping[str, object]
    """The map's table in the config file."""
    connect: Callable[[], LookUp]
    """Returns what a program would call that uses the driver and nothing else."""


@contextlib.contextmanager
def static(_directory: Path) -> Iterator[Backend]:
    """A table in the config file; beside it, a dict."""
    yield Backend({"type": "static", "entries": ENTRIES}, lambda: ENTRIES.get)


@contextlib.contextmanager
def file(directory: Path) -> Iterator[Backend]:
    """A text file with a million entries; beside it, a dict of as many."""
    path = directory / "users"
    with path.open("w") as lines:
        lines.writelines(f"{key}\t{value}\n" for key, value in entries(_MANY))
    table = {"type": "file", "path": str(path), "index_dir": str(directory / "index")}
    yield Backend(table, lambda: dict(entries(_MANY)).get)


@contextlib.contextmanager
def sqlite(directory: Path) -> Iterator[Backend]:
    """A table with a million rows; beside it, the module sqlite3."""
    path = directory / "users.db"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE users (address TEXT PRIMARY KEY, mailbox TEXT NOT NULL) WITHOUT ROWID")
        database.executemany("INSERT INTO users VALUES (?, ?)", entries(_MANY))

    def connect() -> LookUp:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        statement = _QUERY.format("?")
        return lambda key: _first(connection.execute(statement, (key,)).fetchone())

    yield Backend({"type": "sqlite", "dbpath": str(path), "query": _QUERY.format("'%s'")}, connect)


@contextlib.contextmanager
def redis_(_directory: Path) -> Iterator[Backend]:
    """Strings in Redis; beside it, redis-py."""
    with contextlib.closing(Redis()) as server:
        server.start()
        server.client().mset(ENTRIES)

        def connect() -> LookUp:
            client = redis.Redis(port=server.port, decode_responses=True)
            return lambda key: client.get(key)  # type: ignore[return-value]

        yield Backend({"type": "redis", "hosts": [f"127.0.0.1:{server.port}"], "query": "GET %s"}, connect)


@contextlib.contextmanager
def postgresql(_directory: Path) -> Iterator[Backend]:
    """A table in PostgreSQL; beside it, psycopg."""
    with contextlib.closing(Postgresql()) as server:
        server.start()
        rows = ", ".join(f"('{key}', '{value}')" for key, value in ENTRIES.items())
        server.execute(
            "CREATE TABLE users (address text PRIMARY KEY, mailbox text NOT NULL)",
            f"INSERT INTO users VALUES {rows}",
            database="postgres",
        )

        def connect() -> LookUp:
            connection = psycopg.connect(
                host=str(server.directory), port=server.port, user="postgres", dbname="postgres", autocommit=True
            )
            statement = _QUERY.format("%s")
            return lambda key: _first(connection.execute(statement, (key,)).fetchone())

        table = {
            "type": "postgresql",
            "hosts": [f"unix:{server.directory}/.s.PGSQL.{server.port}"],
            "user": "postgres",
            "dbname": "postgres",
            "query": _QUERY.format("'%s'"),
        }
        yield Backend(table, connect)


def _first(row: tuple[str, ...] | None) -> str | None:
    return row[0] if row else None


BACKENDS: Mapping[str, Callable[[Path], contextlib.AbstractContextManager[Backend]]] = {
    "static": static,
    "file": file,
    "sqlite": sqlite,
    "redis": redis_,
    "postgresql": postgresql,
}


def keys() -> Iterator[str]:
    """Iterate without end over the keys that are asked for."""
    return itertools.cycle(ENTRIES)
