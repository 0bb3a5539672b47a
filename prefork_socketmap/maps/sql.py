"""Query templates of SQL maps: parts of the key become bound parameters, never text of the statement.

What is shared by all SQL types and knows no driver. Postfix's own tables paste the quoted key into the statement, so
their queries have quotes around it, ``'%s'``; they are accepted and dropped, together with what else stands between
them: ``LIKE '%u@%%'`` binds one parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from prefork_socketmap import settings
from prefork_socketmap.maps.template import Address, Template
from prefork_socketmap.socketmap.messages import to_text

# A string literal ('' is a quote within it), a quoted identifier, a part, or an escaped percent sign.
_TOKEN = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|%.?""", re.DOTALL)


class Query(Template):
    """A statement with parts of the key: ``statement(placeholder)`` and, for each key, its ``parameters``."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._texts = [""]
        self._parameters: list[Template] = []
        end = 0
        for match in _TOKEN.finditer(text):
            self._texts[-1] += text[end : match.start()]
            end = match.end()
            self._add(match[0])
        self._texts[-1] += text[end:]

    def _add(self, token: str) -> None:
        content = Template(token[1:-1].replace("''", "'") if token.startswith("'") else token)
        if not content.letters:
            self._texts[-1] += Template(token).expand(Address.split(""))
        elif token.startswith('"'):
            raise ValueError(f"{token}: SQL has names in double quotes, and a key is not a name; use single quotes")
        else:
            self._parameters.append(content)
            self._texts.append("")

    def statement(self, placeholder: str) -> str:
        """Return the statement with *placeholder* where a parameter belongs.

        A driver that has percent signs in its placeholders gets those of the statement doubled.
        """
        texts = (text.replace("%", "%%") if "%" in placeholder else text for text in self._texts)
        return placeholder.join(texts)

    def parameters(self, key: str) -> list[str]:
        """Return the parameters for *key*, which has the parts that the query needs."""
        address = Address.split(key)
        return [parameter.expand(address) for parameter in self._parameters]


def query(key: str, value: object) -> Query:
    """Read a setting: an SQL query template."""
    text = settings.text(key, value)
    try:
        return Query(text)
    except ValueError as error:
        raise settings.SettingError(key, str(error)) from error


def values(rows: Iterable[Sequence[object]]) -> list[str]:
    """Return every column of every row as text; NULL is an empty text."""
    return [_value(column) for row in rows for column in row]


def _value(column: object) -> str:
    if column is None:
        return ""
    return to_text(column) if isinstance(column, bytes) else str(column)
