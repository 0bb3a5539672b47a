"""The command ``check``: what a worker would stumble over is told before one does."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from prefork_socketmap.maps import registry
from prefork_socketmap.settings import SettingError
from tests.daemon.installation import COMMAND, TIMEOUT, Installation
from tests.integration.servers.httpd import Httpd
from tests.integration.servers.mariadb import DATABASE, Mariadb
from tests.integration.servers.mariadb import PASSWORD as MARIADB_PASSWORD
from tests.integration.servers.postgresql import PASSWORD, Postgresql
from tests.integration.servers.process import free_port
from tests.integration.servers.redis import PASSWORD as REDIS_PASSWORD
from tests.integration.servers.redis import Redis
from tests.integration.servers.slapd import PASSWORD as LDAP_PASSWORD
from tests.integration.servers.slapd import READER, SUFFIX, Slapd

POSTGRESQL = """\
[maps.m]
type = "postgresql"
hosts = ["127.0.0.1:{port}"]
user = "postfix"
password = {password}
dbname = "mail"
query = "SELECT {column} FROM alias WHERE address = '%s'"
"""


def test_a_query_that_the_server_does_not_take_is_told_in_its_words(
    installation: Installation, postgresql: Postgresql
) -> None:
    installation.config.chmod(0o600)  # there is a password in it

    def check(column: str) -> subprocess.CompletedProcess[str]:
        password = json.dumps(PASSWORD)
        installation.configure(maps=POSTGRESQL.format(port=postgresql.port, password=password, column=column))
        return installation.run("check")

    assert check("goto").returncode == 0
    result = check("missing")
    assert result.returncode == os.EX_CONFIG
    problem = 'maps.m.query: column "missing" does not exist'
    assert result.stderr == f"prefork-socketmap: {installation.config}: {problem}\n"


def test_a_file_that_is_right_is_right(installation: Installation) -> None:
    result = installation.run("check")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("maps", "problem"),
    [
        ('[maps.m]\ntype = "statik"\n', "maps.m.type: 'statik' is not accepted here; expected one of"),
        ('[maps.m]\nentries = { k = "v" }\n', "maps.m.type: is missing"),
        ('[maps.m]\ntype = "static"\nentrys = { k = "v" }\n', 'maps.m.entrys: unknown key; did you mean "entries"?'),
        ('[maps.m]\ntype = "python"\nfunction = "none.such:f"\n', "maps.m.function:"),
        ('[maps.m]\ntype = "sqlite"\ndbpath = "none.sqlite"\nquery = "SELECT 1"\n', "maps.m.dbpath: cannot open"),
        (
            '[maps.m]\ntype = "chain"\nmaps = []\n',
            "maps.m.maps: [] is not accepted here; expected a list of at least",
        ),
        (
            '[maps.m]\ntype = "python"\nfunction = "m:f"\npath = ["none"]\n',
            "maps.m.path: 'none': No such file or directory",
        ),
        (
            '[maps.m]\ntype = "ldap"\nhosts = ["127.0.0.1"]\nsearch_base = "dc=x"\nquery_filter = "(mail=%s"\n',
            "maps.m.query_filter: ",
        ),
        (
            '[maps.m]\ntype = "postgresql"\nhosts = ["127.0.0.1"]\nsslmode = "yes"\nquery = "SELECT \'%s\'"\n',
            "maps.m.sslmode: 'yes' is not accepted here",
        ),
        (
            'lookup_timeout = 5\n[maps.m]\ntype = "redis"\nhosts = ["127.0.0.1"]\nquery = "GET %s"\ntimeout = 6\n',
            "maps.m.timeout: 6 is not accepted here; expected at most lookup_timeout, which is 5 s",
        ),
        ('[default_map]\ntype = "statik"\n', "default_map.type: 'statik' is not accepted here"),
    ],
)
def test_a_map_that_cannot_be_opened_is_told_with_file_and_key(
    installation: Installation, maps: str, problem: str
) -> None:
    installation.configure(maps=maps)
    result = installation.run("check")
    assert result.returncode == os.EX_CONFIG
    begin = f"prefork-socketmap: {installation.config}: {problem}"
    assert result.stderr.startswith(begin)
    start = installation.run("serve")
    assert start.returncode == os.EX_CONFIG
    assert begin in start.stderr


PYTHON = '[maps.m]\ntype = "python"\npath = ["."]\nfunction = "code_of_map:f"\nsetup = "code_of_map:prepare"\n'
HELPER = "def divide(): return 1 / 0\n"


@pytest.mark.parametrize(
    ("code", "key", "problem"),
    [
        ("\n1 / 0\n", "function", "ZeroDivisionError: division by zero ({file}, line 2)"),
        ("def f(key) pass\n", "function", "SyntaxError: expected ':' ({file}, line 1)"),
        ("\n\nimport no_such_module\n", "function", "No module named 'no_such_module' ({file}, line 3)"),
        ("import json\n\njson.loads('{')\n", "function", "({file}, line 3)"),
        ("def prepare(): pass\n", "function", "has no attribute 'f'"),
        ("def f(key): pass\n", "setup", "has no attribute 'prepare'"),
        (
            "def f(key): pass\ndef prepare():\n    1 / 0\n",
            "setup",
            "ZeroDivisionError: division by zero ({file}, line 3)",
        ),
        ("def f(key): pass\ndef prepare(): raise SystemExit(1)\n", "setup", "SystemExit: 1 ({file}, line 2)"),
        (
            "import helper\ndef f(key): pass\ndef prepare():\n    helper.divide()\n",
            "setup",
            "division by zero ({helper}, line 1)",
        ),
    ],
)
@pytest.mark.parametrize("command", ["check", "serve", "reload"])
def test_code_that_fails_is_told_with_map_file_and_line(
    installation: Installation, code: str, key: str, problem: str, command: str
) -> None:
    if command == "reload":
        installation.start()
    file, helper = installation.directory / "code_of_map.py", installation.directory / "helper.py"
    helper.write_text(HELPER)
    file.write_text(code)
    installation.configure(maps=PYTHON)
    result = installation.run(command)
    assert result.returncode != 0
    assert f"{installation.config}: maps.m.{key}: " in result.stderr
    assert problem.format(file=file, helper=helper) in result.stderr


def test_code_that_kills_its_process_is_told(installation: Installation) -> None:
    (installation.directory / "deadly.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    installation.configure(maps='[maps.m]\ntype = "python"\npath = ["."]\nfunction = "deadly:f"\n')
    result = installation.run("check")
    assert result.returncode == os.EX_CONFIG
    assert "opening the maps ended with signal 11" in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
def test_maps_are_opened_as_the_workers_user(installation: Installation) -> None:
    secret = installation.directory / "secret.sqlite"
    secret.touch(mode=0o600)
    maps = '[maps.m]\ntype = "python"\npath = ["."]\nfunction = "reads:f"\n'
    (installation.directory / "reads.py").write_text(f"open({str(secret)!r})\ndef f(key): pass\n")
    installation.configure(maps=maps)
    assert installation.run("check").returncode == 0
    installation.configure('user = "nobody"', maps=maps)
    result = installation.run("check")
    assert result.returncode == os.EX_CONFIG
    assert f"Permission denied: '{secret}'" in result.stderr


# Databases in files.

SQLITE = """\
[maps.m]
type = "sqlite"
dbpath = "db.sqlite"
query = "{query}"
"""


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("SELECT goto FROM alias WHERE address = '%s' AND", "maps.m.query: incomplete input"),
        ("SELECT goto FROM missing WHERE address = '%s'", "maps.m.query: no such table: missing"),
        ("SELECT missing FROM alias WHERE address = '%s'", "maps.m.query: no such column: missing"),
        ("SELECT 1; SELECT goto FROM alias WHERE address = '%s'", "maps.m.query: You can only execute one statement"),
    ],
)
def test_an_sqlite_query_is_prepared(installation: Installation, query: str, problem: str) -> None:
    with contextlib.closing(sqlite3.connect(installation.directory / "db.sqlite")) as database:
        database.execute("CREATE TABLE alias (address, goto)")
    installation.configure(maps=SQLITE.format(query=query))
    expect_the_same_from_check_start_and_reload(installation, problem)


def test_a_file_that_is_no_database_is_the_fault_of_its_path(installation: Installation) -> None:
    (installation.directory / "db.sqlite").write_text("x" * 4096)
    installation.configure(maps=SQLITE.format(query="SELECT goto FROM alias WHERE address = '%s'"))
    expect_the_same_from_check_start_and_reload(installation, "maps.m.dbpath: file is not a database")


def expect_the_same_from_check_start_and_reload(installation: Installation, problem: str) -> None:
    """Expect that the installation's file is refused with *problem* by all three."""
    problem = f"{installation.config}: {problem}"
    check, start = installation.run("check"), installation.run("serve")
    assert check.returncode == start.returncode == os.EX_CONFIG
    assert check.stderr.startswith(f"prefork-socketmap: {problem}")
    assert problem in start.stderr
    wrong = installation.config.read_text()
    installation.configure()
    installation.start()
    installation.config.write_text(wrong)
    reload = installation.run("reload")
    assert reload.returncode == 1
    assert problem in reload.stderr
    assert installation.lookup() == "blue"


# Servers.

MYSQL = """\
[maps.m]
type = "mysql"
hosts = ["127.0.0.1:{port}"]
user = "postfix"
password = {password}
dbname = "{dbname}"
query = "SELECT {column} FROM alias WHERE address = '%s'"
"""
REDIS = """\
[maps.m]
type = "redis"
hosts = ["127.0.0.1:{port}"]
password = {password}
query = "GET %s"
"""
LDAP = """\
[maps.m]
type = "ldap"
hosts = ["127.0.0.1:{port}"]
bind_dn = "{dn}"
bind_pw = {password}
search_base = "{base}"
"""
HTTPS = """\
[maps.m]
type = "http"
url = "https://127.0.0.1:{port}/%s"
"""


def expect_of_a_server(installation: Installation, maps: str, problem: str, code: int = os.EX_CONFIG) -> None:
    """Expect that *maps* are refused with *problem* by ``check``, a reload and an upgrade, and that a start tells it.

    With another *code*, that of a server that is down, a reload or an upgrade tells as well, and takes effect.
    """
    installation.config.write_text("")
    installation.config.chmod(0o600)
    problem = f"{installation.config}: {problem}"
    installation.configure(maps=maps)
    result = installation.run("check")
    assert result.returncode == code, result.stderr
    assert f"prefork-socketmap: {problem}" in result.stderr
    assert installation.run("check", "--no-connect").returncode == 0
    colours = '[maps.colours]\ntype = "static"\nentries = { sky = "blue" }\n'
    installation.configure(maps=colours + maps)
    installation.start()
    installation.logged(problem)
    assert installation.lookup() == "blue"
    for command in ("reload", "upgrade"):
        result = installation.run(command)
        assert (result.returncode, problem in result.stderr) == ((1, True) if code == os.EX_CONFIG else (0, False))
        assert installation.lookup() == "blue"


def test_a_wrong_password_of_postgresql(installation: Installation, postgresql: Postgresql) -> None:
    maps = POSTGRESQL.format(port=postgresql.port, password='"wrong"', column="goto")
    expect_of_a_server(installation, maps, f"maps.m.password: 127.0.0.1:{postgresql.port}: ")


def test_a_wrong_database_of_postgresql(installation: Installation, postgresql: Postgresql) -> None:
    maps = POSTGRESQL.format(port=postgresql.port, password=json.dumps(PASSWORD), column="goto")
    problem = f"maps.m.dbname: 127.0.0.1:{postgresql.port}: "
    expect_of_a_server(installation, maps.replace('"mail"', '"none"'), problem)


def test_a_wrong_query_of_postgresql(installation: Installation, postgresql: Postgresql) -> None:
    maps = POSTGRESQL.format(port=postgresql.port, password=json.dumps(PASSWORD), column="missing")
    expect_of_a_server(installation, maps, 'maps.m.query: column "missing" does not exist')


def test_a_database_that_is_down(installation: Installation) -> None:
    port = free_port()
    maps = POSTGRESQL.format(port=port, password='"x"', column="goto")
    expect_of_a_server(installation, maps, f"maps.m.hosts: cannot connect: 127.0.0.1:{port}: ", os.EX_UNAVAILABLE)


def test_one_of_two_hosts_that_is_down_is_a_warning(installation: Installation, postgresql: Postgresql) -> None:
    down = free_port()
    maps = POSTGRESQL.format(port=postgresql.port, password=json.dumps(PASSWORD), column="goto")
    installation.config.chmod(0o600)
    installation.configure(maps=maps.replace("hosts = [", f'hosts = ["127.0.0.1:{down}", '))
    result = installation.run("check")
    assert result.returncode == 0
    assert f"warning: map m: cannot connect: 127.0.0.1:{down}: " in result.stderr


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"password": '"wrong"'}, "maps.m.password: "),
        ({"dbname": "none"}, "maps.m.dbname: "),
        ({"column": "missing"}, "maps.m.query: Unknown column 'missing'"),
    ],
)
def test_what_a_mariadb_does_not_take(
    installation: Installation, mariadb: Mariadb, change: dict[str, str], problem: str
) -> None:
    mariadb.execute("CREATE OR REPLACE TABLE alias (address varchar(99), goto varchar(99))")
    right = {"password": json.dumps(MARIADB_PASSWORD), "dbname": DATABASE, "column": "goto"}
    expect_of_a_server(installation, MYSQL.format(port=mariadb.port, **right | change), problem)


def test_a_mariadb_that_takes_all_is_right(installation: Installation, mariadb: Mariadb) -> None:
    mariadb.execute("CREATE OR REPLACE TABLE alias (address varchar(99), goto varchar(99))")
    installation.config.chmod(0o600)
    right = {"password": json.dumps(MARIADB_PASSWORD), "dbname": DATABASE, "column": "goto"}
    installation.configure(maps=MYSQL.format(port=mariadb.port, **right))
    assert installation.run("check").returncode == 0


def test_a_wrong_password_of_redis(installation: Installation, redis_server: Redis) -> None:
    maps = REDIS.format(port=redis_server.port, password=json.dumps("wrong"))
    expect_of_a_server(installation, maps, f"maps.m.password: 127.0.0.1:{redis_server.port}: ")


def test_a_redis_that_answers_is_right_and_one_that_is_down_is_not(
    installation: Installation, redis_server: Redis
) -> None:
    installation.config.chmod(0o600)
    installation.configure(maps=REDIS.format(port=redis_server.port, password=json.dumps(REDIS_PASSWORD)))
    assert installation.run("check").returncode == 0
    installation.configure(maps=REDIS.format(port=free_port(), password=json.dumps(REDIS_PASSWORD)))
    assert installation.run("check").returncode == os.EX_UNAVAILABLE


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"password": '"wrong"'}, "maps.m.bind_pw: "),
        ({"base": f"ou=none,{SUFFIX}"}, f"maps.m.search_base: the server has no 'ou=none,{SUFFIX}'"),
    ],
)
def test_what_an_ldap_server_does_not_take(
    installation: Installation, slapd: Slapd, change: dict[str, str], problem: str
) -> None:
    right = {"password": json.dumps(LDAP_PASSWORD), "dn": READER, "base": SUFFIX}
    expect_of_a_server(installation, LDAP.format(port=slapd.port, **right | change), problem)


def test_an_ldap_server_that_takes_all_is_right(installation: Installation, slapd: Slapd) -> None:
    installation.config.chmod(0o600)
    right = {"password": json.dumps(LDAP_PASSWORD), "dn": READER, "base": SUFFIX}
    installation.configure(maps=LDAP.format(port=slapd.port, **right))
    result = installation.run("check")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_web_server_without_tls_and_one_that_is_down(installation: Installation, httpd: Httpd) -> None:
    installation.configure(maps=HTTPS.format(port=httpd.port))
    result = installation.run("check")
    assert result.returncode == os.EX_UNAVAILABLE
    assert f"{installation.config}: maps.m.url: cannot connect: 127.0.0.1:{httpd.port}: " in result.stderr
    installation.configure(maps=HTTPS.replace("https", "http").format(port=httpd.port))
    assert installation.run("check").returncode == 0


# Endpoints.


def test_a_port_in_use_is_told_with_its_key(installation: Installation) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        address = f"inet:127.0.0.1:{taken.getsockname()[1]}"
        installation.configure(listen=f'["{installation.endpoint}", "{address}"]')
        problem = f"{installation.config}: listen[1]: cannot listen on {address}: Address already in use"
        for command in ("check", "serve"):
            result = installation.run(command)
            assert result.returncode == os.EX_UNAVAILABLE
            assert f"prefork-socketmap: {problem}\n" in result.stderr


def test_what_the_running_server_of_the_file_holds_is_no_trouble_and_what_another_does_is(
    installation: Installation,
) -> None:
    unix = f"unix:{installation.directory}/sock"
    installation.configure(listen=f'["{installation.endpoint}", "{unix}"]')
    installation.start()
    result = installation.run("check")
    assert (result.returncode, result.stderr) == (0, "")
    copy = installation.directory / "copy.toml"
    copy.write_text(installation.config.read_text().replace('"run"', '"elsewhere"'))
    result = subprocess.run(
        [*COMMAND, "check", "-c", copy], capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    assert result.returncode == os.EX_UNAVAILABLE
    for index, endpoint in enumerate((installation.endpoint, unix)):
        assert f"{copy}: listen[{index}]: cannot listen on {endpoint}: " in result.stderr
    assert installation.lookup() == "blue"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("none/sock", "No such file or directory"),
        ("code_of_map.py", "the file exists and is not a socket"),
        ("prefork-socketmap.toml/sock", "Not a directory"),
    ],
)
def test_a_socket_that_cannot_be_made_is_told(installation: Installation, path: str, problem: str) -> None:
    (installation.directory / "code_of_map.py").touch()
    installation.configure(listen=f'["unix:{path}"]')
    result = installation.run("check")
    assert result.returncode == os.EX_UNAVAILABLE
    assert f"listen[0]: cannot listen on unix:{installation.directory}/{path}: {problem}" in result.stderr


def test_the_longest_path_of_a_socket_is_right_and_one_byte_more_is_not(installation: Installation) -> None:
    name = "x" * (107 - len(str(installation.directory)) - 1)
    installation.configure(listen=f'["unix:{name}"]')
    result = installation.run("check")
    assert (result.returncode, result.stderr) == (0, "")
    assert not [each for each in installation.directory.iterdir() if each.is_socket()]
    installation.configure(listen=f'["unix:{name}x"]')
    result = installation.run("check")
    assert result.returncode == os.EX_CONFIG
    assert "listen[0]: the path of a socket has at most 107 bytes" in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
def test_an_owner_that_the_user_may_not_give_is_told(installation: Installation) -> None:
    """As under the systemd unit, whose server is no root."""
    (installation.directory / "open").mkdir()
    (installation.directory / "open").chmod(0o777)
    installation.configure(listen='[{ endpoint = "unix:open/sock", group = "root" }]')
    assert installation.run("check").returncode == 0
    # All modules first: Python may be installed where only root can read it.
    program = (
        "import os, sys; from prefork_socketmap.daemon import check, cli, worker; from prefork_socketmap.maps import "
        "registry, static; cli.parser().parse_args(sys.argv[1:]);"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(cli.main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "check", "-c", str(installation.config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert result.returncode == os.EX_UNAVAILABLE
    assert (
        f"listen[0]: cannot listen on unix:{installation.directory}/open/sock: Operation not permitted"
        in result.stderr
    )
    assert not [*(installation.directory / "open").iterdir()]


def test_a_port_for_metrics_that_is_in_use_is_told(installation: Installation) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        installation.configure(f'[metrics]\nlisten = "127.0.0.1:{port}"\n')
        result = installation.run("check")
        assert result.returncode == os.EX_UNAVAILABLE
        assert f"{installation.config}: metrics.listen: cannot listen on inet:127.0.0.1:{port}: " in result.stderr
    assert installation.run("check").returncode == 0


# Probes.


def test_a_probe_asks(installation: Installation) -> None:
    result = installation.run("check", "--probe", "colours=sky", "--probe", "colours=mud")
    assert result.returncode == 0
    assert result.stdout == f"colours=sky: OK blue\ncolours=mud: NOTFOUND\n{installation.config}: OK\n"


def test_a_probe_that_fails_fails(installation: Installation) -> None:
    (installation.directory / "code_of_map.py").write_text("def f(key): raise ValueError('odd')\n")
    installation.configure(maps='[maps.m]\ntype = "python"\npath = ["."]\nfunction = "code_of_map:f"\n')
    result = installation.run("check", "--probe", "m=key")
    assert result.returncode == os.EX_TEMPFAIL
    assert "m=key: TEMP lookup failed" in result.stdout
    assert "ValueError: odd" in result.stderr
    assert "OK" not in result.stdout


@pytest.mark.parametrize("probe", ["colours", "none=key"])
def test_a_probe_of_nothing_is_told(installation: Installation, probe: str) -> None:
    result = installation.run("check", "--probe", probe)
    assert result.returncode == os.EX_CONFIG
    assert result.stderr.startswith("prefork-socketmap: --probe: ")


# What a worker's user cannot read.


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
def test_a_python_library_that_the_workers_user_cannot_read_is_named(
    installation: Installation, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    # The module would be there, and is nowhere else.
    installation.directory.chmod(0o755)
    (installation.directory / "sqlite3.py").write_text("raise ModuleNotFoundError('No module named sqlite3')\n")
    installation.configure('user = "nobody"', maps=SQLITE.format(query="SELECT '%s'"))
    result = installation.run("check", env={"PYTHONPATH": f"{installation.directory}:{closed}"})
    assert result.returncode == os.EX_CONFIG
    assert f"cannot read {closed}" in result.stderr
    assert "install prefork-socketmap" not in result.stderr


def test_a_part_of_python_s_own_library_that_is_missing_is_no_extra(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    monkeypatch.delitem(sys.modules, "prefork_socketmap.maps.sqlite", raising=False)
    with pytest.raises(SettingError, match="a part of Python's own library is not installed"):
        registry.build({"m": {"type": "sqlite", "dbpath": "x", "query": "SELECT '%s'"}})
