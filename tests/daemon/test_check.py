"""The command ``check``: what a worker would stumble over is told before one does."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.daemon.installation import Installation
from tests.integration.servers.postgresql import PASSWORD, Postgresql
from tests.integration.servers.process import free_port

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


def test_a_query_that_no_server_can_be_asked_about_is_a_warning(installation: Installation) -> None:
    installation.config.chmod(0o600)
    installation.configure(maps=POSTGRESQL.format(port=free_port(), password='"x"', column="goto"))
    result = installation.run("check")
    assert result.returncode == 0
    warning = f"prefork-socketmap: warning: {installation.config}: maps.m.query: cannot be checked: cannot connect:"
    assert result.stderr.startswith(warning)


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
        ('[default_map]\ntype = "statik"\n', "default_map.type: 'statik' is not accepted here"),
    ],
)
def test_a_map_that_cannot_be_opened_is_told_with_file_and_key(
    installation: Installation, maps: str, problem: str
) -> None:
    installation.configure(maps=maps)
    result = installation.run("check")
    assert result.returncode == os.EX_CONFIG
    assert result.stderr.startswith(f"prefork-socketmap: {installation.config}: {problem}")


def test_code_that_fails_when_it_is_imported_is_told(installation: Installation) -> None:
    (installation.directory / "broken.py").write_text("1 / 0\n")
    installation.configure(maps='[maps.m]\ntype = "python"\npath = ["."]\nfunction = "broken:f"\n')
    result = installation.run("check")
    assert result.returncode == os.EX_CONFIG
    assert "division by zero" in result.stderr


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
