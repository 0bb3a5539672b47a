"""The type ``mysql``: a MySQL or MariaDB database, in the terms of mysql_table(5).

The driver is PyMySQL rather than mysqlclient: its timeouts are of any length and hold for every read, where those of
the C library are whole seconds; it waits in Python, where the watchdog's signal gets through; and it needs no
compiler. Neither binds parameters on the server; SQL itself does, with PREPARE and EXECUTE. What is bound gets there
as hexadecimal digits, which end no literal.

A MariaDB is given the parameters with the EXECUTE. A MySQL takes only variables there, which are set before, by a
statement that travels in the same packet.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pymysql
from pymysql.constants import CLIENT, ER
from pymysql.converters import encoders
from pymysql.cursors import Cursor

from prefork_socketmap import settings
from prefork_socketmap.maps import host as host_setting
from prefork_socketmap.maps import optionfile, sql
from prefork_socketmap.maps.base import LookupFailedError, reason
from prefork_socketmap.maps.host import Host
from prefork_socketmap.maps.network import Trouble
from prefork_socketmap.maps.secret import Secret, secret
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.sqltext import MYSQL, Statement
from prefork_socketmap.maps.tls import TlsSettings
from prefork_socketmap.socketmap.messages import Reply

_PORT = 3306
_NAME = "prefork_socketmap"
_TLS_OPTIONS = {
    "tls_CAfile": "ssl-ca",
    "tls_CApath": "ssl-capath",
    "tls_cert_file": "ssl-cert",
    "tls_key_file": "ssl-key",
}
# What a server says to a client that it is about to disconnect: shutdown, KILL (MariaDB), idle too long (MySQL 8).
# And what one says that does not know the prepared query: a proxy has put it in the place of the one that did.
# A login that was refused, by the key that is to blame.
_BLAMED = {ER.ACCESS_DENIED_ERROR: "password", ER.BAD_DB_ERROR: "dbname", ER.DBACCESS_DENIED_ERROR: "dbname"}
_GOODBYES = frozenset({ER.SERVER_SHUTDOWN, 1927, 4031, ER.UNKNOWN_STMT_HANDLER})


class MysqlMap(TlsSettings, sql.SqlServerMap["pymysql.Connection[Any]"]):
    """Answers with every column of every row that the query, or the procedure that it calls, finds."""

    hosts = setting(host_setting.hosts)
    """Hosts and Unix sockets. Default port: 3306. "localhost" is TCP here, unlike in mysql_table(5)."""
    dbname = setting(settings.text, "")
    """The database; may be left out when the query names it."""
    user = setting(settings.text, "")
    """The account to log in as; the default is the name of the process's user."""
    password = setting(secret, "")
    password_file = setting(secret, "")
    password_env = setting(secret, "")
    query = sql.query(*MYSQL.values())
    """The statement; parts of the key are bound as its parameters."""
    require_result_set = setting(settings.boolean, True)
    """Whether a statement without a result set, such as a procedure that has selected nothing, is an error; otherwise
    it is "not found"."""

    option_file = setting(settings.text, "")
    """An option file of MySQL's clients: its ``[client]`` has what is not set here of the login and of TLS."""
    option_group = setting(settings.text, "client")
    """A group of it that is read as well."""

    errors = (pymysql.MySQLError, OSError, sql.QueryError)
    account = ("user", "password", "password_file", "password_env")
    of_the_query = ("query", "require_result_set")

    _name: str
    """Of the statement."""
    _takes_values: bool
    """Whether EXECUTE takes other values than variables."""

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        self._password = Secret(self, "password")
        self._take_options()
        self._tls = self.tls_context() if self.uses_tls else None

    def dial(self, host: str, timeout: float) -> pymysql.Connection[Any]:
        """Connect to *host* and log in."""
        address = Host.parse(host, _PORT)
        login = self._options()
        options: dict[str, Any] = {
            "host": address.name or None,
            "port": address.port,
            "unix_socket": address.path or None,
            "user": self.user or login.get("user"),
            "password": self._password.read() or login.get("password", ""),
            "database": self.dbname or None,
            "charset": "utf8mb4",
            "autocommit": True,
            # For the two that stand in "execute", which have of a key nothing but digits.
            "client_flag": CLIENT.MULTI_STATEMENTS,
            "ssl": self._tls,
            # Unasked, PyMySQL speaks TLS if the server can, but nobody listens on a Unix socket.
            "ssl_disabled": bool(address.path) and self._tls is None,
            # Without decoders, every value is the text that the server sent.
            "conv": encoders,
            "connect_timeout": timeout,
            "read_timeout": timeout,
            "write_timeout": timeout,
        }
        connection = pymysql.connect(**options)
        # A host that does not even say hello must leave time for the next one, but a query has the whole time.
        # There is no public way to tell the two apart.
        connection._read_timeout = connection._write_timeout = self.timeout  # type: ignore[attr-defined]
        return connection

    def _options(self) -> dict[str, str]:
        """Return what the option file has now. Raises OSError."""
        if not self.option_file:
            return {}
        return optionfile.read(self.base / self.option_file, {"client", self.option_group})

    def _take_options(self) -> None:
        """Take the settings of TLS from the option file. Raises SettingError when it cannot be read."""
        if not self.option_file and self.option_group != "client":
            raise settings.SettingError(f"maps.{self.name}.option_group", "goes with option_file only")
        try:
            options = self._options()
        except OSError as error:
            problem = f"cannot be read: {reason(error)}"
            raise settings.SettingError(f"maps.{self.name}.option_file", problem) from None
        for ours, theirs in _TLS_OPTIONS.items():
            if not getattr(self, ours) and options.get(theirs):
                setattr(self, ours, options[theirs])

    def prepare_query(self, connection: pymysql.Connection[Any]) -> Statement:
        """Prepare the query, in the language that the server's modes make of SQL."""
        with connection.cursor() as cursor:
            cursor.execute("SELECT @@sql_mode")
            ((modes,),) = cursor.fetchall()
            dialect = MYSQL["ANSI_QUOTES" in modes.split(","), "NO_BACKSLASH_ESCAPES" not in modes.split(",")]
            statement = sql.statement(self.query, dialect)
            # Maps that share the connection have statements of their own.
            self._name = f"{_NAME}_{zlib.crc32(statement.text.encode()):x}"
            cursor.execute(f"PREPARE {self._name} FROM %s", [statement.text])
            self._takes_values = _takes_values(cursor)
        return statement

    def execute(self, connection: pymysql.Connection[Any], values: Sequence[str]) -> Sequence[str] | None:
        """Run the statement."""
        # Closing the cursor reads what else a procedure returns.
        with connection.cursor() as cursor:
            if not values:
                cursor.execute(f"EXECUTE {self._name}")
            elif self._takes_values:
                cursor.execute(f"EXECUTE {self._name} USING {','.join(map(_hexadecimal, values))}")
            else:
                names = [f"@{_NAME}{number}" for number in range(len(values))]
                assignments = ",".join(
                    f"{name}={_hexadecimal(value)}" for name, value in zip(names, values, strict=True)
                )
                cursor.execute(f"SET {assignments};EXECUTE {self._name} USING {','.join(names)}")
                cursor.nextset()
            if cursor.description is None and self.require_result_set:
                raise LookupFailedError(Reply.temp_fail(f"map {self.name}: the query has no result set"))
            return sql.values(cursor.fetchall())

    def server_limit(self, connection: pymysql.Connection[Any]) -> int | None:
        """Return ``max_connections``."""
        with connection.cursor() as cursor:
            cursor.execute("SELECT @@max_connections")
            ((limit,),) = cursor.fetchall()
        return int(limit)

    def words(self, error: Exception) -> str:
        """Return what the server said, with the number of the error behind it."""
        match error.args:
            case (int(number), str(text)):
                return f"{text} ({number})"
        return super().words(error)

    def blamed(self, error: Exception) -> str:
        """The server has a number for it."""
        return _BLAMED.get(error.args[0] if error.args else 0, super().blamed(error))

    def hang_up(self, connection: pymysql.Connection[Any]) -> None:
        """Say goodbye, if the connection is still there, and close."""
        if connection.open:
            connection.close()

    def trouble(self, connection: pymysql.Connection[Any], error: Exception) -> Trouble:
        """PyMySQL closes a connection that has failed, and keeps the failure of the socket as the context."""
        if isinstance(error.__context__, TimeoutError):
            return Trouble.SLOW
        if not connection.open or (error.args and error.args[0] in _GOODBYES):
            return Trouble.LOST
        return Trouble.REFUSED


def _takes_values(cursor: Cursor) -> bool:
    """Whether EXECUTE takes other values than variables. The server's version does not tell: it may be a proxy's."""
    try:
        cursor.execute(f"EXECUTE no_{_NAME} USING 0x00")
    except pymysql.MySQLError as error:
        if error.args[0] == ER.PARSE_ERROR:
            return False
        if error.args[0] != ER.UNKNOWN_STMT_HANDLER:
            raise
    return True


def _hexadecimal(value: str) -> str:
    return f"_utf8mb4 0x{value.encode().hex()}"
