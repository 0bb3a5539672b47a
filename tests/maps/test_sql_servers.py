"""What the types ``mysql`` and ``postgresql`` have in common, against real servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from prefork_socketmap.maps.base import Map
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply
from tests.integration.servers.mariadb import Mariadb
from tests.integration.servers.postgresql import Postgresql
from tests.maps.opening import OpenMap
from tests.maps.sqlrows import QUERY, fill, login

INJECTIONS = [
    "x' OR '1'='1",
    "x'; DROP TABLE alias; --",
    "x\\' OR 1=1 -- ",
    "\\",
    "' UNION SELECT 'secret' -- ",
    "$1",
    "%s",
    "%' OR address LIKE '%",
    "\u2019 or 1=1 -- ",
]


@dataclass
class Database:
    """A server, with what is different in its language and in its words."""

    server: Mariadb | Postgresql
    make: Callable[..., Map]
    sleeping: str
    no_column: str


@pytest.fixture(params=["mysql", "postgresql"])
def database(request: pytest.FixtureRequest, open_map: OpenMap) -> Database:
    kind = request.param
    server = request.getfixturevalue({"mysql": "mariadb"}.get(kind, kind))
    fill(server)

    def make(query: str = QUERY, **table: object) -> Map:
        return open_map(kind, query=query, **login(server, table))

    if kind == "mysql":
        return Database(server, make, "SELECT SLEEP(60) FROM DUAL WHERE '%s' <> ''", "Unknown column 'missing'")
    return Database(server, make, "SELECT pg_sleep(60) WHERE '%s' <> ''", 'column "missing" does not exist')


@pytest.mark.parametrize(
    ("key", "reply"),
    [
        ("info@example.com", Reply.ok("staff@example.net")),
        ("INFO@Example.com", Reply.ok("staff@example.net")),
        ("müller@example.com", Reply.ok("ü")),
        ("it's", Reply.ok("quoted")),
        ("many", Reply.ok("a,b")),
        ("null", Reply.not_found()),
        ("empty", Reply.not_found()),
        ("missing", Reply.not_found()),
        ("\udcff", Reply.not_found()),
    ],
)
@pytest.mark.parametrize("query", [QUERY, "SELECT goto FROM alias WHERE address = %s"])
def test_the_query_answers(database: Database, query: str, key: str, reply: Reply) -> None:
    assert database.make(query).lookup(key) == reply


def test_every_column_of_every_row_is_a_value(database: Database) -> None:
    table = database.make("SELECT address, goto FROM alias WHERE address = '%s'")
    assert table.lookup("many") == Reply.ok("many,a,many,b")


def test_a_value_that_is_null_is_not_found_with_a_warning(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    database.make().lookup("null")
    assert "'null' has an empty value" in caplog.text


@pytest.mark.parametrize("key", INJECTIONS)
@pytest.mark.parametrize("query", [QUERY, "SELECT goto FROM alias WHERE address = '%u'"])
def test_a_key_cannot_change_the_statement(database: Database, query: str, key: str) -> None:
    table = database.make(query)
    assert table.lookup(key) == Reply.not_found()
    assert table.lookup("secret") == Reply.ok("secret")


def test_a_catch_all_works(database: Database) -> None:
    assert database.make(search="address").lookup("anybody@example.org") == Reply.ok("catch-all")


def test_a_query_that_is_wrong_is_told_by_check_and_at_the_start(database: Database) -> None:
    query = "SELECT missing FROM alias WHERE address = '%s'"
    with pytest.raises(SettingError, match=rf"maps\.m\.query: .*{database.no_column}"):
        database.make(query).verify()
    with pytest.raises(SettingError, match=rf"maps\.m\.query: .*{database.no_column}"):
        database.make(query, connect="start")


def test_a_query_that_is_right_is_not_run_before_a_lookup(database: Database) -> None:
    database.make(database.sleeping, timeout=5).verify()


def test_a_wrong_statement_is_a_temporary_failure_that_tells_the_client_nothing(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    table = database.make("SELECT missing FROM alias WHERE address = '%s'")
    assert table.lookup("key") == Reply.temp_fail("map m: the query failed")
    assert database.no_column in caplog.text


def test_a_connection_that_was_cut_is_replaced_within_the_lookup(database: Database) -> None:
    table = database.make()
    table.lookup("secret")
    database.server.terminate_clients()
    assert table.lookup("secret") == Reply.ok("secret")
