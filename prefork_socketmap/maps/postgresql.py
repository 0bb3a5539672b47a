"""The type ``postgresql``: a PostgreSQL database, in the terms of pgsql_table(5).

The driver is psycopg 3, and of it ``psycopg.pq``, the part that wraps libpq and converts nothing. With it a lookup
has one deadline, also when the server is frozen: libpq's own timeouts are whole seconds and do not cover queries. And
results are the texts that Postfix's own table gets: ``t`` for true, for one.

A parameter's type is left to the server, as that of the literal is in whose place it stands.
"""

from __future__ import annotations

import hashlib
import re
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
from prefork_socketmap.maps.network import Trouble
from prefork_socketmap.maps.secret import Secret, secret
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.sqltext import POSTGRESQL, POSTGRESQL_WITH_BACKSLASHES, Statement
from prefork_socketmap.socketmap.messages import to_text

_PORT = 5432
_URI = ("postgresql://", "postgres://")
_SECRET = re.compile(r"password$|secret$")  # parameters of libpq: of the account, of a client's key, of OAuth
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# A login that was refused, by the key that is to blame.
_BLAMED = {
    "password": re.compile(r"password authentication failed|no password supplied"),
    "dbname": re.compile(r'database ".*" does not exist'),
    "user": re.compile(r'role ".*" does not exist|no pg_hba\.conf entry|(Peer|Ident) authentication failed'),
}
_FAILED = (pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.BAD_RESPONSE)
# Types of parameters.
_UNKNOWN = 0
_TEXT = 25
# In PgBouncer's words, which are never translated.
_NO_OPTIONS = re.compile("unsupported startup parameter.* options")
# SQLSTATEs: PostgreSQL's manual, appendix A.
_INDETERMINATE = b"42P18"
_NAME_IS_TAKEN = b"42P05"
# There is no statement of the name: a pooler has lent us another connection of the server than before. Or its result
# has other types by now, since a table was altered.
_NOT_KEPT = frozenset({b"26000", b"0A000"})


def _host(key: str, value: str) -> None:
    """Check a host, or a URI: without a password in it, since the log names hosts."""
    if not value.startswith(_URI):
        host_setting.host(key, value)
        return
    try:
        names = conninfo_to_dict(value).keys()
    except psycopg.Error:
        # Not libpq's words about it: it quotes the URI, in which a password may be.
        raise settings.SettingError(key, "has a URI that libpq does not understand") from None
    if any(_SECRET.search(name) for name in names):
        raise settings.SettingError(key, "has a password in a URI; use password, password_file or password_env")


def _hosts(key: str, value: object) -> tuple[str, ...]:
    return host_setting.hosts(key, value, _host)


def _ssl_mode(key: str, value: object) -> str:
    return settings.choice(key, value, _SSL_MODES)


class PostgresqlMap(sql.SqlServerMap[pq.abc.PGconn]):
    """Answers with every column of every row that the query finds."""

    hosts = setting(_hosts)
    """Hosts, Unix sockets, or URIs, whose parameters come before the settings below. Default port: 5432."""
    dbname = setting(settings.text, "")
    """The database; libpq's default is the user's name."""
    user = setting(settings.text, "")
    """The role to log in as; libpq's default is the name of the process's user."""
    password = setting(secret, "")
    password_file = setting(secret, "")
    password_env = setting(secret, "")
    sslmode = setting(_ssl_mode, "")
    """How strict TLS is, in libpq's words; ``verify-full`` is the one that keeps out who is in between."""
    sslrootcert = setting(settings.text, "")
    """The certificates of the authorities; this and the next two are libpq's, too."""
    sslcert = setting(settings.text, "")
    sslkey = setting(settings.text, "")
    query = sql.query(POSTGRESQL, POSTGRESQL_WITH_BACKSLASHES)
    """The statement; parts of the key are bound as its parameters."""

    errors = (psycopg.Error, OSError, sql.QueryError)
    account = ("user", "password", "password_file", "password_env")
    of_the_query = ("query",)

    _is_named: bool
    """Whether the server keeps the statement; otherwise each lookup sends it."""
    _name: bytes
    _types: list[int]
    """Of the parameters; 0 is for the server to find."""

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        self._password = Secret(self, "password")
        self._without_options: set[str] = set()
        self._conninfo(self.hosts[0])

    def dial(self, host: str, timeout: float) -> pq.abc.PGconn:
        """Connect to *host* and log in."""
        deadline = time.monotonic() + timeout
        try:
            return self._log_in(host, deadline)
        except _NoOptionsError as error:
            log.info("map %s: %s is not told the time limit of a query: %s", self.name, host, error)
            self._without_options.add(host)
        return self._log_in(host, deadline)

    def _log_in(self, host: str, deadline: float) -> pq.abc.PGconn:
        connection = pq.PGconn.connect_start(self._conninfo(host).encode())
        try:
            _finish_connecting(connection, deadline)
            connection.nonblocking = 1
        except BaseException:
            connection.finish()
            raise
        return connection

    def prepare_query(self, connection: pq.abc.PGconn) -> Statement:
        """Prepare the query under a name that is its own."""
        conforming = connection.parameter_status(b"standard_conforming_strings") != b"off"
        statement = sql.statement(self.query, POSTGRESQL if conforming else POSTGRESQL_WITH_BACKSLASHES)
        self._types = [_UNKNOWN] * len(statement.parameters)
        deadline = time.monotonic() + self.timeout
        while not self._try_to_prepare(connection, statement, deadline):
            pass
        return statement

    def _try_to_prepare(self, connection: pq.abc.PGconn, statement: Statement, deadline: float) -> bool:
        """Prepare *statement*; return False if one more type is known now. Raises one of ``errors``."""
        # Behind a pooler that lends a connection of the server to one client after the other, another worker may have
        # given the name: to the same statement.
        self._name = hashlib.sha256(f"{statement.text}\0{self._types}".encode()).hexdigest()[:40].encode()
        self._is_named = True
        connection.send_prepare(self._name, statement.text.encode(), self._types)
        result = _result(connection, deadline)
        state = _state(result)
        place = _parameter_in(result) if state == _INDETERMINATE else None
        if place is not None and self._types[place : place + 1] == [_UNKNOWN]:
            # As in json_build_object('k', '%s'). There a literal of no known type is text.
            self._types[place] = _TEXT
            return False
        if result.status in _FAILED and state != _NAME_IS_TAKEN:
            raise _error(result)
        self._count_parameters(connection, statement, deadline)
        return True

    def _count_parameters(self, connection: pq.abc.PGconn, statement: Statement, deadline: float) -> None:
        connection.send_describe_prepared(self._name)
        result = _result(connection, deadline)
        if _state(result) in _NOT_KEPT:
            self._send_it_whole(result)
        elif result.status in _FAILED:
            raise _error(result)
        elif result.nparams != len(statement.parameters):
            problem = f"the server sees {result.nparams} parameters in {settings.shown(statement.text)}"
            raise sql.QueryError(problem)

    def execute(self, connection: pq.abc.PGconn, values: Sequence[str]) -> Sequence[str] | None:
        """Run the statement."""
        deadline = time.monotonic() + self.timeout
        parameters = [value.encode() for value in values]
        if self._is_named:
            connection.send_query_prepared(self._name, parameters)
            result = _result(connection, deadline)
            if _state(result) in _NOT_KEPT:
                self._send_it_whole(result)
        if not self._is_named:
            connection.send_query_params(self._statement.text.encode(), parameters, self._types)
            result = _result(connection, deadline)
        if result.status in _FAILED:
            raise _error(result)
        return sql.values(_rows(result))

    def _send_it_whole(self, result: pq.abc.PGresult) -> None:
        log.info("map %s: from now on the query is sent with each lookup: %s", self.name, _text(result))
        self._is_named = False

    def server_limit(self, connection: pq.abc.PGconn) -> int | None:
        """Return ``max_connections`` without those that superusers have for themselves."""
        connection.send_query(
            b"SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
        )
        result = _result(connection, time.monotonic() + self.timeout)
        if result.status in _FAILED:
            raise _error(result)
        return int(result.get_value(0, 0) or 0)

    def blamed(self, error: Exception) -> str:
        """The server tells what it does not like in words only, which may be in another language."""
        return next((key for key, words in _BLAMED.items() if words.search(str(error))), super().blamed(error))

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
            "options": "" if host in self._without_options else f"-c statement_timeout={self.timeout * 900:.0f}",
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


class _NoOptionsError(psycopg.OperationalError):
    """A pooler, as PgBouncer by default, admits no settings of a session: the next client would have them, too."""


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


def _finish_connecting(connection: pq.abc.PGconn, deadline: float) -> None:
    status = pq.PollingStatus.WRITING
    while status != pq.PollingStatus.OK:
        if connection.status == pq.ConnStatus.BAD or status == pq.PollingStatus.FAILED:
            text = " ".join(to_text(connection.error_message).split())
            raise (_NoOptionsError if _NO_OPTIONS.search(text) else psycopg.OperationalError)(text)
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


def _state(result: pq.abc.PGresult) -> bytes | None:
    return result.error_field(pq.DiagnosticField.SQLSTATE)


def _text(result: pq.abc.PGresult) -> str:
    return to_text(result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or result.error_message)


def _parameter_in(result: pq.abc.PGresult) -> int | None:
    """Return the place of the parameter that an error speaks of, in whatever language."""
    match = re.search(r"\$([1-9]\d*)", _text(result))
    return int(match[1]) - 1 if match else None


def _error(result: pq.abc.PGresult) -> psycopg.Error:
    severity = result.error_field(pq.DiagnosticField.SEVERITY_NONLOCALIZED)
    kind = _FatalError if severity in (b"FATAL", b"PANIC") else psycopg.DatabaseError
    return kind(_text(result))


def _rows(result: pq.abc.PGresult) -> list[list[bytes | None]]:
    columns = range(result.nfields)
    return [[result.get_value(row, column) for column in columns] for row in range(result.ntuples)]
