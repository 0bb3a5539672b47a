"""The type ``sqlite``."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from prefork_socketmap.maps.base import UncheckedError
from prefork_socketmap.maps.sqlite import SqliteMap
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status

QUERY = "SELECT value FROM t WHERE key = '%s'"
Make = Callable[..., SqliteMap]


def write(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(script)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a maker of open maps on one database."""
    write(
        tmp_path / "a?b#c%20.sqlite",
        """
        CREATE TABLE t (key TEXT, value);
        INSERT INTO t VALUES ('user@example.com', 'box'), ('many', 'a'), ('many', 'b'), ('null', NULL), ('empty', ''),
            ('number', 7), ('it''s', 'quoted'), ('secret', 'secret'), ('bytes', CAST(x'ff41' AS TEXT));
        """,
    )

    def make(query: str = QUERY, **table: object) -> SqliteMap:
        found = SqliteMap("m", {"dbpath": "a?b#c%20.sqlite", "query": query, **table}, tmp_path)
        found.open()
        return found

    return make


@pytest.mark.parametrize(
    ("key", "reply"),
    [
        ("user@example.com", Reply.ok("box")),
        ("USER@Example.com", Reply.ok("box")),
        ("many", Reply.ok("a,b")),
        ("number", Reply.ok("7")),
        ("it's", Reply.ok("quoted")),
        ("null", Reply.not_found()),
        ("empty", Reply.not_found()),
        ("missing", Reply.not_found()),
        ("bytes", Reply.ok("\udcffA")),
    ],
)
@pytest.mark.parametrize("query", [QUERY, "SELECT value FROM t WHERE key = %s"])
def test_the_query_answers(make: Make, query: str, key: str, reply: Reply) -> None:
    assert make(query).lookup(key) == reply


@pytest.mark.parametrize(
    "query",
    [
        "SELECT value FROM t -- the user's\n WHERE key = '%s'",
        "SELECT value FROM t /* the user's */ WHERE key = '%s'",
        """SELECT value AS "user's" FROM t WHERE key = '%s'""",
        "SELECT value AS `user's` FROM t WHERE key = '%s'",
        "SELECT value AS [user's] FROM t WHERE key = '%s'",
        "SELECT value FROM t WHERE value <> '\\' AND key = '%s'",
        "SELECT value FROM t WHERE key || ' it''s' = '%s it''s'",
    ],
)
def test_a_query_is_understood_as_the_database_does(make: Make, query: str) -> None:
    table = make(query)
    assert table.lookup("secret") == Reply.ok("secret")
    assert table.lookup("it's") == Reply.ok("quoted")
    assert table.lookup("' UNION SELECT 'secret' --") == Reply.not_found()


@pytest.mark.parametrize(
    "key",
    ["x' OR '1'='1", "x'; DROP TABLE t; --", "x\\' OR 1=1 --", "' UNION SELECT 'secret' --", "%' OR key LIKE '%"],
)
@pytest.mark.parametrize(
    "query", [QUERY, "SELECT value FROM t WHERE key = '%u'", "SELECT value FROM t WHERE key = %s"]
)
def test_a_key_cannot_change_the_statement(make: Make, query: str, key: str) -> None:
    table = make(query)
    assert table.lookup(key) == Reply.not_found()
    assert table.lookup("secret") == Reply.ok("secret")


def test_the_first_column_is_the_value(make: Make) -> None:
    assert make("SELECT value, key FROM t WHERE key = '%s'").lookup("many") == Reply.ok("a,b")


def test_a_query_that_needs_the_domain_is_not_run_without_one(make: Make) -> None:
    table = make("SELECT value FROM t WHERE key = 'user@%d'")
    assert table.lookup("any@example.com") == Reply.ok("box")
    assert table.lookup("example.com") == Reply.not_found()


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("SELECT missing FROM t WHERE key = '%s'", "no such column: missing"),
        ("SELECT value FROM missing WHERE key = '%s'", "no such table: missing"),
        ("SELECT value FROM t WHERE key = '%s' AND", "incomplete input"),
        ("SELECT value FROM t; SELECT value FROM t WHERE key = '%s'", "one statement at a time"),
        # Legal in Postfix's own table, which pastes the key.
        ("SELECT value FROM '%s'", 'near "[?]": syntax error'),
    ],
)
def test_a_wrong_query_is_an_error_in_the_words_of_the_database(make: Make, query: str, error: str) -> None:
    with pytest.raises(SettingError, match=rf"maps\.m\.query: .*{error}"):
        make(query)


def test_a_query_that_has_become_wrong_is_a_temporary_failure_that_tells_the_client_nothing(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = make()
    write(tmp_path / "a?b#c%20.sqlite", "ALTER TABLE t RENAME TO other")
    assert table.lookup("key") == Reply.temp_fail("map m: the query failed")
    assert "no such table: t" in caplog.text
    write(tmp_path / "a?b#c%20.sqlite", "ALTER TABLE other RENAME TO t")
    assert table.lookup("secret") == Reply.ok("secret")


def test_the_query_is_not_run_before_a_lookup(make: Make) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT 1 FROM n) SELECT i FROM n WHERE i = '%s'"
    make(endless)


def test_a_locked_database_is_opened_and_waited_for_and_then_a_temporary_failure(make: Make, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "a?b#c%20.sqlite", isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        table = make(timeout=0.3)
        with pytest.raises(UncheckedError, match=r"maps\.m\.query: cannot be checked: database is locked"):
            table.verify()
        assert table.lookup("secret").status is Status.TEMP
        writer.execute("ROLLBACK")
    assert table.lookup("secret") == Reply.ok("secret")


def test_the_database_cannot_be_written(make: Make) -> None:
    assert make("DELETE FROM t WHERE key = '%s'").lookup("secret").status is Status.TEMP
    assert make().lookup("secret") == Reply.ok("secret")


def test_a_change_is_seen_by_the_next_lookup(make: Make, tmp_path: Path) -> None:
    table = make()
    table.lookup("new")
    write(tmp_path / "a?b#c%20.sqlite", "INSERT INTO t VALUES ('new', 'x')")
    assert table.lookup("new") == Reply.ok("x")


def test_a_database_that_was_replaced_is_opened_anew(make: Make, tmp_path: Path) -> None:
    table = make()
    write(tmp_path / "new", "CREATE TABLE t (key TEXT, value); INSERT INTO t VALUES ('key', 'new')")
    (tmp_path / "new").replace(tmp_path / "a?b#c%20.sqlite")
    assert table.lookup("key") == Reply.ok("new")


def test_a_database_that_was_removed_still_answers(make: Make, tmp_path: Path) -> None:
    table = make()
    (tmp_path / "a?b#c%20.sqlite").unlink()
    assert table.lookup("user@example.com") == Reply.ok("box")


def test_a_database_that_is_not_there_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"maps\.m\.dbpath: cannot open .*none\.sqlite"):
        SqliteMap("m", {"dbpath": "none.sqlite", "query": QUERY}, tmp_path).open()
    assert not (tmp_path / "none.sqlite").exists()
