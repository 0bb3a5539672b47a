"""The type ``mysql``: a MySQL or MariaDB database, in the terms of mysql_table(5).

The driver is PyMySQL rather than mysqlclient: its timeouts are of any length and hold for every read, where those of
the C library are whole seconds; it waits in Python, where the watchdog's signal gets through; and it needs no
compiler. Neither binds parameters on the server: the driver, which knows the character set and the server's
``sql_mode``, puts them in as quoted literals. Neither sends several statements at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pymysql
from pymysql.constants import ER
from pymysql.converters import encoders

from prefork_socketmap import settings
from prefork_socketmap.maps import host as host_setting
from prefork_socketmap.maps import sql
from prefork_socketmap.maps.base import LookupFailedError, log
from prefork_socketmap.maps.host import Host
from prefork_socketmap.maps.network import NetworkMap, Trouble
from prefork_socketmap.maps.secret import Secret, secret
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.tls import TlsSettings
from prefork_socketmap.socketmap.messages import Reply

_PORT = 3306
# What a server says to a client that it is about to disconnect: shutdown, KILL (MariaDB), idle too long (MySQL 8).
_GOODBYES = frozenset({ER.SERVER_SHUTDOWN, 1927, 4031})


class MysqlMap(TlsSettings, NetworkMap["pymysql.Connection[Any]"]):
    """Answers with every column of every row that the query, or the procedure that it calls, finds."""

    hosts = setting(host_setting.hosts)
    """Hosts and Unix sockets. Default port: 3306. "localhost" is TCP here, unlike in mysql_table(5)."""
    dbname = setting(settings.text, "")
    """The database; may be left out when the query names it."""
    user = setting(settings.text, "")
    """The account to log in as; the default is the name of the process's user."""
    password = setting(secret, "")
    password_file = setting(settings.text, "")
    password_env = setting(settings.text, "")
    query = setting(sql.query)
    """The statement; parts of the key are its parameters."""
    require_result_set = setting(settings.boolean, True)
    """Whether a statement without a result set, such as a procedure that has selected nothing, is an error; otherwise
    it is "not found"."""

    errors = (pymysql.MySQLError, OSError)

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        self._password = Secret(self, "password")
        self._tls = self.tls_context() if self.uses_tls else None
        self._statement = self.query.statement("%s")

    def dial(self, host: str, timeout: float) -> pymysql.Connection[Any]:
        """Connect to *host* and log in."""
        address = Host.parse(host, _PORT)
        options: dict[str, Any] = {
            "host": address.name or None,
            "port": address.port,
            "unix_socket": address.path or None,
            "user": self.user or None,
            "password": self._password.read(),
            "database": self.dbname or None,
            "charset": "utf8mb4",
            "autocommit": True,
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

    def ask(self, connection: pymysql.Connection[Any], key: str) -> Sequence[str] | None:
        """Run the query for *key*."""
        parameters = self.query.parameters(key)
        log.debug("map %s: %s with %r", self.name, self._statement, parameters)
        # Closing the cursor reads what else a procedure returns.
        with connection.cursor() as cursor:
            cursor.execute(self._statement, parameters)
            if cursor.description is None and self.require_result_set:
                raise LookupFailedError(Reply.temp_fail(f"map {self.name}: the query has no result set"))
            return sql.values(cursor.fetchall())

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
