"""The root directories that machines start from: a Debian each, made once by debootstrap(8) and kept for next time.

They are not written to afterwards, see machine.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

from tests.integration.servers.process import program

RELEASES = ["bookworm", "trixie"]
"""Debian 12 and 13."""

_CACHE = Path("/var/cache/prefork-socketmap-tests")
_SYSTEM = [
    "systemd",
    "systemd-sysv",
    "dbus",
    "adduser",
    "procps",
    "iproute2",
    "python3-venv",
    "postfix",
    "postgresql",
    "curl",
]
# What the package depends on: a machine has no network to fetch it from.
_LIBRARIES = ["python3-setproctitle", "python3-daemon", "python3-psycopg", "python3-prometheus-client"]
_PACKAGES = [*_SYSTEM, *_LIBRARIES]
_BOOTSTRAP_TIMEOUT = 1200
# Services of the machine's own are not started in the directory that it is made in.
_POLICY = "#!/bin/sh\nexit 101\n"
_ANSWERS = "postfix postfix/main_mailer_type select Local only\npostfix postfix/mailname string machine.test\n"


def base(release: str) -> Path:
    """Return the root directory of *release*; skip the test where it cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a machine: run the tests as root")
    program("debootstrap", "debootstrap")
    name = hashlib.sha256(" ".join([release, *_PACKAGES, _ANSWERS]).encode()).hexdigest()[:12]
    root = _CACHE / f"{name}-{release}"
    _CACHE.mkdir(exist_ok=True)
    with _lock_of(_CACHE):
        if not root.exists():
            _remove_unused(path for path in _CACHE.glob(f"*-{release}*") if path.is_dir())
            _make(release, root)
        _in_use.append(_lock_of(root, fcntl.LOCK_SH))
    return root


_in_use: list[IO[bytes]] = []
"""Locks of what this process uses, held until it ends: the tests of another source tree may want other packages."""


def _lock_of(directory: Path, kind: int = fcntl.LOCK_EX) -> IO[bytes]:
    lock = Path(f"{directory}.lock").open("wb")  # noqa: SIM115 (whoever gets it closes it)
    fcntl.flock(lock, kind)
    return lock


def _remove_unused(roots: Iterable[Path]) -> None:
    for root in roots:
        with suppress(BlockingIOError), _lock_of(root, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(root)
            Path(f"{root}.lock").unlink()


def _make(release: str, root: Path) -> None:
    new = root.with_name(f"{root.name}.{os.getpid()}.new")
    try:
        _run(
            "debootstrap", "--variant=minbase", release, str(new), _mirror(), reason="debootstrap failed", attempts=3
        )
        _install(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    new.rename(root)


def _install(root: Path) -> None:
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text(_POLICY)
    policy.chmod(0o755)
    # No getty: there is no console.
    mask = root / "etc/systemd/system/console-getty.service"
    with _mounted(root):
        enter = ["chroot", str(root), "env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"]
        _run(*enter, "apt-get", "update", reason="apt-get update failed")
        _run(*enter, "apt-get", "install", "-qy", "--no-install-recommends", "debconf", reason="apt-get failed")
        _run(*enter, "debconf-set-selections", reason="debconf failed", stdin=_ANSWERS)
        _run(*enter, "apt-get", "install", "-qy", "--no-install-recommends", *_PACKAGES, reason="apt-get failed")
    policy.unlink()
    mask.symlink_to("/dev/null")


@contextmanager
def _mounted(root: Path) -> Iterator[None]:
    mounted: list[Path] = []
    try:
        for what in ("proc", "dev"):
            _run("mount", "--bind", f"/{what}", str(root / what), reason="this machine lets nobody mount")
            mounted.append(root / what)
        yield
    finally:
        for place in mounted:
            subprocess.run(["umount", place], check=True)


def _mirror() -> str:
    """Return where apt(8) gets Debian from here."""
    listing = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Identifier: Packages", "Label: Debian"]
    return _run(*listing, reason="this is no Debian").split()[0]


def _run(*command: str, reason: str, stdin: str = "", attempts: int = 1) -> str:
    """Return what *command* prints; *attempts*: for what a mirror fails at now and then."""
    for _ in range(attempts):
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, timeout=_BOOTSTRAP_TIMEOUT
        )
        if done.returncode == 0:
            return done.stdout
    pytest.skip(f"{reason}: {(done.stderr or done.stdout).strip()[-500:]}")
