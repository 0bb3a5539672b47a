"""What the SQL types have in common: a query of which the server makes a statement, once for each connection.

Knows no driver. Where the parts of the key stand in the query is the business of ``sqltext``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from prefork_socketmap import settings
from prefork_socketmap.maps.base import log
from prefork_socketmap.maps.network import NetworkMap, Trouble, UnreachableError
from prefork_socketmap.maps.setting import Setting, setting
from prefork_socketmap.maps.sqltext import Dialect, Statement, bind
from prefork_socketmap.maps.template import Template
from prefork_socketmap.socketmap.messages import to_text

C = TypeVar("C")


class QueryError(Exception):
    """The query cannot be used with the server; the text says why."""


def query(*dialects: Dialect) -> Setting[Template]:
    """Declare a key with a query, for a server that speaks one of *dialects*; the first is the common one."""
    return setting(_reader(dialects))


def _reader(dialects: Sequence[Dialect]) -> Callable[[str, object], Template]:
    def read(key: str, value: object) -> Template:
        text = settings.text(key, value)
        try:
            template = Template(text)
            problems = [problem for dialect in dialects if (problem := _problem(template, dialect))]
        except ValueError as error:
            raise settings.SettingError(key, str(error)) from error
        if len(problems) == len(dialects):
            raise settings.SettingError(key, problems[0])
        return template

    return read


def _problem(template: Template, dialect: Dialect) -> str | None:
    try:
        bind(template, dialect)
    except ValueError as error:
        return str(error)
    return None


def statement(template: Template, dialect: Dialect) -> Statement:
    """Return the statement that *template* is in *dialect*. Raises QueryError."""
    try:
        return bind(template, dialect)
    except ValueError as error:
        raise QueryError(str(error)) from error


class SqlServerMap(NetworkMap[C]):
    """A map whose query a server prepares. The type names QueryError among its ``errors``."""

    query: Setting[Template]
    """The statement; parts of the key are bound as its parameters."""

    _prepared: C | None = None
    """The connection on which the query is prepared."""
    _statement: Statement

    @abc.abstractmethod
    def prepare_query(self, connection: C) -> Statement:
        """Have the server prepare the query. Raises one of ``errors``, QueryError if it is never going to work."""

    @abc.abstractmethod
    def execute(self, connection: C, values: Sequence[str]) -> Sequence[str] | None:
        """Return what the prepared query finds; *values* are bound to it. Raises as ``ask`` does."""

    def words(self, error: Exception) -> str:
        """Return what the server said."""
        return str(error)

    def ask(self, connection: C, key: str) -> Sequence[str] | None:
        """Run the query for *key*; it is prepared first if *connection* is new."""
        if self._prepared is not connection:
            self._statement = self.prepare_query(connection)
            self._prepared = connection
        values = self._statement.values(key)
        log.debug("map %s: %s with %r", self.name, self._statement.text, values)
        return self.execute(connection, values)

    def examine(self, connection: C) -> None:
        """Prepare the query. Raises SettingError with the server's words when that fails."""
        try:
            self._statement = self.prepare_query(connection)
        except self.errors as error:
            if self.trouble(connection, error) is Trouble.REFUSED:
                raise settings.SettingError(f"maps.{self.name}.query", self.words(error)) from error
            raise UnreachableError(str(error)) from error
        self._prepared = connection


def values(rows: Iterable[Sequence[object]]) -> list[str]:
    """Return every column of every row as text; NULL is an empty text."""
    return [_value(column) for row in rows for column in row]


def _value(column: object) -> str:
    if column is None:
        return ""
    return to_text(column) if isinstance(column, bytes) else str(column)
