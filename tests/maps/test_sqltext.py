"""Queries are taken apart as the databases do it. That they are is shown by ``integration/test_native_queries``."""

from __future__ import annotations

import re

import pytest

from prefork_socketmap.maps.sqltext import (
    MYSQL,
    POSTGRESQL,
    POSTGRESQL_WITH_BACKSLASHES,
    SQLITE,
    Dialect,
    bind,
)
from prefork_socketmap.maps.template import Template

MARIADB = MYSQL[False, True]
ANSI_QUOTES = MYSQL[True, True]
NO_BACKSLASHES = MYSQL[False, False]
KEY = "user@sub.example.com"
DIALECTS = {
    "sqlite": SQLITE,
    "postgresql": POSTGRESQL,
    "mysql": MARIADB,
    "mysql-ansi-quotes": ANSI_QUOTES,
    "mysql-no-backslashes": NO_BACKSLASHES,
}
every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


def bound(text: str, dialect: Dialect) -> tuple[str, list[str]]:
    """Return the statement, each placeholder as "?" and without blanks, and what is bound for KEY."""
    statement = bind(Template(text), dialect)
    return _without_blanks(re.sub(r"\$\d(?!\d)", "?", statement.text)), statement.values(KEY)


def _without_blanks(text: str) -> str:
    return "".join(text.split())


@every_dialect
@pytest.mark.parametrize(
    ("text", "statement", "values"),
    [
        ("SELECT a FROM t WHERE k='%s'", "SELECT a FROM t WHERE k=?", [KEY]),
        ("SELECT a FROM t WHERE k=%s", "SELECT a FROM t WHERE k=?", [KEY]),
        ("WHERE f('%u','%d')", "WHERE f(?,?)", ["user", "sub.example.com"]),
        # What stands in the same quotes is in the same parameter.
        ("k='%u@%2.%1'", "k=?", ["user@example.com"]),
        ("k='it''s %u'''", "k=?", ["it's user'"]),
        ("k='%%@%d'", "k=?", ["%@sub.example.com"]),
        # A literal without parts stays.
        ("='x' OR k='%U'", "='x' OR k=?", ["user"]),
        ("LIKE 'a%%' AND k='%u'", "LIKE 'a%' AND k=?", ["user"]),
        ("'it''s -- ? $10 /*'||'%u'", "'it''s -- ? $10 /*'||?", ["user"]),
        ('SELECT "a"', 'SELECT "a"', []),
        ("a %% 2 = 0", "a % 2 = 0", []),
        # Comments hide quotes, and parts in comments vanish.
        ("/* it's */'%u'-- it's", "/* it's */?-- it's", ["user"]),
        ("/* %d */='%u'-- %s", "=?", ["user"]),
    ],
)
def test_what_all_dialects_have(dialect: Dialect, text: str, statement: str, values: list[str]) -> None:
    assert bound(text, dialect) == (_without_blanks(statement), values)


@pytest.mark.parametrize("dialect", [SQLITE, MARIADB, POSTGRESQL])
def test_a_parameter_is_a_word_of_its_own(dialect: Dialect) -> None:
    statement = bind(Template("f('%s')||b LIKE'%s'ESCAPE'x'||'%s'"), dialect).text
    assert re.sub(r"\$\d", "?", statement) == "f(?)||b LIKE ? ESCAPE'x'|| ?"


@pytest.mark.parametrize(
    ("dialect", "text", "statement", "values"),
    [
        (SQLITE, """[it's] `it's` "it's" '%u'""", """[it's] `it's` "it's"?""", ["user"]),
        (SQLITE, r"'\%u\'", "?", ["\\user\\"]),
        (SQLITE, "x'41'||'%u'", "x'41'||?", ["user"]),
        (MARIADB, "# it's\n='%u'", "# it's =?", ["user"]),
        (MARIADB, "a--'%u'", "a--?", ["user"]),
        (MARIADB, "a--\t'\n='%u'", "a-- ' =?", ["user"]),
        (MARIADB, r"'\''='%u'", r"'\''=?", ["user"]),
        (MARIADB, """'\\\\'="it's %u "" ''\"""", """'\\\\'=?""", ["it's user \" ''"]),
        (MARIADB, r"='it\'s \\%u'", "=?", [r"it's \user"]),
        (MARIADB, r"='\n\%%\_\a%u'", "=?", ["\n\\%\\_auser"]),
        (MARIADB, "`it's`='%u'", "`it's`=?", ["user"]),
        (MARIADB, "@'it''s'='%u'", "@'it''s'=?", ["user"]),
        (MARIADB, "values_ = t.values = '%u'", "values_=t.values=?", ["user"]),
        (MARIADB, "/*! STRAIGHT_JOIN */='%u'", "/*! STRAIGHT_JOIN */=?", ["user"]),
        (ANSI_QUOTES, "\"it's\"='%u'", '"it\'s"=?', ["user"]),
        (NO_BACKSLASHES, r"'\'='\%u'", r"'\'=?", [r"\user"]),
        (POSTGRESQL, "text '%u'", "CAST(?AS text)", ["user"]),
        (POSTGRESQL, "SELECT Name '%u'", "SELECT CAST(?AS Name)", ["user"]),
        (POSTGRESQL, "pg_catalog.text '%u'", "pg_catalog.text ?", ["user"]),
        (POSTGRESQL, r"=E'it\'s \\%u\n'", "=?", ["it's \\user\n"]),
        (POSTGRESQL, "$$it's %u$$||$a$ $$ ' %d$a$", "?||?", ["it's user", " $$ ' sub.example.com"]),
        (POSTGRESQL, "$$ ' $$||'%u'", "$$ ' $$||?", ["user"]),
        (POSTGRESQL, "a$$='%u'", "a$$=?", ["user"]),
        (POSTGRESQL, "/* /* ' */ ' */='%u'", "/* /* ' */ ' */=?", ["user"]),
        (POSTGRESQL, r"'%u\'", "?", ["user\\"]),
        (POSTGRESQL, "'%u'::int", "?::int", ["user"]),
        (POSTGRESQL_WITH_BACKSLASHES, r"'it\'s %u'", "?", ["it's user"]),
    ],
)
def test_what_one_dialect_has(dialect: Dialect, text: str, statement: str, values: list[str]) -> None:
    assert bound(text, dialect) == (_without_blanks(statement), values)


@every_dialect
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("SELECT 'a' '%s'", "next to another literal"),
        ("SELECT '%s' /* x */ 'a'", "next to another literal"),
        ("SELECT t%s", "does not stand by itself"),
        ("SELECT 1%1", "does not stand by itself"),
        ("SELECT %u%d", "does not stand by itself"),
        ("SELECT t.%s", "does not stand by itself"),
        ("SELECT '%s", "without an end"),
        ("SELECT '%s' /* x", "without an end"),
        ("SELECT '%s' FROM \"", "without an end"),
        ("SELECT '\0'", "a NUL"),
    ],
)
def test_what_no_dialect_binds_is_an_error(dialect: Dialect, text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        bind(Template(text), dialect)


@pytest.mark.parametrize(
    ("dialect", "text", "problem"),
    [
        (SQLITE, '"%s"', "a quoted name"),
        (SQLITE, "[%s]", "a quoted name"),
        (SQLITE, "`%s`", "a quoted name"),
        (SQLITE, "x'%s'", "a literal of this form"),
        (SQLITE, "?='%s'", "a parameter of its own"),
        (SQLITE, ":a='%s'", "a parameter of its own"),
        (MARIADB, "`%s`", "a quoted name"),
        (MARIADB, "@'%s'", "a quoted name"),
        (MARIADB, r"'\%s'", "a backslash cannot quote"),
        (MARIADB, "?='%s'", "a parameter of its own"),
        (MARIADB, "/*! '%s' */", "a conditional comment"),
        (MARIADB, "/*!50000 '*/' */ '%s'", "a conditional comment"),
        (MARIADB, "/*M! %s */", "a conditional comment"),
        (MARIADB, "Values ('%s')", "a list of rows"),
        (ANSI_QUOTES, '"%s"', "a quoted name"),
        (POSTGRESQL, '"%s"', "a quoted name"),
        (POSTGRESQL, "U&'%s'", "a literal of this form"),
        (POSTGRESQL, "B'%1'", "a literal of this form"),
        (POSTGRESQL, r"E'\%s'", "a backslash cannot quote"),
        (POSTGRESQL, r"E'\x41 %s'", r"\\x and a part of the key"),
        (POSTGRESQL, "$1='%s'", "a parameter of its own"),
        (POSTGRESQL, "$a$ %s", "without an end"),
        (POSTGRESQL, "/* /* */ '%s'", "without an end"),
    ],
)
def test_what_one_dialect_does_not_bind_is_an_error(dialect: Dialect, text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        bind(Template(text), dialect)


@every_dialect
def test_the_statement_is_the_same_for_every_key(dialect: Dialect) -> None:
    statement = bind(Template("SELECT a FROM t WHERE k = '%s'"), dialect)
    key = "x' OR '1'='1"
    assert statement.values(key) == [key]
    assert key not in statement.text
