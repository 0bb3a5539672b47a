"""SQL templates: every part of a key is a parameter."""

from __future__ import annotations

import pytest

from prefork_socketmap.maps import sql
from prefork_socketmap.settings import SettingError


@pytest.mark.parametrize(
    ("text", "statement", "parameters"),
    [
        ("SELECT a FROM t WHERE k = '%s'", "SELECT a FROM t WHERE k = ?", ["user@sub.example.com"]),
        ("SELECT a FROM t WHERE k = %s", "SELECT a FROM t WHERE k = ?", ["user@sub.example.com"]),
        ("WHERE u='%u' AND d='%d'", "WHERE u=? AND d=?", ["user", "sub.example.com"]),
        # What stands in the same quotes is in the same parameter.
        ("LIKE '%%@%d'", "LIKE ?", ["%@sub.example.com"]),
        ("= '%u@%2.%1'", "= ?", ["user@example.com"]),
        ("= 'it''s %u'", "= ?", ["it's user"]),
        # A literal without parts stays.
        ("= 'x' OR k = '%U'", "= 'x' OR k = ?", ["user"]),
        ("LIKE 'a%%' AND k = '%s'", "LIKE 'a%' AND k = ?", ["user@sub.example.com"]),
        ("'it''s' || '%u'", "'it''s' || ?", ["user"]),
        ('SELECT "a" FROM t', 'SELECT "a" FROM t', []),
        ("a %% 2 = 0", "a % 2 = 0", []),
    ],
)
def test_parts_become_parameters(text: str, statement: str, parameters: list[str]) -> None:
    query = sql.query("maps.a.query", text)
    assert query.statement("?") == statement
    assert query.parameters("user@sub.example.com") == parameters


def test_a_driver_that_escapes_percent_signs_gets_them_escaped() -> None:
    query = sql.query("maps.a.query", "SELECT a FROM t WHERE k LIKE 'a%%' AND k = '%s'")
    assert query.statement("%s") == "SELECT a FROM t WHERE k LIKE 'a%%' AND k = %s"


def test_the_statement_is_the_same_for_every_key() -> None:
    query = sql.query("maps.a.query", "SELECT a FROM t WHERE k = '%s'")
    key = "x' OR '1'='1"
    assert query.parameters(key) == [key]
    assert key not in query.statement("?")


def test_a_part_in_double_quotes_is_an_error() -> None:
    with pytest.raises(SettingError, match=r"maps\.a\.query.*single quotes"):
        sql.query("maps.a.query", 'SELECT a FROM t WHERE k = "%s"')


def test_a_wrong_letter_is_an_error() -> None:
    with pytest.raises(SettingError, match=r"maps\.a\.query: '%x'"):
        sql.query("maps.a.query", "SELECT '%x'")


def test_every_column_of_every_row_is_a_value() -> None:
    assert sql.values([("a", 1), (None, b"\xff")]) == ["a", "1", "", "\udcff"]
