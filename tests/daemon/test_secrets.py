"""Secrets: a canary, planted in every key that takes a string, is found in no error, log, title or file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import lmdb
import pytest

from prefork_socketmap import Config
from prefork_socketmap.client import LookupFailed
from prefork_socketmap.daemon import configfile, translate
from prefork_socketmap.daemon.convert import convert
from prefork_socketmap.maps import registry
from prefork_socketmap.maps.setting import declared
from prefork_socketmap.settings import SettingError, shown
from tests.daemon.installation import Installation

CANARY = "c4n4ry"
# What is a secret wherever it stands.
PLANTED = [
    f"redis://:{CANARY}@host",
    f"https://user:{CANARY}@host:99999/path",
    f"http://[::{CANARY}@host/%s",
    f"postgresql://user@host/db?password={CANARY}",
    f"postgresql://host/db?sslpassword={CANARY}",
    f"ldap://host/dc=test????!X-BINDPW={CANARY}",
    f"http://host/?token={CANARY}",
    f"https://hooks/{CANARY}",
    f"host=host password={CANARY}",
    f"user:{CANARY}@host",
    f"{CANARY}@host:0",
    f"password:{CANARY}",
    f"Bearer {CANARY}",
    f'SELECT "{CANARY}%s"',
    f"AUTH {CANARY}%z",
]
SHAPES: list[Callable[[str], object]] = [lambda text: text, lambda text: [text], lambda text: {"key": text}]
NO_MAP: dict[str, object] = {"type": "static", "entries": {}}
DEAD = "127.0.0.1:1"
TABLES: dict[str, dict[str, object]] = {
    "cdb": {"path": "cdb"},
    "chain": {"maps": ["other"]},
    "cidr": {"path": "cidr"},
    "file": {"path": "table"},
    "http": {"url": f"http://{DEAD}/%s"},
    "ldap": {"hosts": [DEAD], "search_base": "dc=test"},
    "lmdb": {"path": "lmdb"},
    "memcache": {"hosts": [DEAD]},
    "mysql": {"hosts": [DEAD], "query": "SELECT '%s'"},
    "pcre": {"path": "patterns"},
    "pipemap": {"maps": ["other"]},
    "postgresql": {"hosts": [DEAD], "query": "SELECT '%s'"},
    "python": {"path": ["."], "function": "code_of_a_map:f"},
    "randmap": {"results": ["value"]},
    "redis": {"hosts": [DEAD], "query": "GET %s"},
    "regexp": {"path": "patterns"},
    "sqlite": {"dbpath": "database", "query": "SELECT '%s'"},
    "srs": {"direction": "reverse", "secret_file": "secrets"},
    "static": {"entries": {"key": "value"}},
    "unionmap": {"maps": ["other"]},
}
# Those that read a file, and could tell what stands there.
OF_FILES = ("cdb", "cidr", "file", "lmdb", "pcre", "regexp")
# Around a secret, what is a mistake in a query.
AROUND_IN_QUERIES = [
    ('SELECT "', '%s"'),
    ("SELECT 'x' '", "%s'"),
    ("SELECT x'", "%s'"),
    (r"SELECT E'\x41 ", "%s'"),
    ("SELECT '", "%s"),
    ("SELECT @`", "%s`"),
    ("SELECT '", "%x'"),
    ("SELECT $", "$ %s"),
    ("SELECT 'password ", "'%s"),
]
# And in the line of a file. The key, or the pattern, may be shown.
AROUND_IN_FILES = [
    ("password ", ""),
    ("key '", ""),
    ("/x/ ", "$"),
    ("/x/ ", "$9"),
    ("/(/ ", ""),
    ("/x/? ", ""),
    ("/x ", ""),
    ("if /x/ ", ""),
    ("endif ", ""),
    ("10.0.0.1/8 ", ""),
    ("10.0.0.0/33 ", ""),
    ("[::1 ", ""),
    (" ", " x"),
    ("key ", "\0"),
]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the files that the tables name."""
    (tmp_path / "table").write_text("key value\n")
    (tmp_path / "database").touch()
    (tmp_path / "secrets").write_text(f"{CANARY}\n")
    (tmp_path / "secrets").chmod(0o600)
    (tmp_path / "cidr").write_text("10.0.0.0/8 value\n")
    (tmp_path / "patterns").write_text("/x/ value\n")
    (tmp_path / "cdb").write_bytes(struct.pack("<512L", *(2048, 0) * 256))
    lmdb.open(str(tmp_path / "lmdb"), subdir=False).close()
    (tmp_path / "code_of_a_map.py").write_text("def f(key): return 'x'\n")
    (tmp_path / "index").mkdir(mode=0o700)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield tmp_path
    sys.modules.pop("code_of_a_map", None)


def told(kind: str, table: dict[str, object], base: Path) -> str:
    """Build, open and ask a map; return the traceback of what goes wrong, if anything does."""
    tables: dict[str, dict[str, object]] = {"m": {"type": kind, **table}, "other": {"type": "static", "entries": {}}}
    try:
        found = registry.build(tables, base)["m"]
        try:
            found.open()
            found.lookup("user@example.com")
        finally:
            found.close()
    except Exception:  # noqa: BLE001 - whatever the map's library raises
        return traceback.format_exc()
    return ""


@pytest.mark.parametrize("kind", sorted(registry._BUILT_IN))
def test_no_key_of_a_map_tells_a_secret(kind: str, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    owner = registry._load("type", kind)
    for key in [name for name, _ in declared(owner)]:
        if (kind, key) == ("sqlite", "query"):
            continue  # whatever is no template of ours is SQL, and SQLite's words about a wrong one quote it
        for shape in SHAPES:
            for text in PLANTED:
                caplog.clear()
                error = told(kind, {**TABLES[kind], key: shape(text)}, base)
                assert CANARY not in error + caplog.text, f"{key} = {shape(text)!r}"


@pytest.mark.parametrize("kind", sorted(registry._BUILT_IN))
def test_a_secret_of_a_map_is_never_told_in_whatever_key_of_it(
    kind: str, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    owner = registry._load("type", kind)
    keys = {
        f"{secret}{how}" for secret in ("password", "bind_pw", "token", "secret") for how in ("", "_file", "_env")
    }
    for key in (keys | {"headers"}) & {name for name, _ in declared(owner)}:
        for planted in (CANARY, [CANARY], {"Key": CANARY}, {"Key": [CANARY]}, {"Key": f"{CANARY}\n"}):
            error = told(kind, {**TABLES[kind], key: planted}, base)
            assert CANARY not in error + caplog.text, f"{key} = {planted!r}"


@pytest.mark.parametrize(
    "database",
    [
        *({"dbpath": text} for text in PLANTED),
        *({"type": kind, **TABLES[kind], "query": text} for kind in ("redis", "mysql") for text in PLANTED),
        *({"type": "postgresql", "hosts": [text]} for text in PLANTED),
        *({"type": "mysql", "hosts": [DEAD], "password": each} for each in ([CANARY], {"Key": CANARY})),
        {"type": "redis", "hosts": [DEAD], "password_file": CANARY},
        {"type": "redis", "hosts": [DEAD], "password_env": CANARY},
        {"type": "redis", "hosts": [DEAD], "password": CANARY},
    ],
)
def test_no_key_of_a_database_of_envelopes_tells_a_secret(
    database: dict[str, object], base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = {"direction": "forward", "domain": "fwd.example", "secret_file": "secrets"}
    error = told("srs", {**table, "original_envelope": "database", "envelope_database": database}, base)
    assert CANARY not in error + caplog.text


def test_a_secret_that_signs_addresses_is_not_told_in_an_error_or_at_debug(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    for direction in ("forward", "reverse"):
        table: dict[str, object] = {"direction": direction, "domain": "fwd.example", "secret_file": "secrets"}
        for mode in (0o600, 0o644):
            (base / "secrets").chmod(mode)
            error = told("srs", table, base)
            assert bool(error) == (mode == 0o644)
            assert CANARY not in error + caplog.text
    assert "secret 1 of 1" in caplog.text


@pytest.mark.parametrize("kind", OF_FILES)
def test_a_map_of_a_file_that_is_right_has_no_error_that_could_tell_anything(kind: str, base: Path) -> None:
    assert told(kind, TABLES[kind], base) == ""


@pytest.mark.parametrize("kind", ["mysql", "postgresql"])
@pytest.mark.parametrize(("before", "after"), AROUND_IN_QUERIES)
def test_a_query_that_is_refused_tells_no_secret(kind: str, before: str, after: str, base: Path) -> None:
    assert CANARY not in told(kind, {**TABLES[kind], "query": f"{before}{CANARY}{after}"}, base)


@pytest.mark.parametrize("kind", OF_FILES)
def test_no_line_of_a_file_tells_a_secret(kind: str, base: Path) -> None:
    for line in (*PLANTED, *(f"{before}{CANARY}{after}" for before, after in AROUND_IN_FILES)):
        (base / "lines").write_text(f"{line}\n")
        error = told(kind, {"path": "lines"}, base)
        assert CANARY not in error, line


def complaints(file: Path, capsys: pytest.CaptureFixture[str], kind: str = "") -> str:
    """Translate *file*; return what the command convert complains of."""
    convert(argparse.Namespace(files=[f"{kind}{file}"]))
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", ["", *(f"{kind}:" for kind in translate.KINDS)])
def test_no_parameter_of_a_table_is_told_in_a_complaint(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {"hosts", "password", *(name for each in translate._READ.values() for name in each)}
    parameters |= {name for each in translate.REWRITTEN.values() for name in each}
    for text in PLANTED:
        (tmp_path / "a.cf").write_text("".join(f"{name} = {text}\n" for name in parameters))
        told = complaints(tmp_path / "a.cf", capsys, kind)
        assert told
        assert CANARY not in told, text
        (tmp_path / "a.cf").write_text(f"{text}\n")
        assert CANARY not in complaints(tmp_path / "a.cf", capsys, kind), text


def test_no_table_of_main_cf_tells_a_secret_in_a_complaint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in (text for text in PLANTED if " " not in text):  # else it is several tables, each of them a word
        (tmp_path / "main.cf").write_text(
            f"""virtual_alias_maps = inline:{{{text}}} randmap:{text} hash:{text} regexp:{{{text}}} mysql:{text}
virtual_mailbox_maps = unionmap:{{ static:x, {text} }}
mydestination = $none {text}
transport_maps = hash:$none {text}
relay_domains = pipemap:{text}
"""
        )
        told = complaints(tmp_path / "main.cf", capsys)
        assert told.count("\n") > 5
        assert CANARY not in told, text


def _with(key: str, value: str) -> str:
    if key.startswith("log."):
        return f'[log]\n{key.removeprefix("log.")} = {value}\n[maps.m]\ntype = "static"\nentries = {{}}\n'
    if key.startswith("listen."):
        listen = {"endpoint": '"unix:sock"', key.removeprefix("listen."): value}
        value = "[{ " + ", ".join(f"{name} = {each}" for name, each in listen.items()) + " }]"
        key = "listen"
    return f'{key} = {value}\n[maps.n]\ntype = "static"\nentries = {{}}\n'


@pytest.mark.parametrize(
    "key",
    [
        *configfile._KEYS,
        *(field.name for field in dataclasses.fields(Config)),
        *(f"listen.{key}" for key in configfile._LISTEN_KEYS),
        *(f"log.{field.name}" for field in dataclasses.fields(configfile.LogSettings)),
        "maps.m",
        "maps.m.type",
    ],
)
def test_no_key_of_the_file_tells_a_secret(key: str, tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    for text in PLANTED:
        planted = json.dumps(text)
        for value in (planted, f"[{planted}]", f"[{planted}, {planted}]", f"{{ key = {planted} }}"):
            file.write_text(_with(key, value))
            try:
                loaded = configfile.load(file)
                registry.build({**loaded.maps, "default": loaded.default_map or NO_MAP}, tmp_path)
            except SettingError:
                assert CANARY not in traceback.format_exc(), file.read_text()
            else:
                assert key in ("pid_file", "runtime_dir"), file.read_text()


REFUSED = [
    f'type = "redis"\nhosts = ["redis://:{CANARY}@h"]\nquery = "GET %s"\n',
    f'type = "redis"\nhosts = "redis://:{CANARY}@h"\nquery = "GET %s"\n',
    f'type = "http"\nurl = "https://user:{CANARY}@host/%s"\n',
    f'type = "ldap"\nhosts = ["ldap://h/dc=x????!X-BINDPW={CANARY}"]\nsearch_base = "dc=x"\n',
    f'type = "postgresql"\nhosts = ["postgresql://u:{CANARY}@h/db"]\nquery = "SELECT 1"\n',
    f'type = "mysql"\nhosts = ["h"]\npassword_file = "{CANARY}"\nquery = "SELECT 1"\n',
    f'type = "mysql"\nhosts = ["h"]\npassword_env = "{CANARY}"\nquery = "SELECT 1"\n',
    f'type = "srs"\ndirection = "reverse"\nsecret_file = "{CANARY}"\n',
]


def everything_told(installation: Installation) -> str:
    """Return what the server shows to everybody: its log, its files, the status, the titles of its processes."""
    shown = installation.log.read_text()
    for path in installation.runtime_dir.iterdir():
        shown += path.read_bytes().decode(errors="replace")
    for arguments in ([], ["--json"], ["--prometheus"]):
        shown += installation.run("status", *arguments).stdout
    for pid in (installation.pid, *installation.workers()):
        shown += Path(f"/proc/{pid}/cmdline").read_text()
    return shown


def test_a_refused_secret_stands_in_no_output_log_title_or_file(installation: Installation) -> None:
    installation.start("--verbose")
    for number, table in enumerate(REFUSED, 1):
        installation.configure(maps=f"[maps.m]\n{table}")
        for command in ("check", "reload"):
            result = installation.run(command)
            assert result.returncode != 0
            assert "maps.m." in result.stderr
            assert CANARY not in result.stdout + result.stderr
        assert installation.state()["reload"]["problem"]
        installation.logged("reload refused")
        assert CANARY not in everything_told(installation), number


def test_a_secret_in_use_stands_in_no_log_title_or_file(installation: Installation) -> None:
    installation.configure(
        maps=f"""
[maps.redis]
type = "redis"
hosts = ["{DEAD}"]
password = "{CANARY}"
query = "GET %s"
[maps.ldap]
type = "ldap"
hosts = ["{DEAD}"]
bind_dn = "cn=x"
bind_pw = "{CANARY}"
search_base = "dc=x"
[maps.mysql]
type = "mysql"
hosts = ["{DEAD}"]
password = "{CANARY}"
query = "SELECT 1"
[maps.postgresql]
type = "postgresql"
hosts = ["{DEAD}"]
password = "{CANARY}"
query = "SELECT 1"
[maps.http]
type = "http"
url = "http://{DEAD}/?key={CANARY}&q=%s"
token = "{CANARY}"
headers = {{ Key = "{CANARY}" }}
"""
    )
    installation.start("--verbose")
    for name in ("redis", "ldap", "mysql", "postgresql", "http"):
        with suppress(LookupFailed):
            installation.lookup(name, "key")
        installation.logged(f"map {name}: cannot connect")
    assert CANARY not in everything_told(installation)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (-1, "-1"),
        (1.5, "1.5"),
        (True, "True"),
        (None, "None"),
        ("", "''"),
        ("statik", "'statik'"),
        ("/var/log/x", "'/var/log/x'"),
        ("/etc/" + "x" * 100, "'/etc/" + "x" * 100 + "'"),
        ("host:65536", "'host:65536'"),
        ("[::1]:25", "'[::1]:25'"),
        ("10.0.0.1/8", "'10.0.0.1/8'"),
        ("10 s", "'10 s'"),
        ("1h30m", "'1h30m'"),
        ("%x", "'%x'"),
        ("http://host/", "'http://host/'"),
        ("ftp://host:21/path?query", "'ftp://host:21/...'"),
        ("two words", "'two...'"),
        ("x" * 41, "'xxxxxxxxxx...'"),
        (["a", 1], "['a', 1]"),
        (list("abcd"), "['a', 'b', 'c', ...]"),
        ({"a": 1}, "a table"),
        (2**100, "a very large number"),
    ],
)
def test_a_wrong_number_or_word_is_shown_as_it_is(value: object, expected: str) -> None:
    assert shown(value) == expected
