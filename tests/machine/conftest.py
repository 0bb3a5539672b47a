"""Machines, and what is installed on them: made once for all tests of a release."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.servers.process import program
from tests.machine.base import RELEASES, base
from tests.machine.clone import AS_ROOT, ROOT, commands, put_clone, put_wheels
from tests.machine.machine import Machine

VERSIONS = ("1.0.0", "1.0.1")


@pytest.fixture(scope="session", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    """A release of Debian."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The package, and the same one with a higher version."""
    program("dpkg-buildpackage", "build-essential")
    program("dh_python3", "dh-python")
    directory = tmp_path_factory.mktemp("packages")
    for version in VERSIONS:
        command = [str(ROOT / "etc/debian/build"), str(directory), version]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return [directory / f"prefork-socketmap_{version}_all.deb" for version in VERSIONS]


@pytest.fixture(scope="module")
def machine(release: str) -> Iterator[Machine]:
    """A machine as Debian's installer leaves it, but for Postfix, PostgreSQL, and what our package depends on."""
    with Machine(base(release)) as machine:
        yield machine


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where wheels are kept, by version of Python."""
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="session")
def installed_by_pip(release: str, wheels: Path) -> Iterator[Machine]:
    """Another machine, with what README's commands for pip install; systemd runs it."""
    with Machine(base(release)) as machine:
        put_wheels(machine, wheels)
        put_clone(machine, "/srv/prefork-socketmap")
        (steps,) = [block for block in commands("Install") if "--systemd" in block]
        machine.shell(f"{AS_ROOT}cd /srv/prefork-socketmap\n{steps}")
        yield machine
