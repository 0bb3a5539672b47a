"""The setting ``query``, and what becomes of rows. What a query binds: ``test_sqltext``."""

from __future__ import annotations

import pytest

from prefork_socketmap.maps import sql
from prefork_socketmap.maps.setting import Setting
from prefork_socketmap.maps.sqltext import MYSQL, SQLITE
from prefork_socketmap.maps.template import Template
from prefork_socketmap.settings import SettingError

DOUBLE_QUOTES = 'SELECT a FROM t WHERE k = "%s"'


def read(setting: Setting[Template], text: str) -> Template:
    return setting.value("maps.a.", "query", {"query": text})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (DOUBLE_QUOTES, r'maps\.a\.query: "%s": .* single quotes'),
        ("SELECT '%x'", r"maps\.a\.query: '%x'"),
        ("SELECT '%s", r"maps\.a\.query: .* without an end"),
    ],
)
def test_a_query_that_cannot_be_bound_is_an_error_that_names_the_key(text: str, error: str) -> None:
    with pytest.raises(SettingError, match=error):
        read(sql.query(SQLITE), text)


def test_a_query_that_one_mode_of_the_server_understands_is_left_to_the_server() -> None:
    template = read(sql.query(*MYSQL.values()), DOUBLE_QUOTES)
    assert sql.statement(template, MYSQL[False, True]).parameters
    with pytest.raises(sql.QueryError, match="single quotes"):
        sql.statement(template, MYSQL[True, True])


def test_every_column_of_every_row_is_a_value() -> None:
    assert sql.values([("a", 1), (None, b"\xff")]) == ["a", "1", "", "\udcff"]
