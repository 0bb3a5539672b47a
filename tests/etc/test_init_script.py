"""The init script, run for real by the shell that runs it on Debian."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon.installation import TIMEOUT, Installation, impostor
from tests.integration.servers.process import program
from tests.processes import is_alive, process_status
from tests.serving import Client

PROGRAM = Path(sys.executable).with_name("prefork-socketmap")


class Script:
    """The script, with its paths led into an installation."""

    def __init__(self, etc: Path, installation: Installation, *, with_lsb: bool) -> None:
        text = (etc / "init.d/prefork-socketmap").read_text()
        if not with_lsb:
            assert "/lib/lsb/" in text
            text = text.replace("/lib/lsb/", "/nowhere/")
        self.defaults = installation.directory / "prefork-socketmap"
        text = text.replace("/etc/default", str(self.defaults.parent))
        self.defaults.write_text(f"DAEMON={PROGRAM}\nCONFIG={installation.config}\n")
        self._path = installation.directory / "init-script"
        self._path.write_text(text)
        self._path.chmod(0o755)
        self._shell = program("dash", "dash")

    def __call__(self, action: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run the script as an init system would: with hardly any environment."""
        return subprocess.run(
            [self._shell, self._path, action],
            user=user,
            cwd="/",
            env={"PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )


@pytest.fixture(params=[True, False], ids=["with lsb-base", "without lsb-base"])
def script(etc: Path, installation: Installation, request: pytest.FixtureRequest) -> Script:
    if request.param and not Path("/lib/lsb/init-functions").exists():
        pytest.skip("/lib/lsb/init-functions is missing: apt install lsb-base")
    return Script(etc, installation, with_lsb=request.param)


@pytest.fixture(params=["", "nobody"], ids=["as root", "as nobody"])
def user(installation: Installation, request: pytest.FixtureRequest) -> str:
    """The user whom the installation's workers run as; empty: whoever runs the tests."""
    name: str = request.param
    if name:
        if os.geteuid() != 0:
            pytest.skip("only root can change users: run the tests as root")
        installation.configure(f'user = "{name}"\n')
    return name


def test_a_whole_life(installation: Installation, script: Script, user: str) -> None:
    assert script("status").returncode == 3

    assert script("start").returncode == 0
    assert installation.lookup() == "blue"
    if user:
        uid = str(pwd.getpwnam(user).pw_uid)
        assert {process_status(worker)["Uid"][0] for worker in installation.idle_workers()} == {uid}
    first = installation.pid
    status = script("status")
    assert status.returncode == 0
    assert str(first) in status.stdout

    assert script("reload").returncode == 0
    assert installation.pid == first
    assert installation.state()["generation"] == 2
    assert script("force-reload").returncode == 0
    assert installation.state()["generation"] == 3

    with Client(installation.endpoint) as client:
        assert client.ask(b"colours sky") == b"OK blue"
        assert script("restart").returncode == 0
        assert installation.state()["generation"] == 4
        assert client.ask(b"colours sky") == b"OK blue"
        assert script("try-restart").returncode == 0
        assert installation.state()["generation"] == 5
        assert client.ask(b"colours sky") == b"OK blue"
    assert installation.pid == first

    assert script("stop").returncode == 0
    assert script("status").returncode == 3
    assert not installation.pid_file.exists()


def test_starting_twice_is_no_error_and_changes_nothing(installation: Installation, script: Script) -> None:
    assert script("start").returncode == 0
    pid = installation.pid
    assert script("start").returncode == 0
    assert installation.pid == pid


def test_stopping_twice_is_no_error(script: Script) -> None:
    assert script("start").returncode == 0
    assert script("stop").returncode == 0
    assert script("stop").returncode == 0


def test_a_start_with_a_broken_config_fails_and_says_why(installation: Installation, script: Script) -> None:
    installation.config.write_text("nonsense = 1\n")
    result = script("start")
    assert result.returncode == 6
    assert "nonsense: unknown key" in result.stderr
    assert "failed" in result.stdout
    assert script("status").returncode == 3


def test_a_restart_with_a_broken_config_leaves_the_server_alone(installation: Installation, script: Script) -> None:
    assert script("start").returncode == 0
    pid = installation.pid
    text = installation.config.read_text()
    installation.config.write_text(text + "\n[nonsense]\n")
    result = script("restart")
    assert result.returncode == 1
    assert "upgrade refused, the server goes on as it was" in result.stderr
    assert "nonsense: unknown key" in result.stderr
    assert installation.pid == pid
    assert installation.lookup() == "blue"
    assert script("stop").returncode == 0


def test_a_reload_with_a_broken_config_fails_and_says_why(installation: Installation, script: Script) -> None:
    assert script("start").returncode == 0
    installation.configure("nonsense = 1")
    result = script("reload")
    assert result.returncode == 1
    assert "nonsense: unknown key" in result.stderr
    assert installation.lookup() == "blue"


def test_without_a_server_restart_starts_one_and_try_restart_does_not(script: Script) -> None:
    assert script("try-restart").returncode == 0
    assert script("status").returncode == 3
    assert script("restart").returncode == 0
    assert script("status").returncode == 0


def test_without_a_server_reload_is_7_and_force_reload_starts_one(script: Script) -> None:
    assert script("reload").returncode == 7
    assert script("force-reload").returncode == 0
    assert script("status").returncode == 0


def test_a_server_that_was_killed_is_dead_and_can_be_started(installation: Installation, script: Script) -> None:
    assert script("start").returncode == 0
    os.kill(installation.pid, 9)
    assert script("status").returncode == 1
    assert script("start").returncode == 0
    assert script("status").returncode == 0


@pytest.mark.parametrize("text", ["listen = [\n", None], ids=["broken", "gone"])
def test_a_server_whose_config_is_broken_or_gone_is_found_and_stopped(
    installation: Installation, script: Script, text: str | None
) -> None:
    assert script("start").returncode == 0
    pid = installation.pid
    if text is None:
        installation.config.unlink()
    else:
        installation.config.write_text(text)
    status = script("status")
    assert status.returncode == 0
    assert f"pid {pid}" in status.stdout
    assert script("stop").returncode == 0
    assert script("status").returncode == 3
    assert not is_alive(pid)
    assert script("stop").returncode == 0


def test_what_cannot_be_told_is_a_failure(installation: Installation, script: Script) -> None:
    """A package's maintainer script must not take it for "stopped"."""
    if os.geteuid() != 0:
        pytest.skip("only root can change users: run the tests as root")
    with impostor(installation.config):
        assert script("status").returncode == 4
        assert script("stop").returncode == 1


@pytest.mark.parametrize(("code", "lsb"), [(os.EX_NOPERM, 4), (os.EX_CONFIG, 6), (1, 1)])
@pytest.mark.parametrize("action", ["start", "reload"])
def test_exit_codes_are_translated_into_those_of_the_lsb(
    installation: Installation, script: Script, action: str, code: int, lsb: int
) -> None:
    stub = installation.directory / "stub"
    stub.write_text(f'#!/bin/sh\n[ "$1" = status ] && exit 3\nexit {code}\n')
    stub.chmod(0o755)
    script.defaults.write_text(f"DAEMON={stub}\nCONFIG={installation.config}\n")
    assert script(action).returncode == lsb


def test_a_config_that_the_user_may_not_read_is_4(installation: Installation, script: Script) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can change users: run the tests as root")
    installation.config.chmod(0o600)
    script.defaults.write_text(f"DAEMON=/bin/true\nCONFIG={installation.config}\n")
    assert script("start", user="nobody").returncode == 4


def test_a_wrong_action_is_told(script: Script) -> None:
    result = script("nonsense")
    assert result.returncode == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(("action", "code"), [("start", 5), ("stop", 0), ("status", 3)])
def test_what_a_removed_package_leaves_behind_does_no_harm(script: Script, action: str, code: int) -> None:
    script.defaults.write_text("DAEMON=/nowhere/prefork-socketmap\n")
    assert script(action).returncode == code


@pytest.mark.parametrize("action", ["start", "restart"])
def test_without_a_config_file_it_is_not_configured(installation: Installation, script: Script, action: str) -> None:
    installation.config.unlink()
    assert script(action).returncode == 6


def test_shellcheck_has_no_complaint(etc: Path) -> None:
    command = [program("shellcheck", "shellcheck"), str(etc / "init.d/prefork-socketmap")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert (result.returncode, result.stdout) == (0, "")
