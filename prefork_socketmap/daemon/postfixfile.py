"""Postfix's configuration files, main.cf(5) and those of its tables: ``name = value`` lines, ``$name``, lists."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from prefork_socketmap import settings
from prefork_socketmap.maps.textfile import TextFileError, logical_lines, shown

_LINE = re.compile(r"([A-Za-z0-9_]+)\s*=\s*(.*?)\s*", re.DOTALL)
_REFERENCE = re.compile(r"\$(?:(\$)|\{\s*(\w+)\s*\}|\(\s*(\w+)\s*\)|(\w+)|)")
_SPACE = re.compile(r"\s+")
# As deep as anybody refers, and not in a circle.
_DEEPEST = 20


def read(path: Path) -> dict[str, str]:
    """Return the parameters in a file, by name. Raises OSError, or ValueError that tells the line."""
    found = {}
    for number, line in logical_lines(path.read_bytes().splitlines(keepends=True)):
        try:
            match = _LINE.fullmatch(line.decode())
        except UnicodeDecodeError:
            raise TextFileError(f"line {number}: {shown(line)} is not UTF-8") from None
        if match is None:
            raise TextFileError(f"line {number}: {shown(line)} is no parameter; expected: name = value")
        found[match[1]] = _SPACE.sub(" ", match[2])
    return found


def expand(text: str, parameters: Mapping[str, str], depth: int = 0) -> str:
    """Return *text* with the values of the parameters that it names. Raises ValueError for one that is not there."""

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return "$"
        name = match[2] or match[3] or match[4]
        if name not in parameters or depth == _DEEPEST:
            raise ValueError(f"{settings.shown(text)} names {match[0]}, whose value is not known here")
        return expand(parameters[name], parameters, depth + 1)

    return _REFERENCE.sub(value, text)


def words(text: str) -> list[str]:
    """Split *text* at commas and blanks, but not within braces."""
    return list(_words(text))


def _words(text: str) -> Iterator[str]:
    word, depth = "", 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth > 0 or not (character.isspace() or character == ","):
            word += character
        elif word:
            yield word
            word = ""
    if word:
        yield word
