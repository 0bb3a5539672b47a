"""PostgreSQL, MySQL, LDAP and memcached, asked by Postfix itself and by the maps here: the answers are equal.

The keys are those of ``test_native_tables``, which compares SQLite and text files, and partial keys.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from prefork_socketmap.maps.base import Map
from prefork_socketmap.socketmap.messages import Status
from tests.integration.postfix import Postfix
from tests.integration.servers import mariadb as mariadb_server
from tests.integration.servers import postgresql as postgresql_server
from tests.integration.servers import slapd as slapd_server
from tests.integration.servers.mariadb import Mariadb
from tests.integration.servers.memcached import Memcached
from tests.integration.servers.postgresql import Postgresql
from tests.integration.servers.process import program, unavailable
from tests.integration.servers.slapd import READER, SUFFIX, Slapd
from tests.integration.test_native_tables import KEYS, ROWS
from tests.maps.opening import OpenMap

SELECT = "SELECT goto FROM alias WHERE address = '%s'"
SQL_TABLES: dict[str, dict[str, object]] = {
    "plain": {"query": SELECT},
    "parts": {"query": "SELECT goto FROM alias WHERE address = '%u@%d'"},
    "labels": {"query": "SELECT goto FROM alias WHERE address = '%2.%1'"},
    "pattern": {"query": "SELECT goto FROM alias WHERE address LIKE '%%@%d' ORDER BY goto"},
    "columns": {"query": "SELECT address, goto FROM alias WHERE address = '%s' ORDER BY goto"},
    "domain": {"query": SELECT, "domain": ["example.com", "other.test"]},
    "format": {"query": SELECT, "result_format": "%u|%d for %U"},
    "types": {"query": "SELECT 1.50, DATE '2026-01-02', NULL, true FROM alias WHERE address = '%s' AND goto <> ''"},
}
SEARCH = {"search_base": SUFFIX, "result_attribute": ["ou"]}
LDAP_TABLES: dict[str, dict[str, object]] = {
    "plain": {**SEARCH, "query_filter": "(description=%s)"},
    "bare": {**SEARCH, "query_filter": "description=%s"},
    "parts": {**SEARCH, "query_filter": "(&(objectClass=*)(description=%u@%d))"},
    "labels": {**SEARCH, "query_filter": "(description=%2.%1)"},
    "pattern": {**SEARCH, "query_filter": "(description=*@%d)"},
    "domain": {**SEARCH, "query_filter": "(description=%s)", "domain": ["example.com", "other.test"]},
    "format": {**SEARCH, "query_filter": "(description=%s)", "result_format": "%u|%d for %U"},
    "base": {
        "search_base": f"cn=%u,{SUFFIX}",
        "query_filter": "(objectClass=*)",
        "result_attribute": ["ou", "cn"],
    },
    "attributes": {**SEARCH, "query_filter": "(description=%s)", "result_attribute": ["description", "ou"]},
    "order": {**SEARCH, "query_filter": "(description=%s)", "result_attribute": ["ou", "description", "cn"]},
    "subtype": {**SEARCH, "query_filter": "(description=%s)", "result_attribute": ["title", "ou"]},
    "mixed": {
        "search_base": SUFFIX,
        "query_filter": "(description=all)",
        "result_attribute": ["ou", "o", "description"],
        "special_result_attribute": ["member"],
        "leaf_result_attribute": ["ou"],
    },
    "terminal": {
        "search_base": SUFFIX,
        "query_filter": "(description=%s)",
        "result_attribute": ["ou"],
        "terminal_result_attribute": ["title"],
    },
    "group": {
        "search_base": SUFFIX,
        "query_filter": "(&(objectClass=groupOfNames)(description=*)(!(cn=%s)))",
        "result_attribute": ["description"],
        "special_result_attribute": ["member"],
        "leaf_result_attribute": ["ou"],
    },
}

MEMCACHE_TABLES: dict[str, dict[str, object]] = {
    "plain": {},
    "prefix": {"key_format": "aliases:%s"},
    "parts": {"key_format": "%u@%d"},
    "labels": {"key_format": "%2.%1"},
    "domain": {"domain": ["example.com", "other.test"]},
}


@pytest.fixture(autouse=True)
def _postfix_has_the_types() -> None:
    known = subprocess.check_output([program("postconf", "postfix"), "-m"], text=True).split()
    for kind in ("pgsql", "mysql", "ldap"):
        if kind not in known:
            unavailable(f"Postfix has no {kind} tables: apt install postfix-{kind}")


def insertion(quote: str) -> str:
    """Return the statement that inserts ``ROWS``, with *quote* for a backslash."""

    def literal(value: object) -> str:
        return "NULL" if value is None else "'" + str(value).replace("'", "''").replace("\\", quote) + "'"

    return "INSERT INTO alias VALUES " + ", ".join(f"({literal(key)}, {literal(value)})" for key, value in ROWS)


def write(path: Path, table: Mapping[str, object]) -> None:
    """Write *table* as Postfix has it: lists with commas, no quotes."""
    lines = {key: ", ".join(value) if isinstance(value, list) else value for key, value in table.items()}
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    os.utime(path, (0, 0))  # Postfix waits for seconds if a file seems to be still in the making


def native(postfix: Postfix, table: str, keys: Iterable[str] = KEYS) -> list[str]:
    done = postfix.postmap("-q", "-", table, stdin="".join(f"{key}\n" for key in keys).encode())
    assert b"fatal" not in done.stderr, done.stderr.decode()
    return done.stdout.decode().splitlines()


def ours(table: Map, keys: Iterable[str] = KEYS) -> list[str]:
    replies = {key: table.lookup(key) for key in keys}
    assert {reply.status for reply in replies.values()} <= {Status.OK, Status.NOT_FOUND}
    return [f"{key}\t{reply.text}" for key, reply in replies.items() if reply.status is Status.OK]


@pytest.mark.parametrize("name", SQL_TABLES)
def test_postgresql_answers_as_postfix_does(
    unstarted_postfix: Postfix, open_map: OpenMap, postgresql: Postgresql, tmp_path: Path, name: str
) -> None:
    postgresql.execute(insertion("\\"))
    login = {"user": "postfix", "dbname": "mail", "hosts": [f"127.0.0.1:{postgresql.port}"]}
    write(tmp_path / "cf", {**login, **SQL_TABLES[name], "password": postgresql_server.PASSWORD})
    # Before version 3.8 Postfix speaks Latin-1 with PostgreSQL, and finds no other keys; we speak UTF-8.
    keys = [key for key in KEYS if key.isascii()]
    expected = native(unstarted_postfix, f"pgsql:{tmp_path}/cf", keys)
    assert expected, "a table that finds nothing compares nothing"
    table = open_map("postgresql", password=postgresql_server.PASSWORD, **login, **SQL_TABLES[name])
    assert ours(table, keys) == expected


@pytest.mark.parametrize("name", SQL_TABLES)
def test_mysql_answers_as_postfix_does(
    unstarted_postfix: Postfix, open_map: OpenMap, mariadb: Mariadb, tmp_path: Path, name: str
) -> None:
    mariadb.execute(insertion("\\\\"))
    login = {"user": "postfix", "dbname": "mail", "hosts": [f"unix:{mariadb.socket}"]}
    write(tmp_path / "cf", {**login, **SQL_TABLES[name], "password": mariadb_server.PASSWORD})
    expected = native(unstarted_postfix, f"mysql:{tmp_path}/cf")
    assert expected, "a table that finds nothing compares nothing"
    assert ours(open_map("mysql", password=mariadb_server.PASSWORD, **login, **SQL_TABLES[name])) == expected


@pytest.mark.parametrize(
    "options",
    [
        '[client]\n# comment\nuser = "postfix"\n',
        "[client]\nuser=nobody\n[postfix]\nuser=postfix\n[mysql]\nuser=x\n",
        "[client]\n!include {more}\n[mysql]\nuser=x\n",
    ],
)
def test_an_option_file_of_mysql_is_read_as_postfix_does(
    unstarted_postfix: Postfix, open_map: OpenMap, mariadb: Mariadb, tmp_path: Path, options: str
) -> None:
    mariadb.execute(insertion("\\\\"))
    more = tmp_path / "more.cnf"
    more.write_text("[client]\nuser=postfix\n")
    (tmp_path / "my.cnf").write_text(options.format(more=more))
    table = {
        "hosts": [f"unix:{mariadb.socket}"],
        "dbname": "mail",
        "password": mariadb_server.PASSWORD,
        "query": SELECT,
        "option_file": str(tmp_path / "my.cnf"),
        "option_group": "postfix",
    }
    write(tmp_path / "cf", table)
    expected = native(unstarted_postfix, f"mysql:{tmp_path}/cf")
    assert expected, "a table that finds nothing compares nothing"
    assert ours(open_map("mysql", **table)) == expected


@pytest.mark.parametrize("name", LDAP_TABLES)
def test_ldap_answers_as_postfix_does(
    unstarted_postfix: Postfix, open_map: OpenMap, slapd: Slapd, tmp_path: Path, name: str
) -> None:
    for number, (key, value) in enumerate(ROWS):
        values = {"ou": str(value)} if value else {}
        # All entries of a key: where only some have a terminal attribute, Postfix forgets the others' results.
        titled = {"title;lang-de": f"Titel {number}", "title": f"title {number}"} if number // 3 % 2 else {}
        person = {"sn": "x", **titled, "description": key, **values}
        slapd.add(f"cn={number}", objectClass="inetOrgPerson", **person)
    slapd.add("cn=user", objectClass="inetOrgPerson", sn="x", ou="by its name")
    people = [f"cn={number},{SUFFIX}" for number in range(4)]
    slapd.add(
        "cn=all",
        objectClass=["groupOfNames", "extensibleObject"],
        o="first",
        description="all",
        member=people,
        ou="not me",
    )
    login = {"bind_dn": READER, "bind_pw": slapd_server.PASSWORD}
    url = f"ldap://127.0.0.1:{slapd.port}"
    write(tmp_path / "cf", {"server_host": url, "version": 3, **login, **LDAP_TABLES[name]})
    expected = native(unstarted_postfix, f"ldap:{tmp_path}/cf")
    assert expected, "a table that finds nothing compares nothing"
    assert ours(open_map("ldap", hosts=[url], **login, **LDAP_TABLES[name])) == expected


SASL: dict[str, dict[str, object]] = {
    "EXTERNAL": {},
    "SCRAM-SHA-256": {"bind_dn": "postfix", "bind_pw": slapd_server.PASSWORD},
    "DIGEST-MD5": {
        "bind_dn": "postfix",
        "bind_pw": slapd_server.PASSWORD,
        "sasl_realm": "example",
        "sasl_minssf": 56,
    },
}


@pytest.mark.parametrize("mechanism", SASL)
def test_ldap_logs_in_by_sasl_as_postfix_does(
    unstarted_postfix: Postfix, open_map: OpenMap, slapd: Slapd, tmp_path: Path, mechanism: str
) -> None:
    slapd.add("cn=user", objectClass="inetOrgPerson", sn="x", description="user", ou="found")
    url = slapd.socket_url if mechanism == "EXTERNAL" else f"ldap://127.0.0.1:{slapd.port}"
    table = {**LDAP_TABLES["plain"], "bind": "sasl", "sasl_mechs": [mechanism], **SASL[mechanism]}
    write(tmp_path / "cf", {"server_host": url, "version": 3, **table})
    assert native(unstarted_postfix, f"ldap:{tmp_path}/cf", ["user", "other"]) == ["user\tfound"]
    assert ours(open_map("ldap", hosts=[url], **table), ["user", "other"]) == ["user\tfound"]


@pytest.mark.parametrize("chase", [False, True])
def test_ldap_follows_referrals_as_postfix_does(
    unstarted_postfix: Postfix, open_map: OpenMap, slapd: Slapd, tmp_path: Path, chase: bool
) -> None:
    slapd.add("ou=public", objectClass="organizationalUnit", ou="public")
    slapd.add("cn=here,ou=public", objectClass="inetOrgPerson", sn="x", description="user", ou="found")
    url = f"ldap://127.0.0.1:{slapd.port}"
    slapd.add("ou=staff", objectClass="organizationalUnit", ou="staff")
    target = f"{url}/ou=public,{SUFFIX}"
    slapd.add("cn=elsewhere,ou=staff", objectClass=["referral", "extensibleObject"], ref=target)
    login = {"bind_dn": READER, "bind_pw": slapd_server.PASSWORD}
    table = {**LDAP_TABLES["plain"], **login, "search_base": f"ou=staff,{SUFFIX}"}
    write(tmp_path / "cf", {"server_host": url, "version": 3, **table, "chase_referrals": "yes" if chase else "no"})
    expected = native(unstarted_postfix, f"ldap:{tmp_path}/cf", ["user", "other"])
    assert expected == (["user\tfound"] if chase else [])
    assert ours(open_map("ldap", hosts=[url], **table, chase_referrals=chase), ["user", "other"]) == expected


@pytest.mark.parametrize("name", MEMCACHE_TABLES)
def test_memcache_answers_as_postfix_does(
    unstarted_postfix: Postfix, open_map: OpenMap, memcached: Memcached, tmp_path: Path, name: str
) -> None:
    rows = {key: str(value) for key, value in ROWS if value and " " not in key}
    memcached.set(rows | {f"aliases:{key}": value for key, value in rows.items()})
    write(tmp_path / "cf", {"memcache": f"inet:127.0.0.1:{memcached.port}", **MEMCACHE_TABLES[name]})
    expected = native(unstarted_postfix, f"memcache:{tmp_path}/cf")
    assert expected, "a table that finds nothing compares nothing"
    assert ours(open_map("memcache", hosts=[f"127.0.0.1:{memcached.port}"], **MEMCACHE_TABLES[name])) == expected
