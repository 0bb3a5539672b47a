"""The rows that the tests of SQL servers look up, and how to log in there."""

from __future__ import annotations

from collections.abc import Mapping

from tests.integration.servers import mariadb, postgresql
from tests.integration.servers.mariadb import Mariadb
from tests.integration.servers.postgresql import Postgresql

QUERY = "SELECT goto FROM alias WHERE address = '%s'"


def fill(server: Mariadb | Postgresql) -> None:
    """Put some rows into the server's table."""
    server.execute(
        "INSERT INTO alias VALUES ('info@example.com', 'staff@example.net'), ('many', 'a'), ('many', 'b'),"
        "('null', NULL), ('empty', ''), ('it''s', 'quoted'), ('secret', 'secret'), ('müller@example.com', 'ü'),"
        "('@example.org', 'catch-all')"
    )


def login(server: Mariadb | Postgresql, table: Mapping[str, object]) -> dict[str, object]:
    """Return *table*, with the settings by which a map logs in where it has none."""
    module = mariadb if isinstance(server, Mariadb) else postgresql
    common = {"hosts": [f"127.0.0.1:{server.port}"], "dbname": module.DATABASE, "user": "postfix", **table}
    has_password = {"password", "password_file", "password_env"} & table.keys()
    return common if has_password else {**common, "password": module.PASSWORD}
