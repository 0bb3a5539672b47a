"""The command ``convert``: what it prints is a config file that is right, and means what Postfix's tables meant."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from prefork_socketmap import settings
from prefork_socketmap.maps import registry
from tests.daemon.installation import COMMAND, TIMEOUT, Installation
from tests.integration.servers.process import Certificate, program
from tests.integration.test_native_databases import ours
from tests.integration.test_native_files import require_types
from tests.integration.test_native_tables import KEYS, ROWS, TABLES
from tests.test_manual import SECTIONS, displays


def convert(*files: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, "convert", *files], capture_output=True, text=True, check=False, timeout=TIMEOUT)


def maps(*files: str | Path) -> dict[str, Any]:
    """Convert *files*, of which everything can be translated; return the maps."""
    result = convert(*files)
    assert (result.returncode, result.stderr) == (os.EX_OK, "")
    found: dict[str, Any] = tomllib.loads(result.stdout)["maps"]
    return found


@pytest.mark.parametrize("kind", ["mysql", "pgsql", "sqlite", "ldap"])
def test_the_manual_s_examples_become_what_the_manual_says(tmp_path: Path, kind: str) -> None:
    files = Certificate(tmp_path, "root")
    before, after = (
        re.sub(r"/etc/ssl/\S+pem\b", str(files.certificate), text).replace("/etc/ssl/postfix.key", str(files.key))
        for text in displays(SECTIONS[f"From {kind}_table(5)"])
    )
    (tmp_path / "table.cf").write_text(before)
    (expected,) = tomllib.loads(after)["maps"].values()
    for name in ("search", "recipient_delimiter", "propagate_extension"):
        expected.pop(name, None)
    found = maps(f"{kind}:{tmp_path / 'table.cf'}")["table"]
    for table in (found, expected):
        table["timeout"] = settings.seconds("timeout", table.get("timeout", 0))
    assert found == expected


@pytest.mark.parametrize("name", TABLES)
def test_a_converted_table_answers_as_before(tmp_path: Path, name: str) -> None:
    """``test_native_tables`` holds that Postfix, too, answers as a map with the settings of TABLES."""
    with contextlib.closing(sqlite3.connect(tmp_path / "database")) as database, database:
        database.execute("CREATE TABLE aliases (key TEXT, result)")
        database.executemany("INSERT INTO aliases VALUES (?, ?)", ROWS)
    lines = {key: ", ".join(value) if isinstance(value, list) else value for key, value in TABLES[name].items()}
    (tmp_path / "table.cf").write_text(
        "".join(f"{key} = {value}\n" for key, value in {"dbpath": tmp_path / "database", **lines}.items())
    )
    converted = registry.build(maps(tmp_path / "table.cf"), tmp_path)["table"]
    direct = registry.build({"m": {"type": "sqlite", "dbpath": "database", **TABLES[name]}}, tmp_path)["m"]
    for table in (converted, direct):
        table.open()
    assert ours(converted, KEYS) == ours(direct, KEYS) != []
    for table in (converted, direct):
        table.close()


MAIN = """\
# A comment.
dbs = mysql:$config_directory/mysql-aliases.cf,
      proxy:pgsql:$config_directory/aliases.cf
recipient_delimiter = +
mydestination = localhost, example.org
virtual_alias_maps = $dbs hash:${config_directory}/virtual
virtual_mailbox_maps = proxy:pgsql:$config_directory/aliases.cf
transport_maps = cdb:$(config_directory)/transport, regexp:$config_directory/transport.regexp
relay_domains = example.net lmdb:$config_directory/relay inline:{ {a.test = yes it is}, {b.test=2} }
canonical_maps = unionmap:{ldap:$config_directory/ldap.cf, static:all@example.com}
smtpd_recipient_restrictions = permit_mynetworks, check_client_access cidr:$config_directory/clients,
    check_recipient_access {sqlite:$config_directory/access.cf}, reject
header_checks = pcre:$config_directory/headers
sender_dependent_relayhost_maps = memcache:$config_directory/mc.cf
default_transport = smtp
relayhost = [smtp.example.com]:587
smtp_tls_session_cache_database = btree:${data_directory}/smtp_scache
proxy_read_maps = $virtual_alias_maps
smtpd_milters = unix:/run/milter, inet:localhost:8891
virtual_transport = lmtp:unix:private/dovecot-lmtp
smtp_generic_maps = randmap:{a@example.com, b@example.com}
"""
FILES = {
    "main.cf": MAIN.replace("{sqlite:$config_directory/access.cf}", "sqlite:$config_directory/access.cf"),
    "master.cf": "smtp inet n - y - - smtpd\n",
    "mysql-aliases.cf": "hosts = 127.0.0.1\ndbname = mail\nquery = SELECT goto FROM alias\n  WHERE address = '%s'\n",
    "aliases.cf": "hosts = db.example.com unix:/run/postgresql\nuser = u\npassword = pass#word\ndbname = mail\n"
    "table = alias\nselect_field = goto\nwhere_field = address\nadditional_conditions = AND active = 1\n",
    "access.cf": "dbpath = users.sqlite\nselect_field = a\ntable = t\nwhere_field = k\n",
    "ldap.cf": "server_host = ldap.example.com\nserver_port = 1389\nsearch_base = dc=example,dc=com\nversion = 3\n"
    "bind = no\nbind_dn = cn=unused\nstart_tls = yes\n",
    "mc.cf": "memcache = inet:localhost:11211\nkey_format = relay:%s\ntimeout = 3\n",
    "virtual": "info@example.com staff@example.net\n",
    "transport": "example.com smtp:\n",
    "transport.regexp": "/x/ smtp:\n",
    "relay": "example.net x\n",
    "clients": "192.0.2.0/24 REJECT\n",
    "headers": "/^x/ IGNORE\n",
}


@pytest.fixture
def postfix_directory(installation: Installation) -> Path:
    """A configuration directory with a map of each type."""
    directory = installation.directory / "postfix"
    directory.mkdir()
    for name, text in FILES.items():
        (directory / name).write_text(text)
    with contextlib.closing(sqlite3.connect(directory / "users.sqlite")) as database, database:
        database.execute("CREATE TABLE t (k, a)")
    for kind, name in {"cdb": "transport", "lmdb": "relay"}.items():
        require_types(kind)
        subprocess.run([program("postmap", "postfix"), f"{kind}:{directory / name}"], check=True)
    return directory


def test_the_maps_of_main_cf_are_right_to_check(installation: Installation, postfix_directory: Path) -> None:
    result = convert(*sorted(postfix_directory.glob("*.cf")))
    assert (result.returncode, result.stderr) == (os.EX_OK, "")
    installation.configure(maps=result.stdout.replace('"users.sqlite"', f'"{postfix_directory}/users.sqlite"'))
    installation.config.chmod(0o600)  # there are passwords in it
    check = installation.run("check", "--no-connect")  # there is none of the servers
    assert (check.returncode, check.stderr) == (os.EX_OK, "")


def test_the_maps_of_main_cf_do_what_postfix_did_around_its_tables(postfix_directory: Path) -> None:
    found = maps(postfix_directory / "main.cf")
    address = {"search": "address", "recipient_delimiter": "+", "local_domains": ["localhost", "example.org"]}
    aliases = {
        "type": "postgresql",
        "hosts": ["db.example.com", "unix:/run/postgresql"],
        "user": "u",
        "password": "pass#word",
        "dbname": "mail",
        "query": "SELECT goto FROM alias WHERE address='%s' AND active = 1",
        **address,
    }
    canonical = {"propagate_extension": True, **address}
    assert found == {
        "mysql-aliases": {
            "type": "mysql",
            "hosts": ["127.0.0.1"],
            "dbname": "mail",
            "query": "SELECT goto FROM alias WHERE address = '%s'",
            **canonical,
        },
        "aliases": {**aliases, "propagate_extension": True},
        "virtual": {"type": "file", "path": f"{postfix_directory}/virtual", **canonical},
        "aliases_2": aliases,
        "transport": {
            "type": "cdb",
            "path": f"{postfix_directory}/transport.cdb",
            "search": "transport",
            "recipient_delimiter": "+",
        },
        "transport_2": {"type": "regexp", "path": f"{postfix_directory}/transport.regexp"},
        "relay": {"type": "lmdb", "path": f"{postfix_directory}/relay.lmdb", "search": "domain"},
        "relay_domains": {"type": "static", "entries": {"a.test": "yes it is", "b.test": "2"}, "search": "domain"},
        "ldap": {
            "type": "ldap",
            "hosts": ["ldap.example.com:1389"],
            "search_base": "dc=example,dc=com",
            "version": 3,
            "start_tls": True,
            "tls_require_cert": False,
        },
        "canonical_maps_2": {"type": "randmap", "results": ["all@example.com"]},
        "canonical_maps": {"type": "unionmap", "maps": ["ldap", "canonical_maps_2"], **canonical},
        "clients": {"type": "cidr", "path": f"{postfix_directory}/clients"},
        "access": {
            "type": "sqlite",
            "dbpath": "users.sqlite",
            "query": "SELECT a FROM t WHERE k='%s'",
            "search": "access",
            "recipient_delimiter": "+",
        },
        "headers": {"type": "pcre", "path": f"{postfix_directory}/headers"},
        "mc": {
            "type": "memcache",
            "hosts": ["inet:localhost:11211"],
            "key_format": "relay:%s",
            "timeout": 3,
            **address,
        },
        "smtp_generic_maps": {"type": "randmap", "results": ["a@example.com", "b@example.com"]},
    }


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.cf", "dbpath = /x\nquery = SELECT 1\nqeury = x\n", "qeury: is no parameter of sqlite_table(5)"),
        ("a.cf", "dbpath = /x\n", "query: is missing"),
        ("a.cf", "dbpath = /x\nquery = %x\n", "query: '%x' is no part of a key"),
        ("a.cf", "dbpath = /x\nquery = SELECT 1\ndomain = hash:/etc/domains\n", "domain: names a lookup table"),
        ("a.cf", "dbpath = /x\nquery = SELECT 1\nexpansion_limit = few\n", "expansion_limit: 'few' is no whole"),
        ("mysql.cf", "hosts = localhost\nquery = SELECT 1\n", "hosts: localhost is a Unix socket to Postfix"),
        ("mysql.cf", "hosts = h\nquery = SELECT 1\noption_file = /x\n", "option_file: cannot be read: No such file"),
        ("mysql.cf", "hosts = h\nquery = SELECT 1\noption_group = x\n", "option_group: goes with option_file only"),
        ("mysql.cf", "hosts = h\nquery = SELECT 1\nrequire_result_set = maybe\n", "'maybe' is neither yes nor no"),
        ("a.cf", "search_base = dc=x\ndebuglevel = 3\n", "debuglevel: see query -v"),
        ("a.cf", "search_base = dc=x\nbind = krb\n", "bind: 'krb' is no way to log in"),
        ("a.cf", "memcache = inet:h:1\nbackup = btree:/x\n", "backup: ask both with a map of type chain"),
        ("a.cf", "hosts = h\nquery = SELECT 1\n", "may be of type mysql or pgsql; write mysql:"),
        ("a.cf", "hosts = h\nnonsense\n", "line 2: 'nonsense' is no parameter; expected: name = value"),
        ("a.cf", "mydomain = example.com\n", "is neither main.cf nor the file of a table"),
        ("main.cf", "alias_maps = hash:/etc/aliases\n", "alias_maps: hash:/etc/aliases: local(8) takes no answer"),
        ("main.cf", "alias_database = hash:a\nx = hash:a\n", "x: hash:a: the format of aliases(5) is not read here"),
        ("main.cf", "smtp_tls_policy_maps = cidr:a\n", "smtp_tls_policy_maps: parent domains, .example.com, are not"),
        ("main.cf", "relay_domains = tcp:localhost:1\n", "tcp:localhost:1: tcp tables have no counterpart"),
        ("main.cf", "relay_domains = mysql:none.cf\n", "No such file or directory"),
        ("main.cf", "relay_domains = hash:none\n", "hash:none: the file of which postmap(1) has made"),
        ("main.cf", "relay_domains = hash:$none/x\n", "relay_domains: 'hash:...' names $none"),
        ("main.cf", "a = $b\nb = $a\nrelay_domains = hash:$a\n", "whose value is not known here"),
        ("main.cf", "x = cidr:{{10.0.0.0/8 x}}\n", "x: 'cidr:...': write the rules to a file"),
        ("main.cf", "virtual_alias_maps = static:x\nx = inline:{x}\n", "'x' is no entry; expected: key = value"),
        ("main.cf", "x = unionmap:{static:x,hash:no}\n", "x: 'unionmap:...': hash:no in it could not be translated"),
        ("main.cf", "x = pipemap:y z = static:x\n", "x: pipemap:y: 'y' is not in braces"),
        ("main.cf", "virtual_alias_maps = inline:{x=y}\n", "mydestination is not set: local_domains has to be added"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_named(tmp_path: Path, name: str, text: str, problem: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    result = convert(path)
    assert result.returncode == os.EX_DATAERR
    assert result.stderr.startswith(f"prefork-socketmap: {path}: ")
    assert problem in result.stderr
    tomllib.loads(result.stdout)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = convert(tmp_path / "none.cf")
    assert result.returncode == os.EX_DATAERR
    assert result.stderr == f"prefork-socketmap: {tmp_path}/none.cf: No such file or directory\n"


def test_what_can_be_translated_is_printed_beside_what_cannot(tmp_path: Path) -> None:
    (tmp_path / "good.cf").write_text('dbpath = /x\nquery = SELECT "a\\b" -- ümlaut\n')
    (tmp_path / "bad.cf").write_text("nonsense\n")
    result = convert(tmp_path / "bad.cf", tmp_path / "good.cf")
    assert result.returncode == os.EX_DATAERR
    table = tomllib.loads(result.stdout)["maps"]["good"]
    assert table == {"type": "sqlite", "dbpath": "/x", "query": 'SELECT "a\\b" -- ümlaut'}
