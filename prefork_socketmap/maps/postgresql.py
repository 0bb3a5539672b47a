"""The type ``postgresql``: a PostgreSQL database, in the terms of pgsql_table(5).

The driver is psycopg 3, and of it ``psycopg.pq``, the part that wraps libpq and converts nothing. With it a lookup
has one deadline, also when the server is frozen: libpq's own timeouts are whole seconds and do not cover queries. And
results are the texts that Postfix's own table gets: ``t`` for true, for one.
"""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from prefork_socketmap import settings
from prefork_socketmap.maps import host as host_setting
from prefork_socketmap.maps import sql
from prefork_socketmap.maps.base import log
from prefork_socketmap.maps.host import Host
from prefork_socketmap.maps.network import NetworkMap, Trouble
from prefork_socketmap.maps.secret import Secret, secret
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.socketmap.messages import to_text

_PORT = 5432
_URI = ("postgresql://", "postgres://")
_FAILED = (pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.BAD_RESPONSE)


def _host(key: str, value: str) -> None:
    """Check a host, or a URI: without a password in it, since the log names hosts."""
    if not value.startswith(_URI):
        host_setting.host(key, value)
        return
    try:
        has_password = "password" in conninfo_to_dict(value)
    except psycopg.Error:
        # Not libpq's words about it: it quotes the URI, in which a password may be.
        raise settings.SettingError(key, "has a URI that libpq does not understand") from None
    if has_password:
        raise settings.SettingError(key, "has a password in a URI; use password, password_file or password_env")


def _hosts(key: str, value: object) -> tuple[str, ...]:
    return host_setting.hosts(key, value, _host)


class PostgresqlMap(NetworkMap[pq.abc.PGconn]):
    """Answers with every column of every row that the query finds."""

    hosts = setting(_hosts)
    """Hosts, Unix sockets, or URIs, whose parameters come before the settings below. Default port: 5432."""
    dbname = setting(settings.text, "")
    """The database; libpq's default is the user's name."""
    user = setting(settings.text, "")
    """The role to log in as; libpq's default is the name of the process's user."""
    password = setting(secret, "")
    password_file = setting(settings.text, "")
    password_env = setting(settings.text, "")
    sslmode = setting(settings.text, "")
    """How strict TLS is, in libpq's words; ``verify-full`` is the one that keeps out who is in between."""
    sslrootcert = setting(settings.text, "")
    """The certificates of the authorities; this and the next two are libpq's, too."""
    sslcert = setting(settings.text, "")
    sslkey = setting(settings.text, "")
    query = setting(sql.query)
    """The statement; parts of the key are bound as its parameters."""

    errors = (psycopg.Error, OSError)

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        self._password = Secret(self, "password")
        self._statement = _numbered(self.query)
        self._conninfo(self.hosts[0])

    def dial(self, host: str, timeout: float) -> pq.abc.PGconn:
        """Connect to *host* and log in."""
        connection = pq.PGconn.connect_start(self._conninfo(host).encode())
        try:
            _finish_connecting(connection, time.monotonic() + timeout)
            connection.nonblocking = 1
        except BaseException:
            connection.finish()
            raise
        return connection

    def ask(self, connection: pq.abc.PGconn, key: str) -> Sequence[str] | None:
        """Run the query for *key*."""
        parameters = self.query.parameters(key)
        log.debug("map %s: %s with %r", self.name, self._statement, parameters)
        connection.send_query_params(self._statement.encode(), [text.encode() for text in parameters])
        result = _result(connection, time.monotonic() + self.timeout)
        if result.status in _FAILED:
            raise _error(result)
        return sql.values(_rows(result))

    def hang_up(self, connection: pq.abc.PGconn) -> None:
        """Say goodbye, if the server still listens, and close."""
        connection.finish()

    def trouble(self, connection: pq.abc.PGconn, error: Exception) -> Trouble:
        """An error that the server told leaves the connection good, unless it is the server's last word."""
        if isinstance(error, _NoAnswerError):
            return Trouble.SLOW
        if connection.status == pq.ConnStatus.BAD or isinstance(error, _FatalError | OSError):
            return Trouble.LOST
        return Trouble.REFUSED

    def _conninfo(self, host: str) -> str:
        parameters: dict[str, Any] = {
            "application_name": "prefork-socketmap",
            "client_encoding": "UTF8",
            # The server gives up on a slow query a little earlier than we do: then only the query is lost.
            "options": f"-c statement_timeout={self.timeout * 900:.0f}",
            "dbname": self.dbname,
            "user": self.user,
            "password": self._password.read(),
            "sslmode": self.sslmode,
            "sslrootcert": self._path(self.sslrootcert),
            "sslcert": self._path(self.sslcert),
            "sslkey": self._path(self.sslkey),
        }
        parameters |= conninfo_to_dict(host) if host.startswith(_URI) else _address(host)
        try:
            return make_conninfo(**{name: value for name, value in parameters.items() if value})
        except psycopg.ProgrammingError as error:
            raise settings.SettingError(f"maps.{self.name}", f"libpq does not take its settings: {error}") from None

    def _path(self, file: str) -> str:
        # "system" is no file but libpq's name for the system's own certificates.
        return str(self.base / file) if file not in ("", "system") else file


class _NoAnswerError(psycopg.OperationalError):
    """The server has not answered in time."""


class _FatalError(psycopg.OperationalError):
    """The server has told an error, and that it ends the session."""


def _address(host: str) -> dict[str, Any]:
    address = Host.parse(host, _PORT)
    if not address.path:
        return {"host": address.name, "port": address.port}
    # libpq wants the directory of the socket, and the port that ends its name, ".s.PGSQL.5432".
    path = Path(address.path)
    if path.name.startswith(".s.PGSQL."):
        return {"host": str(path.parent), "port": path.suffix[1:]}
    return {"host": str(path)}


def _numbered(query: sql.Query) -> str:
    """Return the statement with ``$1``, ``$2`` for its parameters."""
    first, *others = query.statement("\0").split("\0")
    return first + "".join(f"${number}{text}" for number, text in zip(itertools.count(1), others, strict=False))


def _finish_connecting(connection: pq.abc.PGconn, deadline: float) -> None:
    status = pq.PollingStatus.WRITING
    while status != pq.PollingStatus.OK:
        if connection.status == pq.ConnStatus.BAD or status == pq.PollingStatus.FAILED:
            raise psycopg.OperationalError(" ".join(to_text(connection.error_message).split()))
        _wait(connection, select.POLLOUT if status == pq.PollingStatus.WRITING else select.POLLIN, deadline)
        status = pq.PollingStatus(connection.connect_poll())


def _result(connection: pq.abc.PGconn, deadline: float) -> pq.abc.PGresult:
    """Return the result of the statement that was sent."""
    while connection.flush():
        _wait(connection, select.POLLIN | select.POLLOUT, deadline)
        connection.consume_input()
    results = []
    while (result := _next_result(connection, deadline)) is not None:
        results.append(result)
    return results[-1]


def _next_result(connection: pq.abc.PGconn, deadline: float) -> pq.abc.PGresult | None:
    while connection.is_busy():
        _wait(connection, select.POLLIN, deadline)
        connection.consume_input()
    return connection.get_result()


def _wait(connection: pq.abc.PGconn, events: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(connection.socket, events)
    if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise _NoAnswerError("the server does not answer")


def _error(result: pq.abc.PGresult) -> psycopg.Error:
    severity = result.error_field(pq.DiagnosticField.SEVERITY_NONLOCALIZED)
    message = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or result.error_message
    kind = _FatalError if severity in (b"FATAL", b"PANIC") else psycopg.DatabaseError
    return kind(to_text(message))


def _rows(result: pq.abc.PGresult) -> list[list[bytes | None]]:
    columns = range(result.nfields)
    return [[result.get_value(row, column) for column in columns] for row in range(result.ntuples)]
