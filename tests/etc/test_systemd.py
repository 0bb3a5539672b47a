"""The systemd units: as safe as promised, and true to the program."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from prefork_socketmap.daemon import cli
from tests.daemon.installation import TIMEOUT
from tests.integration.servers.process import program


class Unit(configparser.RawConfigParser):
    """A unit file: names keep their case, and may be there more than once."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, comment_prefixes=("#",), delimiters=("=",))
        self.read(path)

    def optionxform(self, optionstr: str) -> str:
        """Return a name as it is."""
        return optionstr


@pytest.fixture
def service(etc: Path) -> Unit:
    return Unit(etc / "systemd/prefork-socketmap.service")


def test_the_service_is_exposed_at_most_2_0(etc: Path) -> None:
    result = subprocess.run(
        [
            program("systemd-analyze", "systemd"), "security", "--offline=yes", "--no-pager", "--threshold=20",
            etc / "systemd/prefork-socketmap.service",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )  # fmt: skip
    assert "Overall exposure level for prefork-socketmap.service" in result.stdout, result.stderr
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "unit", ["prefork-socketmap.service", "prefork-socketmap.socket", "prefork-socketmap@.service"]
)
def test_systemd_understands_every_line(etc: Path, unit: str) -> None:
    command = [program("systemd-analyze", "systemd"), "verify", "--man=no", str(etc / "systemd" / unit)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    # It cannot be installed here, so of its program there is nothing to find.
    complaints = [line for line in result.stderr.splitlines() if "is not executable" not in line]
    assert [line for line in complaints if "prefork-socketmap" in line] == []


@pytest.mark.parametrize("key", ["ExecStart", "ExecReload"])
def test_the_commands_are_commands_of_the_program(service: Unit, key: str) -> None:
    path, *arguments = shlex.split(service["Service"][key])
    assert path == "/usr/bin/prefork-socketmap"
    assert cli.parser().parse_args(arguments).run


def test_the_server_stays_in_the_foreground_and_tells_when_it_is_ready(service: Unit) -> None:
    assert service["Service"]["Type"] == "notify"
    assert "--daemon" not in service["Service"]["ExecStart"]


def test_what_cannot_get_better_by_itself_is_not_restarted(service: Unit) -> None:
    assert service["Service"]["RestartPreventExitStatus"].split() == [
        str(code) for code in (os.EX_USAGE, os.EX_NOPERM, os.EX_CONFIG)
    ]


def test_the_service_comes_before_postfix_and_does_without_the_socket_unit(service: Unit) -> None:
    assert "postfix.service" in service["Unit"]["Before"]
    assert "Requires" not in service["Unit"]


def test_the_socket_unit_opens_the_default_endpoint_with_a_long_queue(etc: Path) -> None:
    unit = etc / "systemd/prefork-socketmap.socket"
    assert "ListenStream=127.0.0.1:27823\n" in unit.read_text()
    assert int(Unit(unit)["Socket"]["Backlog"]) == 4096


def test_the_template_is_the_service_but_for_the_name(etc: Path) -> None:
    """Of one file with settings of safety there must not be two versions."""
    text = (etc / "systemd/prefork-socketmap.service").read_text()
    template = (etc / "systemd/prefork-socketmap@.service").read_text()
    for ours, theirs in {
        "server\n": "server %i\n",
        "/prefork-socketmap.toml\n": "/%i.toml\n",
        "RuntimeDirectory=prefork-socketmap\n": "RuntimeDirectory=prefork-socketmap-%i\n",
        "/var/lib/prefork-socketmap.\n": "/var/lib/prefork-socketmap-%i.\n",
        "StateDirectory=prefork-socketmap\n": "StateDirectory=prefork-socketmap-%i\n",
        "/var/cache/prefork-socketmap.\n": "/var/cache/prefork-socketmap-%i.\n",
        "CacheDirectory=prefork-socketmap\n": "CacheDirectory=prefork-socketmap-%i\n",
    }.items():
        assert ours in text
        text = text.replace(ours, theirs)
    assert template.endswith(text)


def test_the_user_of_the_service_is_made_by_sysusers(etc: Path, service: Unit) -> None:
    user = service["Service"]["User"]
    assert re.search(rf"^u {user} ", (etc / "sysusers.d/prefork-socketmap.conf").read_text(), re.MULTILINE)


def test_the_place_of_the_socket_is_roots_and_lets_in_postfix_alone(etc: Path, service: Unit) -> None:
    (line,) = re.findall(r"^d .*$", (etc / "tmpfiles.d/prefork-socketmap.conf").read_text(), re.MULTILINE)
    _kind, path, mode, owner, group, *_rest = line.split()
    assert (mode, owner, group) == ("0750", "root", "postfix")
    # So it is systemd that makes the socket there.
    text = (etc / "systemd/prefork-socketmap.socket").read_text()
    assert f"ListenStream={path}/sock\n" in text
    assert f"SocketGroup={group}\n" in text
    assert "ReadWritePaths" not in service["Service"]
