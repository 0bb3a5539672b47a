"""The text form of a lookup table: lines of ``key value``, as postmap(1) reads them ("INPUT FILE FORMAT").

Where Postfix warns about a line and goes on without it, this reader refuses the file: half a table answers "not
found" to keys that were there a moment ago, and "not found" rejects mail.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from prefork_socketmap import settings

# The key ends at the first blank outside quotes; quotes and backslashes stay in it.
_ENTRY = re.compile(rb'((?:[^\s"\\]|\\.|"(?:[^"\\]|\\.)*")+)\s+(\S.*)', re.DOTALL)


class TextFileError(ValueError):
    """A line is no entry. The text tells its number."""


def entries(lines: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over the (key, value) pairs of a file's *lines*. Raises TextFileError."""
    for number, line in logical_lines(lines):
        entry = _parse(line)
        if entry is None:
            raise TextFileError(f"line {number}: {shown(line)} is not an entry; expected: key, blank, value")
        try:
            line.decode()
        except UnicodeDecodeError:
            raise TextFileError(f"line {number}: {shown(line)} is not UTF-8") from None
        yield entry


def logical_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Iterate over lines joined with those that continue them, each with the number of its first.

    Without comments, blank lines, and what separates lines. Raises TextFileError.
    """
    begin, logical = 0, b""
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        if b"\0" in line:
            raise TextFileError(f"line {number}: {shown(line)} has a NUL byte")
        if not line[:1].isspace():
            if logical:
                yield begin, logical
            begin, logical = number, line.rstrip(b"\n")
        elif logical:
            logical += line.rstrip(b"\n")
        else:
            raise TextFileError(f"line {number} continues nothing: it begins with a blank")
    if logical:
        yield begin, logical


def _parse(line: bytes) -> tuple[bytes, bytes] | None:
    if b'"' not in line and b"\\" not in line:
        key, *rest = line.split(None, 1)
        return (key, rest[0].rstrip()) if rest else None
    match = _ENTRY.fullmatch(line)
    return (match[1], match[2].rstrip()) if match else None


def shown(line: bytes) -> str:
    """Return of *line* what may be shown: of an entry the key, at most, for the value may be a password."""
    return settings.shown(line.strip().decode("utf-8", "backslashreplace"))
