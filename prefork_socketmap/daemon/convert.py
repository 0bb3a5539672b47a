"""The command ``convert``: the tables of a Postfix as maps for the config file."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from prefork_socketmap.daemon import postfixfile, translate
from prefork_socketmap.daemon.maincf import Found, MainCf
from prefork_socketmap.daemon.translate import Problem, Table

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
# They lie beside main.cf, so that they may well be named together with it.
_OTHERS = ("master.cf", "dynamicmaps.cf")


def convert(arguments: argparse.Namespace) -> int:
    """Print the maps for the files in *arguments*; return EX_DATAERR if anything could not be translated."""
    conversion = _Conversion()
    for found in conversion.run(arguments.files):
        print(f"# {found.stands_for}\n[maps.{_key(found.name)}]")
        print("".join(f"{_key(key)} = {_value(value)}\n" for key, value in found.table.items()))
    return os.EX_DATAERR if conversion.has_problems else os.EX_OK


class _Conversion:
    """Goes through files, and tells what cannot be translated as it goes."""

    def __init__(self) -> None:
        self.has_problems = False
        self._names: set[str] = set()
        self._done: set[Path] = set()

    def run(self, files: list[str]) -> Iterator[Found]:
        """Iterate over the maps for *files*; those of a main.cf first, since it knows the types of others."""
        for file in sorted(files, key=lambda name: Path(name).name != "main.cf"):
            kind, path = _kind_and_path(file)
            if path in self._done or path.name in _OTHERS:
                continue
            try:
                if path.name == "main.cf":
                    yield from self._main(path)
                else:
                    yield self._table(kind, path)
            except (OSError, ValueError) as error:
                text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                self._complain(path, text)

    def _main(self, path: Path) -> Iterator[Found]:
        main = MainCf(path, self._name_for)
        yield from main.maps()
        self._done |= main.files
        for problem in dict.fromkeys(main.problems):
            self._complain(path, f"{problem.parameter}: {problem.reason}")

    def _table(self, kind: str | None, path: Path) -> Found:
        parameters = postfixfile.read(path)
        if not translate.is_a_table(parameters):
            raise ValueError("is neither main.cf nor the file of a table")
        kind = kind or translate.guess(parameters) or _kind_of_name(path)
        if kind is None:
            raise ValueError(f"may be of type mysql or pgsql; write mysql:{path} or pgsql:{path}")
        table, problems = translate.translate(kind, parameters, path.parent)
        for problem in problems:
            self._tell(path, problem)
        return Found(self._name_for(path.stem), f"{kind}:{path}", table)

    def _name_for(self, title: str) -> str:
        """Return a name for a map that none has yet."""
        name = title = re.sub(r"\s+", "_", title)
        number = 1
        while name in self._names:
            number += 1
            name = f"{title}_{number}"
        self._names.add(name)
        return name

    def _tell(self, path: Path, problem: Problem) -> None:
        self._complain(path, f"{problem.parameter}: {problem.reason}")

    def _complain(self, path: Path, text: str) -> None:
        self.has_problems = True
        print(f"prefork-socketmap: {path}: {text}", file=sys.stderr)


def _kind_and_path(file: str) -> tuple[str | None, Path]:
    kind, colon, rest = file.partition(":")
    known = colon and kind in translate.KINDS
    return (kind, Path(rest).absolute()) if known else (None, Path(file).absolute())


def _kind_of_name(path: Path) -> str | None:
    """Return the type that the name of a file, or of its directory, tells."""
    kinds = {kind for kind in ("mysql", "pgsql") if kind in str(path)}
    return kinds.pop() if len(kinds) == 1 else None


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _value(key)


def _value(value: object) -> str:
    if isinstance(value, dict):
        entries: Table = value
        return "{ " + ", ".join(f"{_key(key)} = {_value(each)}" for key, each in entries.items()) + " }"
    # JSON's strings, numbers, booleans and lists are TOML's, too, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
