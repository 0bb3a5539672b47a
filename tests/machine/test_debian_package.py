"""The Debian package: installed, upgraded under load, removed and purged on a machine with systemd."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.servers.process import program
from tests.machine import mail
from tests.machine.base import base
from tests.machine.clone import ROOT
from tests.machine.conftest import VERSIONS
from tests.machine.machine import PLAIN, TIMEOUT, Machine
from tests.machine.visits import visits

SERVICE = "prefork-socketmap.service"
CONFIG = "/etc/prefork-socketmap/prefork-socketmap.toml"
TITLES = "^prefork-socketmap: (master|worker)"
INSTANCE = """\
listen = ["inet:127.0.0.1:27900"]
runtime_dir = "/run/prefork-socketmap-second"
maps.colours = { type = "static", entries = { sky = "blue" } }
"""


def install(machine: Machine, package: Path, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Install *package* as apt(8) would, on a machine that has all it depends on."""
    target = f"/tmp/{package.name}"
    machine.path(target).write_bytes(package.read_bytes())
    command = ["apt-get", "install", "-y", target]
    return machine.run("env", "DEBIAN_FRONTEND=noninteractive", *command, check=check)


def installed_version(machine: Machine) -> str:
    return machine.run("prefork-socketmap", "--version").stdout.split()[1]


@pytest.fixture
def installed(machine: Machine, packages: list[Path]) -> Iterator[Machine]:
    """The machine with the package in its first version, which is purged in the end."""
    install(machine, packages[0])
    yield machine
    machine.run("apt-get", "purge", "-y", "prefork-socketmap")


def test_it_serves_as_soon_as_it_is_installed(installed: Machine) -> None:
    assert installed.show(SERVICE, "ActiveState") == "active"
    assert installed.run("systemctl", "is-enabled", SERVICE, "prefork-socketmap.socket").returncode == 0
    master = installed.pid_of(SERVICE)
    assert installed.run("ps", "-o", "user:30=", "-p", str(master)).stdout.strip() == "prefork-socketmap"
    listing = installed.shell("stat -c '%a %U:%G %n' /etc/prefork-socketmap/*").splitlines()
    assert len(listing) == 3
    assert all(line.startswith("640 root:prefork-socketmap ") for line in listing)
    # As the server's user: it is root who asks.
    assert "OK" in installed.run("prefork-socketmap", "check").stdout


def test_a_chrooted_postfix_delivers_mail_by_it(installed: Machine) -> None:
    mail.assert_the_samples_deliver(installed)


def test_an_upgrade_under_load_closes_no_connection(installed: Machine, packages: list[Path]) -> None:
    installed.write("/etc/prefork-socketmap/second.toml", INSTANCE)
    installed.shell("chgrp prefork-socketmap /etc/prefork-socketmap/second.toml")
    installed.run("systemctl", "start", "prefork-socketmap@second")
    units = (SERVICE, "prefork-socketmap@second.service")
    masters = [installed.pid_of(unit) for unit in units]
    assert installed_version(installed) == VERSIONS[0]
    with visits(installed) as found:
        install(installed, packages[1])
    assert found.problems == []
    assert installed_version(installed) == VERSIONS[1]
    assert [installed.pid_of(unit) for unit in units] == masters
    for config in ("prefork-socketmap", "second"):
        status = installed.run("prefork-socketmap", "status", "-c", f"/etc/prefork-socketmap/{config}.toml").stdout
        assert "generation 2" in status
    asked = installed.run("prefork-socketmap", "query", "inet:127.0.0.1:27900:colours", "sky")
    assert asked.stdout == "blue\n"


def test_an_upgrade_with_a_broken_configuration_leaves_the_server_alone(
    installed: Machine, packages: list[Path]
) -> None:
    master = installed.pid_of(SERVICE)
    installed.shell(f"cp -p {CONFIG} /tmp/saved")
    installed.shell(f"echo nonsense >>{CONFIG}")
    with visits(installed) as found:
        told = install(installed, packages[1])
    assert found.problems == []
    assert installed.pid_of(SERVICE) == master
    assert "goes on with the program it has" in told.stdout + told.stderr
    installed.shell(f"cp -p /tmp/saved {CONFIG}")


def test_a_changed_configuration_survives_an_upgrade_and_a_removal(installed: Machine, packages: list[Path]) -> None:
    config = CONFIG
    installed.shell(f"sed -i s/example.com/changed.example/ {config}; chmod 0600 {config}; chown root: {config}")
    changed = installed.shell(f"stat -c '%a %U %G' {config} && cat {config}")
    install(installed, packages[1])
    installed.run("apt-get", "remove", "-y", "prefork-socketmap")
    assert installed.shell(f"stat -c '%a %U %G' {config} && cat {config}") == changed
    assert installed.run("pgrep", "-f", TITLES, check=False).stdout == ""


def test_after_a_purge_nothing_is_left(machine: Machine, packages: list[Path]) -> None:
    before = machine.shell("ls /etc /lib/systemd/system /usr/bin /var/lib; ls -A /var/spool/postfix; cat /etc/passwd")
    install(machine, packages[0])
    assert "socketmap" in machine.shell("ls /var/spool/postfix")
    machine.run("apt-get", "purge", "-y", "prefork-socketmap")
    after = machine.shell("ls /etc /lib/systemd/system /usr/bin /var/lib; ls -A /var/spool/postfix; cat /etc/passwd")
    assert after == before
    assert machine.run("systemctl", "list-unit-files", "prefork*", "--no-legend", check=False).stdout == ""


def test_without_systemd_the_init_script_does_the_same(release: str, packages: list[Path]) -> None:
    with Machine(base(release), PLAIN) as machine:
        # What a System V init has for invoke-rc.d(8), which starts nothing on a machine that is not up.
        machine.shell(
            "rm -f /sbin/runlevel; printf '#!/bin/sh\\necho N 2\\n' >/sbin/runlevel; chmod 755 /sbin/runlevel"
        )
        install(machine, packages[0])
        master = machine.run("cat", "/run/prefork-socketmap/prefork-socketmap.pid").stdout
        workers = machine.run("pgrep", "-P", master.strip()).stdout.split()
        users = machine.run("ps", "-o", "user:30=", "-p", ",".join(workers)).stdout.split()
        assert set(users) == {"prefork-socketmap"}
        with visits(machine) as found:
            install(machine, packages[1])
        assert found.problems == []
        assert machine.run("cat", "/run/prefork-socketmap/prefork-socketmap.pid").stdout == master
        machine.run("apt-get", "remove", "-y", "prefork-socketmap")
        assert machine.run("pgrep", "-f", TITLES, check=False).stdout == ""
        machine.run("apt-get", "purge", "-y", "prefork-socketmap")


def test_lintian_finds_no_error(packages: list[Path]) -> None:
    command = [program("lintian", "lintian"), "--fail-on", "error", "--allow-root", str(packages[0])]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert result.returncode == 0, result.stdout


def test_the_package_asks_for_the_python_that_the_program_needs() -> None:
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()
    assert "X-Python3-Version: >= 3.11\n" in (ROOT / "etc/debian/control").read_text()
