"""What ``regexp`` and ``pcre`` have in common: ``/pattern/flags result`` with ``$1``, whatever matches the pattern.

regexp_table(5) and pcre_table(5) leave open what else a ``$`` may be: Postfix takes ``$N``, ``${N}`` and ``$(N)``, N
from 1, and ``$$`` for a dollar sign; a group that is empty or has not matched is an empty text.
"""

from __future__ import annotations

import abc
import logging
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, NamedTuple, Protocol

from prefork_socketmap import settings
from prefork_socketmap.maps import rules
from prefork_socketmap.maps.base import LookupFailedError
from prefork_socketmap.maps.rules import Rule
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.watched import WatchedFileMap
from prefork_socketmap.socketmap.messages import Reply, to_bytes, to_text

_LETTERS = string.ascii_letters.encode()
_DOLLAR = re.compile(rb"\$(?:(\$)|(\d+)(?!\w)|\{(\d+)\}|\((\d+)\)|)")


class PatternError(Exception):
    """A pattern could not be matched with this key; the text says why."""


class Pattern(Protocol):
    """A compiled pattern."""

    groups: int
    """How many groups it has."""

    def match(self, text: bytes) -> Sequence[bytes | None] | None:
        """Return the groups, from the first, of the first match in *text*, or None. Raises PatternError."""


Compile = Callable[[bytes, int], Pattern]
"""Compiles a pattern with options. Raises ValueError."""


class Flags(NamedTuple):
    """The flags of a type: which option each toggles, and the options that are on without any."""

    options: Mapping[str, int]
    default: int


class _Condition(NamedTuple):
    pattern: Pattern
    is_negated: bool

    def holds(self, key: bytes) -> bool:
        return (self.pattern.match(key) is None) == self.is_negated


class _ConstantRule(NamedTuple):
    """A rule whose result has no parts of the key: all *conditions* have to hold."""

    conditions: Sequence[_Condition]
    result: bytes

    def find(self, key: bytes) -> bytes | None:
        return self.result if all(each.holds(key) for each in self.conditions) else None


class _ReplacementRule(NamedTuple):
    """A rule whose result has groups in it: literal texts at even indexes, numbers of groups at odd ones."""

    pattern: Pattern
    others: Sequence[_Condition]
    pieces: Sequence[bytes | int]

    def find(self, key: bytes) -> bytes | None:
        groups = self.pattern.match(key)
        if groups is None or not all(each.holds(key) for each in self.others):
            return None
        return b"".join(piece if isinstance(piece, bytes) else groups[piece - 1] or b"" for piece in self.pieces)


class _Syntax:
    """Reads lines; *takes_second* is whether a second pattern may follow, ``/pattern/!/pattern/ result``."""

    def __init__(self, compile_: Compile, flags: Flags, *, takes_second: bool) -> None:
        self._compile = compile_
        self._flags = flags
        self._takes_second = takes_second

    def rule(self, line: bytes) -> Rule[bytes]:
        first, rest = self._pattern(line)
        conditions = [first]
        if self._takes_second and rest.startswith(b"!"):
            second, rest = self._pattern(rest)
            conditions.append(second)
        pieces = _pieces(rules.result(rest))
        numbers = [piece for piece in pieces if isinstance(piece, int)]
        if not numbers:
            return _ConstantRule(conditions, b"".join(piece for piece in pieces if isinstance(piece, bytes)))
        if first.is_negated:
            raise ValueError("a pattern that does not match has no groups for the result")
        if max(numbers) > first.pattern.groups:
            raise ValueError(f"the pattern has no group ${max(numbers)}")
        return _ReplacementRule(first.pattern, conditions[1:], pieces)

    def condition(self, text: bytes) -> Callable[[bytes], bool]:
        condition, rest = self._pattern(text)
        if rest:
            raise ValueError("text behind the pattern of if; lines in a block begin without a blank")
        return condition.holds

    def _pattern(self, line: bytes) -> tuple[_Condition, bytes]:
        """Return the pattern that *line* begins with, and what stands behind it."""
        bare = line.lstrip(b"! \t\r\v\f")
        is_negated = line[: len(line) - len(bare)].count(b"!") % 2 == 1
        delimiter = bare[:1]
        if not delimiter or delimiter.isalnum():
            raise ValueError("is no rule; expected: /pattern/flags, blank, result")
        end = _end(bare, delimiter)
        behind = bare[end + 1 :]
        rest = behind.lstrip(_LETTERS)
        if not (rest == b"" or rest[:1].isspace() or (self._takes_second and rest.startswith(b"!"))):
            raise ValueError(f"{to_text(rest[:1])!r} is no flag")
        options = self._options(to_text(behind[: len(behind) - len(rest)]))
        return _Condition(self._compile(bare[1:end], options), is_negated), rest.lstrip()

    def _options(self, flags: str) -> int:
        options = self._flags.default
        for flag in flags:
            if flag not in self._flags.options:
                raise ValueError(f"there is no flag {flag!r}; accepted are {' '.join(self._flags.options)}")
            options ^= self._flags.options[flag]
        return options


def _end(text: bytes, delimiter: bytes) -> int:
    """Return where the pattern ends that *text* begins with, that is, the place of the second delimiter."""
    match = re.compile(rb".(?:\\.|[^\\" + (b"" if delimiter == b"\\" else re.escape(delimiter)) + rb"])*", re.DOTALL)
    found = match.match(text)
    if found is None or text[found.end() : found.end() + 1] != delimiter:
        raise ValueError(f"the pattern has no second {to_text(delimiter)!r} that ends it")
    return found.end()


def _pieces(text: bytes) -> list[bytes | int]:
    """Return *text* as literal texts and, between them, the numbers of groups. Raises ValueError."""
    pieces: list[bytes | int] = []
    literal = b""
    end = 0
    for match in _DOLLAR.finditer(text):
        literal += text[end : match.start()]
        end = match.end()
        number = match[2] or match[3] or match[4]
        if match[1]:
            literal += b"$"
        elif number and int(number[:9]) > 0:
            pieces += [literal, int(number[:9])]
            literal = b""
        else:
            raise ValueError("a $ in the result is no $1, ${1} or $(1); write $$ for a dollar sign")
    return [*pieces, literal + text[end:]]


class PatternMap(WatchedFileMap["Sequence[Rule[bytes]]"]):
    """A map of patterns. A type defines ``compile`` and names its ``flags``."""

    fold = setting(settings.boolean, False)
    """Off: patterns ignore the case, unless they have the flag i, and results keep that of the key."""

    flags: Flags
    takes_second = False

    @abc.abstractmethod
    def compile(self, pattern: bytes, options: int) -> Pattern:
        """Compile *pattern*. Raises ValueError."""

    def read(self, file: BinaryIO) -> Sequence[Rule[bytes]]:
        """Read the rules."""
        return rules.parse(file, _Syntax(self.compile, self.flags, takes_second=self.takes_second))

    def find(self, key: str) -> Sequence[str] | None:
        """Return the result of the first rule that matches *key*."""
        try:
            result = rules.find(self.content(), to_bytes(key))
        except PatternError as error:
            # Postfix warns, too, but takes it for no match.
            self.complaints.log(logging.WARNING, "%r: %s", key[:200], error)
            raise LookupFailedError(Reply.temp_fail(f"map {self.name}: {error}")) from error
        return None if result is None else (to_text(result),)
