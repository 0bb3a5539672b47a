"""The form of Postfix's pattern tables: rules in their order, the first that matches answers, ``if`` .. ``endif``.

cidr_table(5), regexp_table(5), pcre_table(5), "TABLE FORMAT". What a pattern looks like and what it matches is the
business of each type. Where Postfix warns about a line and goes on without it, this reader refuses the file: a table
of patterns without one of them may answer anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from prefork_socketmap.maps.textfile import TextFileError, logical_lines, shown

K = TypeVar("K")
K_contra = TypeVar("K_contra", contravariant=True)

_IF = re.compile(rb"if(?![0-9a-z])\s*(.*)", re.DOTALL | re.IGNORECASE)
_ENDIF = re.compile(rb"endif(?![0-9a-z])\s*(.*)", re.DOTALL | re.IGNORECASE)
# As deep as anybody nests, and no deeper than can be followed.
_DEEPEST = 50


class Rule(Protocol[K_contra]):
    """One rule, or several that were made into one."""

    def find(self, key: K_contra) -> bytes | None:
        """Return the result if the rule matches *key*."""


class Block(NamedTuple, Generic[K]):
    """``if`` .. ``endif``: *rules* for the keys that *condition* holds for."""

    condition: Callable[[K], bool]
    rules: Sequence[Rule[K]]

    def find(self, key: K) -> bytes | None:
        """Return what the first matching rule says, if the condition holds."""
        return find(self.rules, key) if self.condition(key) else None


def find(rules: Sequence[Rule[K]], key: K) -> bytes | None:
    """Return the result of the first of *rules* that matches *key*, or None."""
    for rule in rules:
        result = rule.find(key)
        if result is not None:
            return result
    return None


class Syntax(Protocol[K_contra]):
    """How the lines of a type are read. Both methods raise ValueError."""

    def rule(self, line: bytes) -> Rule[K_contra]:
        """Read a pattern and its result."""

    def condition(self, text: bytes) -> Callable[[K_contra], bool]:
        """Read what stands behind ``if``."""


def parse(lines: Iterable[bytes], syntax: Syntax[K]) -> list[Rule[K]]:
    """Read the rules of a file. Raises TextFileError, whose text begins with the number of the line."""
    # The rules of the file, of the block in it that is open, of the block in that one ...
    open_lists: list[list[Rule[K]]] = [[]]
    begin = 0
    for number, line in logical_lines(lines):
        try:
            if match := _ENDIF.fullmatch(line.rstrip()):
                _close(open_lists, match[1])
            elif match := _IF.fullmatch(line.rstrip()):
                inner: list[Rule[K]] = []
                open_lists[-1].append(Block(syntax.condition(match[1]), inner))
                open_lists.append(inner)
                begin = number
                if len(open_lists) > _DEEPEST:
                    raise ValueError(f"more than {_DEEPEST - 1} nested blocks")
            else:
                open_lists[-1].append(syntax.rule(line.rstrip()))
        except ValueError as error:
            raise TextFileError(f"line {number}: {shown(line)}: {error}") from error
    if len(open_lists) > 1:
        raise TextFileError(f"line {begin}: the block has no endif")
    return open_lists[0]


def _close(open_lists: list[list[Rule[K]]], rest: bytes) -> None:
    if rest:
        raise ValueError("text behind endif; lines in a block begin without a blank")
    if len(open_lists) == 1:
        raise ValueError("there is no if that this endif ends")
    open_lists.pop()


def result(text: bytes) -> bytes:
    """Read the result of a rule. Raises ValueError when there is none, or it is not UTF-8."""
    found = text.strip()
    if not found:
        raise ValueError("there is no result; expected: pattern, blank, result")
    try:
        found.decode()
    except UnicodeDecodeError:
        raise ValueError("the result is not UTF-8") from None
    return found
