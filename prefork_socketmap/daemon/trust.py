"""Whose word the config file and the code of maps are: who else can write them, and who can read the secrets in them.

The same for the directories in which the server makes files of its own, caches among them.

Whoever can write to the config file of a root's server is root, and whoever can write to the code of a map is the
workers' user. So root refuses such files, and anybody else is warned. Only metadata is looked at: no code is loaded.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path

from prefork_socketmap.daemon.configfile import DEFAULT_MAP, Places, Settings, Table, in_file
from prefork_socketmap.daemon.privileges import Account
from prefork_socketmap.settings import SettingError

_ROOT = 0
_SECRET = re.compile(r"(?:^|_)(?:password|passwd|pw|token|secret)$|^headers$")


def examine(settings: Settings) -> list[str]:
    """Return what is to be warned of. As root, raise SettingError for what others can write to."""
    is_root = os.geteuid() == _ROOT
    warnings: list[str] = []
    for error in _written_by_others(settings):
        if is_root:
            raise error
        warnings.append(str(error))
    if _has_secret(settings) and _is_readable_by_all(settings.path):
        warnings.append(f"{settings.path}: everybody can read the secrets in it; chmod o= {settings.path}")
    if is_root and settings.account:
        warnings += _exchangeable_sockets(settings, settings.account)
    return warnings


def refuse_places(places: Places) -> None:
    """As root, raise SettingError when anybody else can put something in the place of the server's own files."""
    if os.geteuid() != _ROOT:
        return
    for key, directory in (("runtime_dir", places.runtime_dir), ("pid_file", places.pid_file.parent)):
        if problem := _writer(directory, {_ROOT}):
            raise SettingError(key, f"{problem}: a server of root's keeps its files where root alone can write")


def refuse_file(path: Path) -> None:
    """As root, raise SettingError when others can write to the config file *path*: it leads to what gets signals."""
    if os.geteuid() == _ROOT and (problem := _writer(path, {_ROOT})):
        raise SettingError(str(path), problem)


def _written_by_others(settings: Settings) -> Iterator[SettingError]:
    us = {_ROOT, os.geteuid()}
    if problem := _writer(settings.path, us):
        yield SettingError(str(settings.path), problem)
    # What its own user can write to gives that user nothing new.
    workers = us | {settings.account.uid} if settings.account else us
    for name, table in tables(settings).items():
        for key, path in (*code(table, settings.base), *signatures(table, settings.base)):
            if problem := _writer(path, workers):
                yield in_file(settings.path, SettingError(f"maps.{name}.{key}", problem))
        if (file := cache_file(table, settings.base)) and (problem := _writer(file, us)):
            yield in_file(settings.path, SettingError(f"maps.{name}.cache_file", problem))


def tables(settings: Settings) -> Mapping[str, Table]:
    """Return the tables of all maps by name, that of the default map among them."""
    return {**settings.maps, **({DEFAULT_MAP: settings.default_map} if settings.default_map else {})}


def _exchangeable_sockets(settings: Settings, workers: Account) -> Iterator[str]:
    for path in (Path(endpoint.path) for endpoint in settings.endpoints if endpoint.kind == "unix"):
        if path.parent.is_dir() and _may_exchange(workers, path.parent.stat()):
            yield (
                f"{settings.path}: listen: the workers' user, {workers.user}, can put something else in the place of "
                f"{path}; chown root {path.parent}"
            )


# Who can write.


def _may_exchange(account: Account, directory: os.stat_result) -> bool:
    """Whether *account*, which is not root's, can exchange a file of root's in *directory*."""
    if account.uid == _ROOT:
        return False
    mode = directory.st_mode
    if directory.st_uid == account.uid:
        return True
    writes = stat.S_IWGRP if directory.st_gid in account.groups else stat.S_IWOTH
    return bool(mode & writes) and not mode & stat.S_ISVTX


def _writer(path: Path, trusted: Collection[int]) -> str:
    """Return who besides the users in *trusted* can exchange what is at *path*, and where; "" when nobody can."""
    problems = (_problem(step, trusted, is_above=is_above) for step, is_above in _steps(path))
    return next(filter(None, problems), "")


def _problem(step: Path, trusted: Collection[int], *, is_above: bool) -> str:
    status = step.lstat()
    if status.st_uid not in trusted:
        return f"{step} belongs to user {status.st_uid}, who can change it; chown it"
    mode = status.st_mode
    if stat.S_ISLNK(mode) or (is_above and mode & stat.S_ISVTX):
        return ""  # in a sticky directory nobody can exchange what is somebody else's
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and status.st_gid not in (_ROOT, os.getegid())):
        return f"others can write to {step}; chmod go-w {step}"
    return ""


def _steps(path: Path) -> Iterator[tuple[Path, bool]]:
    """Iterate over all that decides what is at *path*: it, the directories above it, the same for each link's target.

    With each goes whether it is a directory above.
    """
    seen: set[tuple[Path, bool]] = set()
    ahead = [(path.absolute(), False)]
    while ahead:
        found, is_above = ahead.pop()
        for step in ((found, is_above), *((parent, True) for parent in found.parents)):
            if step in seen or not os.path.lexists(step[0]):
                continue
            seen.add(step)
            yield step
            if step[0].is_symlink():
                ahead.append((step[0].parent / step[0].readlink(), step[1]))


def cache_file(table: Table, base: Path) -> Path | None:
    """Return where a map keeps its answers when the server stops; None if nowhere. What is wrong is not told here."""
    name = table.get("cache_file")
    return base / name if isinstance(name, str) and name and "\0" not in name else None


# What is executed.


def code(table: Table, base: Path) -> Iterator[tuple[str, Path]]:
    """Iterate over the directories and files of the code of a map of the type ``python``, with their keys.

    What is wrong with the table itself is not told here.
    """
    if table.get("type") != "python":
        return
    path = table.get("path", [])
    names = [each for each in path if isinstance(each, str) and "\0" not in each] if isinstance(path, list) else []
    directories = [str(base / each) for each in names]
    for directory in directories:
        yield "path", Path(directory)
    for key in ("function", "setup"):
        if isinstance(reference := table.get(key), str):
            for file in _files(reference.partition(":")[0], directories):
                yield key, file


def _files(module: str, directories: list[str]) -> Iterator[Path]:
    """Iterate over the files that an import of *module* would execute: its own, and those of the packages around."""
    where = [*directories, *sys.path]
    for part in module.split("."):
        if not part.isidentifier():
            return
        spec = PathFinder.find_spec(part, where)
        if spec is None:
            return
        if spec.has_location and spec.origin:
            yield Path(spec.origin)
        where = list(spec.submodule_search_locations or [])


def signatures(table: Table, base: Path) -> Iterator[tuple[str, Path]]:
    """Iterate over the file of a map of the type ``srs`` that says whose signature is believed, with its key."""
    if table.get("type") == "srs" and isinstance(file := table.get("secret_file"), str) and "\0" not in file:
        yield "secret_file", base / file


# Who can read.


def _has_secret(settings: Settings) -> bool:
    return any(map(_is_secret, tables(settings).items()))


def _is_secret(item: tuple[str, object]) -> bool:
    """Whether a key of a table is for a secret, or its value is a table with one."""
    key, value = item
    return bool(_SECRET.search(key)) or (isinstance(value, dict) and any(map(_is_secret, value.items())))


def _is_readable_by_all(path: Path) -> bool:
    real = path.resolve()
    return bool(real.stat().st_mode & stat.S_IROTH) and all(
        parent.stat().st_mode & stat.S_IXOTH for parent in real.parents
    )
