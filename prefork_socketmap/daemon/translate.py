"""From a table of Postfix to a map's table in the config file, with what cannot be translated.

Names and meanings stay as they are, so this is mostly about how values are written. Where a default of Postfix's is
another one than here, it is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from prefork_socketmap import settings
from prefork_socketmap.daemon.postfixfile import words
from prefork_socketmap.maps import registry
from prefork_socketmap.maps.base import MissingLibraryError

Table = dict[str, object]

ABSENT = {
    "mysql": {
        "tls_ciphers": "Python's choice of ciphers is used",
    },
    "pgsql": {},
    "sqlite": {},
    "ldap": {
        "cache": "Postfix ignores it, too; see cache_ttl",
        "cache_expiry": "Postfix ignores it, too; see cache_ttl",
        "cache_size": "Postfix ignores it, too; here it is another setting",
        "debuglevel": "see query -v",
        "tls_random_file": "the system's random numbers are used",
    },
    "memcache": {
        "backup": "ask both with a map of type chain",
        "flags": "nothing is written",
        "ttl": "nothing is written",
        "data_size_limit": "see max_reply_size",
        "line_size_limit": "see max_reply_size",
        "max_try": "a lookup is tried again once",
        "retry_pause": "there is no pause before the second attempt",
    },
}
"""The parameters of each type that have no counterpart here, and why."""


class Problem(NamedTuple):
    """What could not be translated, and why."""

    parameter: str
    reason: str


class _Error(ValueError):
    """A value cannot be translated."""


def _text(value: str) -> str:
    return value


def _count(value: str) -> int:
    if not value.isdecimal():
        raise _Error(f"{settings.shown(value)} is no whole number")
    return int(value)


def _boolean(value: str) -> bool:
    if value.lower() not in ("yes", "no", "true", "false", "1", "0"):
        raise _Error(f"{settings.shown(value)} is neither yes nor no")
    return value.lower() in ("yes", "true", "1")


def _list(value: str) -> list[str]:
    return words(value)


def _domains(value: str) -> list[str]:
    domains = words(value)
    if any(":" in domain or "/" in domain for domain in domains):
        raise _Error("names a lookup table or a file; write the list of its domains here")
    return domains


Read = Callable[[str], object]

_COMMON: dict[str, Read] = {"domain": _domains, "result_format": _text, "expansion_limit": _count}
_SQL: dict[str, Read] = {**_COMMON, "query": _text}
_LOGIN: dict[str, Read] = {"user": _text, "password": _text, "dbname": _text, "hosts": _list}
# How the parameters are read that keep their names.
_READ: dict[str, dict[str, Read]] = {
    "mysql": {
        **_SQL,
        **_LOGIN,
        "require_result_set": _boolean,
        "option_file": _text,
        "option_group": _text,
        "tls_cert_file": _text,
        "tls_key_file": _text,
        "tls_CAfile": _text,
        "tls_CApath": _text,
        "tls_verify_cert": _boolean,
    },
    "pgsql": {**_SQL, **_LOGIN},
    "sqlite": {**_SQL, "dbpath": _text},
    "ldap": {
        **_COMMON,
        "timeout": _count,
        "search_base": _text,
        "query_filter": _text,
        "result_attribute": _list,
        "special_result_attribute": _list,
        "terminal_result_attribute": _list,
        "leaf_result_attribute": _list,
        "scope": _text,
        "bind_dn": _text,
        "bind_pw": _text,
        "recursion_limit": _count,
        "size_limit": _count,
        "dereference": _count,
        "chase_referrals": _boolean,
        "version": _count,
        "sasl_mechs": _list,
        "sasl_realm": _text,
        "sasl_authz_id": _text,
        "sasl_minssf": _count,
        "start_tls": _boolean,
        "tls_ca_cert_dir": _text,
        "tls_ca_cert_file": _text,
        "tls_cert": _text,
        "tls_key": _text,
        "tls_require_cert": _boolean,
        "tls_cipher_suite": _text,
    },
    "memcache": {"domain": _domains, "key_format": _text, "timeout": _count},
}
_TYPES = {"mysql": "mysql", "pgsql": "postgresql", "sqlite": "sqlite", "ldap": "ldap", "memcache": "memcache"}
_LEGACY = ("select_field", "table", "where_field", "additional_conditions", "select_function")
REWRITTEN = {
    "mysql": frozenset(_LEGACY[:-1]),
    "pgsql": frozenset(_LEGACY),
    "sqlite": frozenset(_LEGACY[:-1]),
    "ldap": frozenset(("server_host", "server_port", "bind")),
    "memcache": frozenset(("memcache",)),
}
"""The parameters of each type that become something of another name."""

KINDS = tuple(_TYPES)
"""Postfix's types that have a file of parameters."""


def guess(parameters: Mapping[str, str]) -> str | None:
    """Return the type of the table with *parameters*; None for one that may be ``mysql`` or ``pgsql``."""
    for name, kind in {
        "dbpath": "sqlite",
        "search_base": "ldap",
        "server_host": "ldap",
        "memcache": "memcache",
    }.items():
        if name in parameters:
            return kind
    if "select_function" in parameters:
        return "pgsql"
    return "mysql" if any(name.startswith(("tls_", "option_")) for name in parameters) else None


def is_a_table(parameters: Mapping[str, str]) -> bool:
    """Whether *parameters* are those of a table."""
    return guess(parameters) is not None or bool({"query", "hosts", "select_field"} & parameters.keys())


def translate(kind: str, parameters: Mapping[str, str], base: Path) -> tuple[Table, list[Problem]]:
    """Return the map's table for a table of type *kind*, and what could not be translated."""
    table: Table = {"type": _TYPES[kind]}
    problems = []
    for name, value in parameters.items():
        if name in ABSENT[kind]:
            problems.append(Problem(name, ABSENT[kind][name]))
        elif name in _READ[kind]:
            try:
                table[name] = _READ[kind][name](value)
            except _Error as error:
                problems.append(Problem(name, str(error)))
        elif name not in REWRITTEN[kind]:
            problems.append(Problem(name, f"is no parameter of {kind}_table(5)"))
    problems += _REWRITE[kind](parameters, table)
    # What is empty in Postfix is as if it were not there.
    table = {name: value for name, value in table.items() if value not in ("", [])}
    return table, problems + checked(table, base)


def checked(table: Table, base: Path) -> list[Problem]:
    """Return what the map's type does not accept of *table*. A library that is not installed is no trouble here."""
    try:
        registry.build({"m": table}, base)
    except MissingLibraryError:
        return []
    except settings.SettingError as error:
        return [Problem(error.key.removeprefix("maps.m."), error.problem)]
    return []


def _rewrite_sql(parameters: Mapping[str, str], table: Table) -> Iterable[Problem]:
    if "query" not in table and "select_function" in parameters:
        table["query"] = f"SELECT {parameters['select_function']}('%s')"
    elif "query" not in table and {"select_field", "table", "where_field"} <= parameters.keys():
        query = "SELECT {select_field} FROM {table} WHERE {where_field}='%s'".format_map(parameters)
        table["query"] = f"{query} {parameters.get('additional_conditions', '')}".rstrip()
    return ()


def _rewrite_mysql(parameters: Mapping[str, str], table: Table) -> Iterable[Problem]:
    _rewrite_hosts(table)
    if table.keys() & {"tls_CAfile", "tls_CApath", "tls_cert_file", "tls_key_file"}:
        table.setdefault("tls_verify_cert", False)
    yield from _rewrite_sql(parameters, table)
    if any(host in ("localhost", "inet:localhost") for host in _hosts(table)):
        yield Problem(
            "hosts",
            "localhost is a Unix socket to Postfix, and TCP here; if need be, write unix:/run/mysqld/mysqld.sock",
        )


def _rewrite_pgsql(parameters: Mapping[str, str], table: Table) -> Iterable[Problem]:
    _rewrite_hosts(table)
    return _rewrite_sql(parameters, table)


def _rewrite_hosts(table: Table) -> None:
    table["hosts"] = _hosts(table) or ["localhost"]


def _hosts(table: Table) -> list[str]:
    hosts = table.get("hosts")
    return hosts if isinstance(hosts, list) else []


def _rewrite_ldap(parameters: Mapping[str, str], table: Table) -> Iterable[Problem]:
    port = parameters.get("server_port", "389")
    table["hosts"] = [
        host if "://" in host or host.rpartition(":")[2].isdecimal() or port == "389" else f"{host}:{port}"
        for host in words(parameters.get("server_host", "localhost"))
    ]
    bind = parameters.get("bind", "yes").lower()
    if bind == "sasl":
        table["bind"] = "sasl"
    elif bind in ("no", "none", "0", "false"):
        table.pop("bind_dn", None)
        table.pop("bind_pw", None)
    elif bind not in ("yes", "simple", "1", "true"):
        yield Problem("bind", f"{settings.shown(bind)} is no way to log in")
    if table["type"] == "ldap" and (table.get("start_tls") or any("ldaps://" in host for host in _hosts(table))):
        table.setdefault("tls_require_cert", False)


def _rewrite_memcache(parameters: Mapping[str, str], table: Table) -> Iterable[Problem]:
    table["hosts"] = [parameters.get("memcache", "inet:localhost:11211")]
    return ()


_REWRITE = {
    "mysql": _rewrite_mysql,
    "pgsql": _rewrite_pgsql,
    "sqlite": _rewrite_sql,
    "ldap": _rewrite_ldap,
    "memcache": _rewrite_memcache,
}
