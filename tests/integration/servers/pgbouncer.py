"""A private PgBouncer: a pooler that lends a connection to PostgreSQL to one client after the other."""

from __future__ import annotations

from tests.integration.servers.postgresql import DATABASE, Postgresql
from tests.integration.servers.process import Server, answers_at, program


class Pgbouncer(Server):
    """PgBouncer with one connection to *server*, which each transaction of a client gets for itself.

    With *forgets*, what a client has prepared is gone after the transaction, as when the next one gets another
    connection.
    """

    user = "postgres"

    def __init__(self, server: Postgresql, *, forgets: bool) -> None:
        super().__init__()
        self._config = self.directory / "pgbouncer.ini"
        self._config.write_text(
            f"""\
[databases]
{DATABASE} = host={server.directory} port={server.port} user=postgres pool_size=1
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self.port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
server_reset_query_always = {int(forgets)}
"""
        )

    def command(self) -> list[str]:
        return [program("pgbouncer", "pgbouncer"), str(self._config)]

    def is_ready(self) -> bool:
        return answers_at(self.port)
