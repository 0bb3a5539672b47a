"""A clone of this repository on a machine, and what pip needs there, which has no network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.machine.machine import Machine

ROOT = Path(__file__).parent.parent.parent
_PARTS = ["pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "prefork_socketmap", "etc", "man"]
_REQUIREMENTS = ["hatchling", "setproctitle", "python-daemon"]
# Debian's root needs no sudo, and may have none.
AS_ROOT = 'sudo() { env "$@"; }\n'


def put_clone(machine: Machine, directory: str) -> None:
    """Put the repository's files into *directory* of the machine, for anybody to read."""
    machine.run("mkdir", "-p", directory)
    for name in _PARTS:
        target = machine.path(f"{directory}/{name}")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)


def put_wheels(machine: Machine, cache: Path) -> None:
    """Have the machine's pip find what the package needs; *cache* is where it is kept for the next machine."""
    version = machine.shell("python3 -c 'import sys; print(*sys.version_info[:2], sep=\".\")'").strip()
    wheels = cache / version
    if not wheels.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "--python-version", version]
        subprocess.run([*pip, "-d", str(wheels), *_REQUIREMENTS], check=True, timeout=300)
    shutil.copytree(wheels, machine.path("/srv/wheels"))
    machine.write("/etc/pip.conf", "[global]\nno-index = true\nfind-links = /srv/wheels\nroot-user-action = ignore\n")


def commands(title: str, kind: str = "sh") -> list[str]:
    """Return the blocks of README's section *title* that are marked as *kind*."""
    section = (ROOT / "README.md").read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{kind}\n(.*?)```", section, flags=re.DOTALL)
