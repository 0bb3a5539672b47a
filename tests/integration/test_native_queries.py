"""Queries made of all that SQL has, and hostile keys: answered as Postfix's own tables answer, or refused.

The tables of ``test_native_databases`` show what a query finds; here it is where a query has its literals. Queries
that may be wrong are compared with the text that Postfix would send, for a key in which nothing needs quoting.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefork_socketmap.maps import registry, sql
from prefork_socketmap.maps.base import Map
from prefork_socketmap.maps.template import Address, Template
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.integration.postfix import Postfix
from tests.integration.servers import mariadb as mariadb_server
from tests.integration.servers import postgresql as postgresql_server
from tests.integration.servers.mariadb import Mariadb
from tests.integration.servers.postgresql import Postgresql
from tests.integration.servers.process import library, program, unavailable

KEYS = [
    "user@example.com",
    "name",
    "it's@example.com",
    "''@example.com",
    '"quoted user"@example.com',
    "back\\slash@example.com",
    "back\\\\'slash@example.com",
    "\\",
    "\\'@example.com",
    "'",
    "x' OR '1'='1",
    "'/**/union/**/select/**/'x'#@example.com",
    "x') UNION SELECT 'x' -- @example.com",
    "$$ || 'x' || $$@example.com",
    "$1 ? :a @x",
    '`"[]@example.com',
    "%s%%@example.com",
    "\\n\\x41\\u0041@example.com",
    "_%",
    "a b",
]
LOGIN: dict[str, object] = {"user": "postfix", "dbname": "mail"}
EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
MORE_EXAMPLES = settings(EXAMPLES, max_examples=200)


class Literal(NamedTuple):
    """A literal, and the characters that make Postfix paste a key wrongly into one of its form."""

    text: str
    unsafe: str = ""


class Language(NamedTuple):
    """What queries are made of."""

    literal: st.SearchStrategy[Literal]
    plain: st.SearchStrategy[str]
    """A literal without a part of the key."""
    name: st.SearchStrategy[str]
    space: st.SearchStrategy[str]
    functions: Sequence[str]
    """Each of two values that are not NULL, and not NULL itself."""
    end: st.SearchStrategy[str]


COMMON = [*'abz0 -/*#?;:@[]{}(),."`', "--", "/*", "*/", "%%", "$1", ":a", "ü"]
PARTS = ["%s", "%u", "%d", "%1", "%S"]


def quoted(opening: str, closing: str, atoms: Sequence[str], unsafe: str = "") -> st.SearchStrategy[Literal]:
    # A value of blanks is not found here.
    text = st.lists(st.sampled_from([*atoms, *PARTS]), max_size=6).map("".join)
    return text.map(lambda content: Literal(f"{opening}{content}a{closing}", unsafe))


def plain(opening: str, closing: str, atoms: Sequence[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(atoms), max_size=6).map(lambda content: opening + "".join(content) + closing)


def spaces(*comments: str) -> st.SearchStrategy[str]:
    return st.sampled_from([" ", *(f" {comment} " for comment in comments)])


NO_ESCAPES = [*COMMON, "''", "\\", "\\\\"]
SQLITE = Language(
    quoted("'", "'", NO_ESCAPES),
    plain("'", "'", NO_ESCAPES),
    st.sampled_from(['"it\'s"', '"""\'"', "`it's`", "[it's]", "n"]),
    spaces("/* it's */", '/*/ " */', "/**/"),
    ["{0} || {1}", "coalesce({0}, {1})", "CASE WHEN {0} LIKE {1} THEN {0} ELSE {1} END", "replace({0}, 'x', {1})"],
    st.sampled_from(["", " -- it's %u"]),
)
ESCAPES = [*COMMON, "''", r"\'", r"\\", r"\n", r"\t"]
DOLLARS = [*(atom for atom in COMMON if "$" not in atom), "'", "''", "\\"]
POSTGRESQL = Language(
    st.one_of(
        quoted("'", "'", NO_ESCAPES),
        quoted("text '", "'", NO_ESCAPES),
        quoted("CAST('", "' AS varchar)", NO_ESCAPES),
        quoted("('", "'::text)", NO_ESCAPES),
        quoted("E'", "'", ESCAPES, unsafe="\\"),
        quoted("$$", "$$", DOLLARS, unsafe="'$"),
        quoted("$a$", "$a$", DOLLARS, unsafe="'$"),
    ),
    st.one_of(
        plain("'", "'", NO_ESCAPES),
        plain("e'", "'", [*ESCAPES, r"\x41", r"\u0041", r"\101"]),
        plain("$$", "$$", DOLLARS),
        plain("U&'", "'", ["a", "''", r"\0041"]),
    ),
    st.sampled_from(['"it\'s"', '"""\'"', "a$$", "n"]),
    spaces("/* it's */", "/* /* \" */ ' */", "/*/**/*/"),
    [
        "{0} || {1}",
        "coalesce({0}, {1})",
        "concat({0}, {1})",
        "json_build_object('k', {0}, 'l', {1})::text",
        "(ARRAY[{0}, {1}])[1]",
        "CASE WHEN {0} = {1} THEN {0} ELSE {1} END",
        "CASE {0} WHEN {1} THEN {1} ELSE {0} END",
    ],
    st.sampled_from(["", " -- it's %u", ";"]),
)
DOUBLE = [*(atom for atom in COMMON if atom != '"'), '""', "''", r"\"", r"\'", r"\\", r"\%%", r"\_", r"\x"]
SINGLE = [*ESCAPES, r"\%%", r"\_", r"\x", r"\""]
MYSQL = Language(
    st.one_of(quoted("'", "'", SINGLE), quoted('"', '"', DOUBLE)),
    st.one_of(plain("'", "'", SINGLE), plain('"', '"', DOUBLE), st.just("X'41'"), st.just("_utf8mb4'it''s'")),
    st.sampled_from(["`it's`", '```"`', "n"]),
    spaces("/* it's */", '/*/ " */', "/**/", "/*! */", "/*!999999 not here */"),
    [
        "CONCAT({0}, {1})",
        "COALESCE({0}, {1})",
        "IF({0} LIKE {1}, {0}, {1})",
        "IF({0} = {1}, {0}, {1})",
        "JSON_QUOTE(CONCAT({0}, {1}))",
        "TRIM(LEADING {0} FROM {1})",
    ],
    st.sampled_from(["", " -- it's %u", " # it's %s", ";"]),
)


class Query(NamedTuple):
    text: str
    unsafe: str
    """Characters of which a key has none if Postfix shall look it up correctly."""


@st.composite
def queries(draw: st.DrawFn, language: Language) -> Query:
    """Return a query that the database understands."""
    literals = draw(st.lists(language.literal, min_size=4, max_size=4))
    first, second, third, fourth = (literal.text for literal in literals)
    value = draw(st.sampled_from(language.functions)).format(first, second)
    other = draw(st.sampled_from(language.functions)).format(third, fourth)
    spaces = itertools.cycle([draw(language.space), draw(language.space)])
    constant = draw(language.plain)
    words = [
        "SELECT",
        value,
        f"FROM (SELECT 1 AS {draw(language.name)}) AS t",
        f"WHERE {constant} = {constant} AND {other} IS NOT NULL",
    ]
    text = "".join(f"{word}{next(spaces)}" for word in words).rstrip()
    return Query(text + draw(language.end), "".join(literal.unsafe for literal in literals))


class Database(NamedTuple):
    """A database, as Postfix, this server and its driver see it."""

    native: str
    kind: str
    native_settings: dict[str, object]
    settings: dict[str, object]
    run: Callable[[str], list[str]]
    """Runs a statement as it is; returns the values of its rows."""


@contextmanager
def opened(database: Database, query: str) -> Iterator[Map]:
    """Open a map, and check it as the command ``check`` does."""
    table = registry.build({"m": {"type": database.kind, "query": query, **database.settings}}, Path("/"))["m"]
    table.open()
    try:
        table.verify()
        yield table
    finally:
        table.close()


def answer_alike(postfix: Postfix, database: Database, query: Query, directory: Path) -> None:
    """Assert that Postfix and this server answer alike, or that this server refuses the query."""
    path = directory / "cf"
    lines = {**database.native_settings, "query": query.text}
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    os.utime(path, (0, 0))  # Postfix waits for seconds if a file seems to be still in the making
    keys = [key for key in KEYS if not set(query.unsafe) & set(key)]
    done = postfix.postmap("-q", "-", f"{database.native}:{path}", stdin="".join(f"{key}\n" for key in keys).encode())
    assert b"fatal" not in done.stderr, done.stderr.decode()
    with opened(database, query.text) as table:
        replies = {key: table.lookup(key) for key in KEYS}
    assert {reply.status for reply in replies.values()} <= {Status.OK, Status.NOT_FOUND}
    ours = [f"{key}\t{replies[key].text}\n" for key in keys if replies[key].status is Status.OK]
    assert "".join(ours) == done.stdout.decode()


# ---- The databases ----


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Database:
    path = tmp_path / "database"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE alias (address TEXT, goto TEXT)")

    def run(statement: str) -> list[str]:
        with closing(sqlite3.connect(path)) as connection:
            return sql.values(row[:1] for row in connection.execute(statement))

    place: dict[str, object] = {"dbpath": str(path)}
    return Database("sqlite", "sqlite", place, place, run)


@pytest.fixture
def postgresql_database(postgresql: Postgresql) -> Iterator[Database]:
    psycopg = library("psycopg", "postgresql")
    login = {**LOGIN, "hosts": [f"127.0.0.1:{postgresql.port}"], "password": postgresql_server.PASSWORD}
    with psycopg.connect(
        host=str(postgresql.directory), port=postgresql.port, user="postgres", dbname="mail", autocommit=True
    ) as connection:

        def run(statement: str) -> list[str]:
            # Below psycopg's own types: the texts that the server sends.
            result = connection.pgconn.exec_(statement.encode())
            assert result.status == psycopg.pq.ExecStatus.TUPLES_OK, result.error_message
            rows, columns = range(result.ntuples), range(result.nfields)
            return sql.values([[result.get_value(row, column) for column in columns] for row in rows])

        yield Database(
            "pgsql",
            "postgresql",
            {**login, "hosts": f"127.0.0.1:{postgresql.port}"},
            login,
            run,
        )


@pytest.fixture
def mysql_database(mariadb: Mariadb) -> Iterator[Database]:
    pymysql = library("pymysql", "mysql")
    login = {**LOGIN, "hosts": [f"unix:{mariadb.socket}"], "password": mariadb_server.PASSWORD}
    # Without "conv", values would not be the texts that the server sends.
    encoders = pymysql.converters.encoders
    with pymysql.connect(unix_socket=str(mariadb.socket), user="root", database="mail", conv=encoders) as connection:

        def run(statement: str) -> list[str]:
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return sql.values(cursor.fetchall())

        yield Database("mysql", "mysql", {**login, "hosts": f"unix:{mariadb.socket}"}, login, run)


@pytest.fixture
def postfix(unstarted_postfix: Postfix) -> Postfix:
    known = subprocess.check_output([program("postconf", "postfix"), "-m"], text=True).split()
    for kind in ("sqlite", "pgsql", "mysql"):
        if kind not in known:
            unavailable(f"Postfix has no {kind} tables: apt install postfix-{kind}")
    return unstarted_postfix


# ---- Queries that are right ----


@EXAMPLES
@given(query=queries(SQLITE))
def test_sqlite_answers_every_query_as_postfix_does(
    postfix: Postfix, sqlite_database: Database, tmp_path: Path, query: Query
) -> None:
    answer_alike(postfix, sqlite_database, query, tmp_path)


@EXAMPLES
@given(query=queries(POSTGRESQL))
def test_postgresql_answers_every_query_as_postfix_does(
    postfix: Postfix, postgresql_database: Database, tmp_path: Path, query: Query
) -> None:
    answer_alike(postfix, postgresql_database, query, tmp_path)


@EXAMPLES
@given(query=queries(MYSQL))
def test_mysql_answers_every_query_as_postfix_does(
    postfix: Postfix, mysql_database: Database, tmp_path: Path, query: Query
) -> None:
    answer_alike(postfix, mysql_database, query, tmp_path)


# ---- Queries that may be wrong ----

FRAGMENTS = [
    *"'\"`\\$#=,()+;[]",
    *(
        "''",
        "--",
        "-- ",
        "\n",
        "/*",
        "*/",
        "/*!",
        "$$",
        "$a$",
        "E'",
        "N'",
        "x'",
        "U&'",
        "@",
        "a",
        "1",
        " ",
        "text ",
        "?",
    ),
    *("%s", "'%s'", "\\%s", "||"),
]
HARMLESS = "abc@d.e"


@st.composite
def damaged(draw: st.DrawFn, language: Language) -> str:
    """Return a query into which something has got that does not belong there."""
    text = draw(queries(language)).text
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(len("SELECT "), len(text)))
        text = text[:place] + draw(st.sampled_from(FRAGMENTS)) + text[place + draw(st.integers(0, 1)) :]
    return text


def never_answer_otherwise(database: Database, text: str) -> None:
    """Assert that *text* is refused, or fails, or answers as the text does that Postfix would make of it."""
    try:
        with opened(database, text) as table:
            reply = table.lookup(HARMLESS)
    except SettingError:
        return
    if reply.status is Status.TEMP:
        return
    try:
        values = database.run(Template(text).expand(Address.split(HARMLESS)))
    except Exception:  # noqa: BLE001 - whatever the driver raises
        # A part of the key without quotes is a parameter here, and nonsense there.
        return
    kept = [value for value in values if value and not value.isspace()]
    assert reply == (Reply.ok(",".join(kept)) if kept else Reply.not_found())


@MORE_EXAMPLES
@given(text=damaged(SQLITE))
def test_sqlite_never_takes_a_query_for_another_one(sqlite_database: Database, text: str) -> None:
    never_answer_otherwise(sqlite_database, text)


@MORE_EXAMPLES
@given(text=damaged(POSTGRESQL))
def test_postgresql_never_takes_a_query_for_another_one(postgresql_database: Database, text: str) -> None:
    never_answer_otherwise(postgresql_database, text)


@MORE_EXAMPLES
@given(text=damaged(MYSQL))
def test_mysql_never_takes_a_query_for_another_one(mysql_database: Database, text: str) -> None:
    never_answer_otherwise(mysql_database, text)
