"""A private PostgreSQL."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from tests.integration.servers.process import Certificate, Server, library, program, running

PASSWORD = "a pass'word\\"
DATABASE = "mail"


class Postgresql(Server):
    """PostgreSQL with TLS, whose user ``postfix`` has a password and may only read."""

    user = "postgres"
    # "Fast": clients are disconnected instead of waited for.
    stop_signal = signal.SIGINT

    def __init__(self) -> None:
        super().__init__()
        self._psycopg = library("psycopg", "postgresql")
        self.tls = Certificate(self.directory, self.user)
        self._data = self.directory / "data"
        initdb = program("initdb", "postgresql")
        self.run(initdb, "--pgdata", self._data, "--no-sync", "--encoding=UTF8", "--no-locale", "--username=postgres")
        access = "local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n"
        (self._data / "pg_hba.conf").write_text(access + "host all all 127.0.0.1/32 scram-sha-256\n")

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.directory,
            "fsync": "off",
            "ssl": "on",
            "ssl_cert_file": self.tls.certificate,
            "ssl_key_file": self.tls.key,
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [program("postgres", "postgresql"), "-D", str(self._data), *options]

    def is_ready(self) -> bool:
        with contextlib.suppress(self._psycopg.OperationalError):
            self.execute("SELECT 1", database="postgres")
            return True
        return False

    def execute(self, *statements: str, database: str = DATABASE) -> None:
        """Run *statements* as the database's superuser."""
        with self._psycopg.connect(
            host=str(self.directory), port=self.port, user="postgres", dbname=database, autocommit=True
        ) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def terminate_clients(self) -> None:
        """Disconnect every client, as an administrator may."""
        self.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postfix'")


@pytest.fixture(scope="session")
def _postgresql() -> Iterator[Postgresql]:
    with running(Postgresql()) as server:
        quoted = PASSWORD.replace("'", "''")
        server.execute(f"CREATE DATABASE {DATABASE}", database="postgres")
        server.execute(
            f"CREATE USER postfix PASSWORD '{quoted}'",
            "CREATE TABLE alias (address text, goto text)",
            "GRANT SELECT ON alias TO postfix",
        )
        yield server


@pytest.fixture
def postgresql(_postgresql: Postgresql) -> Iterator[Postgresql]:
    """A PostgreSQL that runs, with an empty table ``alias (address, goto)`` in the database ``mail``."""
    _postgresql.execute("TRUNCATE alias")
    yield _postgresql
    _postgresql.restore()
