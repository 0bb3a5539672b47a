"""The lookup tables that main.cf(5) names, as maps: which they are, and what Postfix would do around each of them.

Postfix tries partial keys, and adds extensions to results, for its own tables alone; here the maps are told to.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from prefork_socketmap import settings
from prefork_socketmap.daemon import postfixfile, translate
from prefork_socketmap.daemon.translate import Problem, Table

_ADDRESS = re.compile(
    r"((sender_|recipient_)?canonical|(smtp|lmtp)_generic|(local|relay)_recipient|(sender|recipient)_bcc|relocated"
    r"|sender_dependent_(default_transport|relayhost)|smtpd_sender_login|virtual_alias|virtual_mailbox|virtual)_maps"
)
_DOMAIN = frozenset(("relay_domains", "fast_flush_domains"))
# "propagate_unmatched_extensions" in postconf(5), and which parameters each of its words is about.
_PROPAGATING = {
    "canonical": ("canonical_maps", "sender_canonical_maps", "recipient_canonical_maps"),
    "virtual": ("virtual_alias_maps", "virtual_maps"),
}
# A parameter of the user's own, which others name; these are Postfix's.
_POSTFIX = re.compile(r".*_(maps|domains|restrictions|checks|networks)|mydestination|mynetworks")
_CHECK = re.compile(r"check_(client|helo|sender|recipient|etrn|reverse_client_hostname)_(\w+_)?access")
_TABLE = re.compile(r"(?:proxy:)?([a-z][a-z0-9]*):(.+)", re.DOTALL)
# What Postfix writes to, what it does not take from a socketmap, and what only repeats others.
_NEVER = re.compile(r"(.*_cache_(map|database)|address_verify_map|alias_database|proxy_(read|write)_maps)")
_NO_SOCKETMAP = {
    "alias_maps": "local(8) takes no answer from a socketmap",
    "virtual_uid_maps": "virtual(8) takes no answer from a socketmap",
    "virtual_gid_maps": "virtual(8) takes no answer from a socketmap",
}
_OTHER_SEARCH = re.compile(r"(smtp|lmtp)_tls_policy_maps")
_NO_COUNTERPART = frozenset(("environ", "fail", "internal", "mongodb", "nis", "nisplus", "sdbm", "tcp"))
# Unlike other types, those have no partial keys.
_EXACT = frozenset(("cidr", "regexp", "pcre", "randmap"))


class Found(NamedTuple):
    """A map: its name, what in main.cf it stands for, and its table."""

    name: str
    stands_for: str
    table: Table


class _Use(NamedTuple):
    """How a table is used: by which parameter, and what goes into the map's table for it."""

    parameter: str
    additions: Mapping[str, object]


class MainCf:
    """A main.cf. Construction raises OSError, or ValueError that tells the line.

    ``maps()`` has to be iterated to the end before ``problems`` and ``files`` are complete.
    """

    def __init__(self, path: Path, name_for: Callable[[str], str]) -> None:
        self.problems: list[Problem] = []
        self.files: set[Path] = set()
        """The files that stand for tables."""
        self._base = path.parent
        self._parameters = {"config_directory": str(path.parent), **postfixfile.read(path)}
        self._name_for = name_for

    def maps(self) -> Iterator[Found]:
        """Iterate over the maps for all tables; a table that is used twice alike is one map."""
        done: set[tuple[str, str]] = set()
        aliases = self._aliases()
        for parameter, value in self._parameters.items():
            if _NEVER.fullmatch(parameter) or self._only_names_others_tables(parameter):
                continue
            for use, text in self._uses(parameter, value):
                if parameter in _NO_SOCKETMAP:
                    self.problems.append(Problem(parameter, f"{_shown(text)}: {_NO_SOCKETMAP[parameter]}"))
                elif text in aliases:
                    self.problems.append(
                        Problem(parameter, f"{_shown(text)}: the format of aliases(5) is not read here")
                    )
                elif (text, repr(use.additions)) not in done:
                    done.add((text, repr(use.additions)))
                    yield from self._maps(use, text)

    def _aliases(self) -> set[str]:
        """Return the tables in the format of aliases(5)."""
        found = set()
        for parameter in ("alias_maps", "alias_database"):
            with contextlib.suppress(ValueError):
                found |= set(postfixfile.words(postfixfile.expand(f"${parameter}", self._parameters)))
        return found

    def _only_names_others_tables(self, parameter: str) -> bool:
        if _POSTFIX.fullmatch(parameter):
            return False
        reference = re.compile(rf"\$[{{(]?{parameter}\b")
        return any(reference.search(value) for value in self._parameters.values())

    def _uses(self, parameter: str, value: str) -> Iterator[tuple[_Use, str]]:
        """Iterate over the tables in the value of *parameter*."""
        try:
            words = postfixfile.words(postfixfile.expand(value, self._parameters))
        except ValueError as error:
            if _TABLE.search(value):
                self.problems.append(Problem(parameter, str(error)))
            return
        before = ""
        for word in words:
            match = _TABLE.fullmatch(word)
            if match and _is_a_type(match[1], match[2]):
                yield _Use(parameter, self._additions(parameter, before, match[1])), word.removeprefix("proxy:")
            before = word

    def _additions(self, parameter: str, before: str, kind: str) -> Mapping[str, object]:
        """Return what Postfix does around a table; *before* is the word in front of it."""
        search = _search(parameter, before)
        if _OTHER_SEARCH.fullmatch(parameter):
            self.problems.append(Problem(parameter, "parent domains, .example.com, are not tried here"))
        if search is None or kind in _EXACT:
            return {}
        found: Table = {"search": search}
        delimiter = self._parameters.get("recipient_delimiter", "")
        if delimiter and search != "domain":
            found["recipient_delimiter"] = delimiter
            propagated = self._parameters.get("propagate_unmatched_extensions", "canonical, virtual")
            if any(parameter in _PROPAGATING.get(word, ()) for word in postfixfile.words(propagated)):
                found["propagate_extension"] = True
        if search == "address" and (domains := self._local_domains(parameter)):
            found["local_domains"] = domains
        return found

    def _local_domains(self, parameter: str) -> list[str]:
        if "mydestination" not in self._parameters:
            self.problems.append(Problem(parameter, "mydestination is not set: local_domains has to be added"))
            return []
        try:
            domains = postfixfile.words(postfixfile.expand(self._parameters["mydestination"], self._parameters))
        except ValueError as error:
            self.problems.append(Problem(parameter, f"local_domains has to be added: {error}"))
            return []
        if any(":" in domain or "/" in domain for domain in domains):
            self.problems.append(Problem(parameter, "mydestination names a table: local_domains has to be added"))
            return []
        return domains

    def _maps(self, use: _Use, text: str) -> Iterator[Found]:
        """Iterate over the maps for the table *text*: its members, and then itself."""
        kind, name = _parsed(text)
        mine = self._name_for(_title(kind, name) or use.parameter)
        stands_for = f"{use.parameter}: {text}"
        problems: list[Problem] = []
        try:
            if kind in ("unionmap", "pipemap"):
                members = yield from self._members(use, postfixfile.words(_inner(name)))
                table: Table = {"type": kind, "maps": members}
            else:
                table, problems = self._table(kind, name)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            self.problems.append(Problem(use.parameter, f"{_shown(text)}: {reason}"))
            return
        self.problems += (Problem(f"{_shown(text)}: {problem.parameter}", problem.reason) for problem in problems)
        yield Found(mine, stands_for, {**table, **use.additions})

    def _members(self, use: _Use, words: list[str]) -> Generator[Found, None, list[str]]:
        """Iterate over the maps for the tables *words*; return their names. Raises ValueError when one has no map."""
        names = []
        for word in words:
            found = list(self._maps(_Use(use.parameter, {}), word))
            yield from found
            if not found:
                raise ValueError(f"{_shown(word)} in it could not be translated")
            names.append(found[-1].name)
        return names

    def _table(self, kind: str, name: str) -> tuple[Table, list[Problem]]:
        """Return the table of a map. Raises OSError or ValueError when there can be none."""
        if kind in translate.KINDS:
            path = self._base / name
            self.files.add(path)
            return translate.translate(kind, postfixfile.read(path), path.parent)
        if kind in _NO_COUNTERPART or kind in ("unix", "socketmap"):
            raise ValueError(f"{kind} tables have no counterpart")
        table = _simple(kind, name, self._base)
        return table, translate.checked(table, self._base)


def _is_a_type(kind: str, name: str) -> bool:
    if kind == "unix":  # mostly a socket
        return name.endswith(".byname")
    simple = (
        "btree",
        "cdb",
        "cidr",
        "dbm",
        "hash",
        "inline",
        "lmdb",
        "pcre",
        "randmap",
        "regexp",
        "static",
        "texthash",
    )
    return kind in (*translate.KINDS, *simple, "unionmap", "pipemap") or kind in _NO_COUNTERPART


def _search(parameter: str, before: str) -> str | None:
    if _CHECK.fullmatch(before):
        return "access"
    if parameter == "transport_maps":
        return "transport"
    if parameter in _DOMAIN:
        return "domain"
    return "address" if _ADDRESS.fullmatch(parameter) else None


def _parsed(text: str) -> tuple[str, str]:
    match = _TABLE.fullmatch(text)
    if match is None:
        return "", text
    return match[1], match[2]


def _shown(text: str) -> str:
    """Return of the table *text* what may be shown: all, if it names a file, and not what an inline table has."""
    kind, name = _parsed(text)
    is_plain = _is_a_type(kind, name) and settings.shown(name) == repr(name)
    return text if is_plain else settings.shown(text)


def _title(kind: str, name: str) -> str:
    """Return a name for the map of a table in a file, or ""."""
    is_file = "{" not in name and kind != "static"
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).name.partition(".")[0]) if is_file else ""


def _simple(kind: str, name: str, base: Path) -> Table:
    """Return the table of a map whose type needs no file of parameters. Raises ValueError."""
    if kind == "static":
        return {"type": "randmap", "results": [name]}
    if kind == "randmap":
        return {"type": "randmap", "results": postfixfile.words(_inner(name))}
    if kind == "inline":
        return {"type": "static", "entries": dict(map(_entry, postfixfile.words(_inner(name))))}
    if "{" in name:
        raise ValueError("write the rules to a file")
    path = base / name
    if kind in ("cdb", "lmdb"):
        return {"type": kind, "path": f"{path}.{kind}"}
    if kind in ("cidr", "regexp", "pcre"):
        return {"type": kind, "path": str(path)}
    if not kind:
        raise ValueError(f"{settings.shown(name)} is no table")
    if not path.exists():
        raise ValueError("the file of which postmap(1) has made the table is not there")
    return {"type": "file", "path": str(path)}


def _inner(text: str) -> str:
    if not (text.startswith("{") and text.endswith("}")):
        raise ValueError(f"{settings.shown(text)} is not in braces")
    return text[1:-1].strip()


def _entry(text: str) -> tuple[str, str]:
    inner = _inner(text) if text.startswith("{") else text
    key, equals, value = inner.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"{settings.shown(text)} is no entry; expected: key = value")
    return key.strip(), value.strip()
