"""The command ``install`` on a whole machine, and what README says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.machine.base import base
from tests.machine.clone import commands, put_clone, put_wheels
from tests.machine.machine import PLAIN, Machine
from tests.waiting import eventually

CONFIG = "/etc/prefork-socketmap/prefork-socketmap.toml"
PROGRAM = "/opt/prefork-socketmap/bin/prefork-socketmap"
# Accounts are compared by what is in them.
LISTING = (
    "find /etc /usr/local /var/lib /var/spool/postfix -newer /tmp/before ! -type d |"
    "sed -E '/^.etc.(passwd|group|g?shadow|sub.id|.pwd.lock)/d' | sort; getent passwd"
)


def test_it_is_idempotent_and_keeps_what_was_changed(installed_by_pip: Machine) -> None:
    machine = installed_by_pip
    again = machine.shell(f"{PROGRAM} install --systemd")
    assert set(re.findall(r"^(\S+) +/", again, flags=re.MULTILINE)) == {"unchanged"}
    machine.shell(f"cp -p {CONFIG} /tmp/saved; echo '# mine' >>{CONFIG}; rm /usr/local/lib/tmpfiles.d/prefork*")
    again = machine.shell(f"{PROGRAM} install --systemd")
    assert f"kept        {CONFIG}: it is not as it was installed" in again
    assert "made        /usr/local/lib/tmpfiles.d/prefork-socketmap.conf" in again
    assert machine.shell(f"tail -1 {CONFIG}") == "# mine\n"
    machine.shell(f"cp -p /tmp/saved {CONFIG}")


def test_passwords_in_the_configuration_are_safe(installed_by_pip: Machine) -> None:
    listing = installed_by_pip.shell("stat -c '%a %U:%G' /etc/prefork-socketmap/*").splitlines()
    assert set(listing) == {"640 root:prefork-socketmap"}
    assert len(listing) == 3


def test_the_manual_pages_are_found(installed_by_pip: Machine) -> None:
    pages = installed_by_pip.shell("ls /usr/local/share/man/man?").split()
    assert {"prefork-socketmap.7", "prefork-socketmap.8", "prefork-socketmap.toml.5"} <= set(pages)


def test_a_running_server_is_not_uninstalled(installed_by_pip: Machine) -> None:
    refused = installed_by_pip.run(PROGRAM, "uninstall", check=False)
    assert refused.returncode == 1
    assert "stop it" in refused.stderr
    assert installed_by_pip.run("prefork-socketmap", "status").returncode == 0


def test_a_venv_that_the_server_could_not_reach_is_refused(installed_by_pip: Machine) -> None:
    installed_by_pip.shell("python3 -m venv /root/venv; /root/venv/bin/pip install -q /srv/prefork-socketmap")
    refused = installed_by_pip.run("/root/venv/bin/prefork-socketmap", "install", "--systemd", check=False)
    assert refused.returncode == 78
    assert "/root" in refused.stderr
    assert "install it into a venv that others can reach" in refused.stderr


@pytest.mark.parametrize("kind", ["--systemd", "--init"])
def test_uninstall_leaves_nothing_behind(release: str, wheels: Path, kind: str) -> None:
    with Machine(base(release), *([PLAIN] if kind == "--init" else [])) as machine:
        put_wheels(machine, wheels)
        put_clone(machine, "/srv/prefork-socketmap")
        machine.shell("python3 -m venv /opt/prefork-socketmap; touch /tmp/before")
        machine.shell("/opt/prefork-socketmap/bin/pip install -q /srv/prefork-socketmap")
        before = machine.shell(LISTING)
        told = machine.shell(f"{PROGRAM} install {kind} --dry-run")
        assert machine.shell(LISTING) == before
        assert f"not made    {CONFIG}" in told
        machine.shell(f"{PROGRAM} install {kind}")
        if kind == "--init":
            machine.shell("update-rc.d prefork-socketmap defaults && /etc/init.d/prefork-socketmap start")
            asked = machine.run("prefork-socketmap", "query", "inet:127.0.0.1:27823:aliases", "info@example.com")
            assert asked.stdout == "alice@example.com\n"
            master = machine.run("cat", "/run/prefork-socketmap/prefork-socketmap.pid").stdout.strip()
            workers = machine.run("ps", "-o", "user:30=", "--ppid", master).stdout.split()
            assert set(workers) == {"prefork-socketmap"}
            machine.shell("/etc/init.d/prefork-socketmap stop")
        else:
            machine.shell("systemctl enable --now prefork-socketmap.socket prefork-socketmap.service")
            machine.shell("systemctl stop prefork-socketmap.socket prefork-socketmap.service")
        assert machine.shell(LISTING) != before
        machine.shell(f"{PROGRAM} uninstall")
        assert machine.shell(LISTING) == before
        assert machine.shell("ls /usr/local/lib | grep -c systemd || true").strip() == "0"
        assert machine.shell(f"{PROGRAM} uninstall") == "nothing is installed here\n"


def normal(output: str) -> set[str]:
    """Return the lines of *output* without what differs from run to run."""
    return set(re.sub(r"\[\d+\]|[\d.]+ ms", "#", output).splitlines())


def test_readme_s_first_commands_need_no_root(installed_by_pip: Machine) -> None:
    machine = installed_by_pip
    machine.shell("systemctl stop prefork-socketmap.socket prefork-socketmap.service")
    machine.shell("useradd --create-home somebody")
    put_clone(machine, "/home/somebody/clone")
    machine.shell("chown -R somebody: /home/somebody/clone")
    start, *_ = commands("Try it")
    enter = ["runuser", "-u", "somebody", "--", "bash", "-c"]
    server = machine.spawn(*enter, f"cd ~somebody/clone && {start}")
    try:
        eventually(lambda: "27823" in machine.run("ss", "-Hltn").stdout, within=120, what="it serves")
        (session,) = commands("Try it", "console")
        steps = re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]
        assert len(steps) == 3
        for step in steps:
            command, _, output = step.partition("\n")
            result = machine.run(*enter, f"cd ~somebody/clone && {{ {command}; }} 2>&1")
            assert normal(output) <= normal(result.stdout)
    finally:
        machine.run("pkill", "-TERM", "-o", "-u", "somebody", "-f", "prefork-socketmap: master")
        server.communicate(timeout=60)
        machine.shell("systemctl start prefork-socketmap.socket prefork-socketmap.service")
