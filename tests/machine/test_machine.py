"""A machine of the tests is a guest: it changes nothing of the machine that it runs on."""

from __future__ import annotations

from pathlib import Path

from tests.machine.base import base
from tests.machine.machine import Machine

_TREES = ("fs", "kernel", "vm")
# What the kernel counts, or makes up anew whenever it is asked.
_CHANGING = ("inode", "dentry", "file-nr", "random", "ns_last_pid", "aio-nr", "pty/nr", "epoll", "stat_refresh")


def settings() -> dict[str, str]:
    """Return the kernel's settings that all machines share, and the modes of devices."""
    found = {}
    for tree in _TREES:
        for path in Path("/proc/sys", tree).rglob("*"):
            if path.is_file() and path.stat().st_mode & 0o400 and not any(each in str(path) for each in _CHANGING):
                try:
                    found[str(path)] = path.read_text(errors="replace")
                except OSError:
                    continue
    devices = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"]
    return found | {device: oct(Path(device).stat().st_mode) + str(Path(device).stat().st_uid) for device in devices}


def test_neither_settings_nor_devices_are_changed_by_a_boot(release: str) -> None:
    before = settings()
    with Machine(base(release)) as machine:
        assert machine.run("test", "-w", "/proc/sys/fs/protected_symlinks", check=False).returncode != 0
        assert machine.run("chmod", "0600", "/dev/null").returncode == 0
    assert settings() == before


def test_nothing_that_is_written_is_left_for_the_next(release: str) -> None:
    with Machine(base(release)) as machine:
        machine.write("/etc/left", "something")
    with Machine(base(release)) as machine:
        assert not machine.path("/etc/left").exists()
    assert not (base(release) / "etc/left").exists()


def test_it_reaches_no_network(release: str) -> None:
    with Machine(base(release)) as machine:
        interfaces = machine.shell("ls /proc/sys/net/ipv4/conf").split()
        assert set(interfaces) == {"all", "default", "lo"}
