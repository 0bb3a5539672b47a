"""The option files of MySQL's and MariaDB's client libraries, ``my.cnf``: "Using Option Files" in MySQL's manual.

PyMySQL reads one group of such a file; the libraries read several, and the files that it includes. Where they differ
this is as MariaDB's, which Debian's Postfix uses: a number sign behind a value is part of it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from prefork_socketmap.socketmap.messages import to_text

_GROUP = re.compile(r"\[([^]]*)\]")
_INCLUDE = re.compile(r"!include(dir)?\s+(.+)")
_QUOTED = re.compile(r"""(['"])(.*)\1""", re.DOTALL)
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "r": "\r", "s": " ", "\\": "\\", '"': '"', "'": "'"}
_DEEPEST = 10


def read(path: Path, groups: Collection[str]) -> dict[str, str]:
    """Return the options of *groups* in the file at *path*, named with dashes; the last of a name counts.

    Raises OSError, for files that include each other, too.
    """
    return dict(_options(path, groups, _DEEPEST))


def _options(path: Path, groups: Collection[str], deepest: int) -> Iterator[tuple[str, str]]:
    if not deepest:
        raise OSError(errno.ELOOP, "it includes itself")
    group = ""
    for line in to_text(path.read_bytes()).splitlines():
        text = line.strip()
        if match := _INCLUDE.fullmatch(text):
            place = path.parent / match[2]
            for each in sorted(place.glob("*.cnf")) if match[1] else [place]:
                yield from _options(each, groups, deepest - 1)
        elif match := _GROUP.match(text):
            group = match[1].strip()
        elif group in groups and text and text[0] not in "#;":
            name, _, value = text.partition("=")
            yield name.strip().lower().replace("_", "-").removeprefix("loose-"), _value(value.strip())


def _value(text: str) -> str:
    if match := _QUOTED.fullmatch(text):
        text = match[2]
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[0]), text)
