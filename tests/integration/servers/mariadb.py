"""A private MariaDB."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.servers.process import Certificate, Server, library, program, running

PASSWORD = "a pass'word\\"
DATABASE = "mail"


class Mariadb(Server):
    """MariaDB with TLS, whose user ``postfix`` has a password and may only read and call procedures."""

    user = "mysql"

    def __init__(self) -> None:
        super().__init__()
        self._pymysql = library("pymysql", "mysql")
        self.tls = Certificate(self.directory, self.user)
        self.socket = self.directory / "socket"
        self._data = self.directory / "data"
        self.run(
            program("mariadb-install-db", "mariadb-server"),
            "--no-defaults",
            f"--datadir={self._data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )

    def command(self) -> list[str]:
        return [
            program("mariadbd", "mariadb-server"),
            "--no-defaults",
            f"--datadir={self._data}",
            f"--socket={self.socket}",
            "--bind-address=127.0.0.1",
            f"--port={self.port}",
            f"--pid-file={self.directory / 'pid'}",
            "--innodb-flush-log-at-trx-commit=0",
            "--character-set-server=utf8mb4",
            f"--ssl-cert={self.tls.certificate}",
            f"--ssl-key={self.tls.key}",
        ]

    def is_ready(self) -> bool:
        with contextlib.suppress(self._pymysql.OperationalError):
            self.execute("SELECT 1", database=None)
            return True
        return False

    def execute(self, *statements: str, database: str | None = DATABASE) -> None:
        """Run *statements* as the database's superuser."""
        for statement in statements:
            self.fetch(statement, database)

    def fetch(self, statement: str, database: str | None = DATABASE) -> Any:
        """Run *statement* as the database's superuser; return the rows."""
        connect = self._pymysql.connect
        with (
            connect(unix_socket=str(self.socket), user="root", database=database, autocommit=True) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement)
            return cursor.fetchall()

    def terminate_clients(self) -> None:
        """Disconnect every client, as an administrator may."""
        self.execute("KILL USER postfix")


@pytest.fixture(scope="session")
def _mariadb() -> Iterator[Mariadb]:
    with running(Mariadb()) as server:
        quoted = PASSWORD.replace("\\", "\\\\").replace("'", "''")
        server.execute(f"CREATE DATABASE {DATABASE}", database=None)
        server.execute(
            f"CREATE USER postfix@'%' IDENTIFIED BY '{quoted}'",
            "CREATE TABLE alias (address varchar(255), goto varchar(255))",
            f"GRANT SELECT, EXECUTE ON {DATABASE}.* TO postfix@'%'",
        )
        yield server


@pytest.fixture
def mariadb(_mariadb: Mariadb) -> Iterator[Mariadb]:
    """A MariaDB that runs, with an empty table ``alias (address, goto)`` in the database ``mail``."""
    _mariadb.execute("TRUNCATE alias")
    yield _mariadb
    _mariadb.restore()
