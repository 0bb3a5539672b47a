"""Templates with the parts of a lookup key, as in Postfix's SQL and LDAP tables.

mysql_table(5), pgsql_table(5), sqlite_table(5), "query" and "result_format". The rules that the manuals leave open
(which lookups are suppressed, which results dropped) are those of Postfix's source, global/db_common.c:

- an address is split at its last ``@``; what has none is all local part and no domain;
- ``%u`` needs a local part that is not empty, ``%d`` and ``%1``..``%9`` a domain that is not empty, ``%N`` a domain
  of at least N labels, where a run of dots counts as one;
- in a result format the lower case letters speak of the result, capitals and digits of the key.

How a part is quoted is not decided here: the caller passes a function, or binds (``sqltext``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from prefork_socketmap import settings

T = TypeVar("T", bound="Template")

_PART = re.compile(r"%(.?)", re.DOTALL)
_LETTERS = "sudSUD123456789"
_ACCEPTED = "%s %u %d %S %U %D %1..%9, or %% for a percent sign"


def _plain(text: str) -> str:
    return text


class Address(NamedTuple):
    """A key or a result, split as the templates see it."""

    whole: str
    local: str
    domain: str | None
    """None when there is no ``@``."""

    @classmethod
    def split(cls, text: str) -> Address:
        """Split *text* at its last ``@``."""
        local, at, domain = text.rpartition("@")
        return cls(text, local, domain) if at else cls(text, text, None)

    @property
    def labels(self) -> list[str]:
        """The labels of the domain; runs of dots separate like one dot."""
        return [label for label in (self.domain or "").split(".") if label]

    def has(self, letters: Iterable[str]) -> bool:
        """Whether every part is there that *letters*, in lower case or digits, stand for."""
        return all(self._has(letter) for letter in letters)

    def _has(self, letter: str) -> bool:
        if letter == "s":
            return bool(self.whole)
        if letter == "u":
            return bool(self.local)
        if letter == "d":
            return bool(self.domain)
        return len(self.labels) >= int(letter)

    def part(self, letter: str) -> str:
        """Return the part for *letter*, in lower case or a digit; the caller has made sure that it is there."""
        if letter == "s":
            return self.whole
        if letter == "u":
            return self.local
        if letter == "d":
            return self.domain or ""
        return self.labels[-int(letter)]


class Template:
    """A text with parts, ready to expand.

    ``letters`` are those it uses. Construction raises ValueError for a percent sign with any other letter.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.pieces = [""]
        """Texts at even, letters at odd indexes."""
        end = 0
        for match in _PART.finditer(text):
            self.pieces[-1] += text[end : match.start()]
            end = match.end()
            if match[1] == "%":
                self.pieces[-1] += "%"
            elif match[1] and match[1] in _LETTERS:
                self.pieces += [match[1], ""]
            else:
                raise ValueError(f"{match[0]!r} is no part of a key; accepted are {_ACCEPTED}")
        self.pieces[-1] += text[end:]
        self.letters = frozenset(self.pieces[1::2])

    def __repr__(self) -> str:
        return f"Template({self.text!r})"

    def expand(self, key: Address, quote: Callable[[str], str] = _plain) -> str:
        """Return the text with the parts of *key* in it, each passed through *quote*.

        In a query, capitals mean the same as lower case.
        """
        return self._expand(lambda letter: quote(key.part(letter.lower())))

    def expand_result(self, value: Address, key: Address) -> str:
        """Return the text as a result format: lower case stands for *value*, capitals and digits for *key*."""
        return self._expand(lambda letter: (value if letter.islower() else key).part(letter.lower()))

    def _expand(self, part: Callable[[str], str]) -> str:
        pieces = self.pieces.copy()
        pieces[1::2] = map(part, pieces[1::2])
        return "".join(pieces)

    @property
    def needs_of_key(self) -> frozenset[str]:
        """The parts, in lower case or digits, that a key must have for this template as a query."""
        return frozenset(letter.lower() for letter in self.letters)


class ResultFormat(Template):
    """A template for results; ``%s`` alone is the result as it is."""

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every result as it is."""
        return self.text == "%s"

    @property
    def needs_of_key(self) -> frozenset[str]:
        """The parts that a key must have: those named by capitals and digits."""
        return frozenset(letter.lower() for letter in self.letters if not letter.islower())

    @property
    def needs_of_value(self) -> frozenset[str]:
        """The parts that a result must have; one that lacks any is dropped."""
        return frozenset(letter for letter in self.letters if letter.islower())


def template(key: str, value: object) -> Template:
    """Read a setting: a query template."""
    return _read(key, value, Template)


def result_format(key: str, value: object) -> ResultFormat:
    """Read a setting: a result template."""
    return _read(key, value, ResultFormat)


def _read(key: str, value: object, kind: type[T]) -> T:
    try:
        return kind(settings.text(key, value))
    except settings.SettingError:
        raise
    except ValueError as error:
        raise settings.SettingError(key, str(error)) from error
