"""A machine: a Debian with a first process of its own; files, network, processes and cgroups are nobody else's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pytest

from tests.integration.servers.process import program
from tests.processes import children
from tests.waiting import eventually

_BOOT = Path(__file__).with_name("boot")
SYSTEMD = ("/lib/systemd/systemd", "systemd.unit=multi-user.target")
PLAIN = ("/bin/bash", "-c", "while :; do sleep 1000; done")
"""A first process that starts nothing, and buries what dies: where an init script is run by hand."""
_UP = ("running", "degraded")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TIMEOUT = 120


class Machine:
    """A machine with the root directory *base*, which runs from ``start`` to ``close``."""

    def __init__(self, base: Path, init: Sequence[str] = SYSTEMD) -> None:
        self._base = base
        self._init = init
        self._cgroup = _cgroups() / f"prefork-socketmap-test-{os.getpid()}-{id(self):x}"
        self._process: subprocess.Popen[str] | None = None
        self._pid = 0

    def start(self) -> None:
        """Boot; skip the test where that is not allowed."""
        unshare = program("unshare", "util-linux")
        program("ip", "iproute2")
        try:
            self._cgroup.mkdir()
        except OSError as error:
            pytest.skip(f"this machine allows no cgroup of one's own: {error}")
        # The cgroup namespace's root is the group that a process is in when it makes the namespace.
        script = f'echo $$ >{self._cgroup}/cgroup.procs && exec "$@"'
        namespaces = ["--mount", "--uts", "--ipc", "--pid", "--net", "--cgroup", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            ["sh", "-c", script, "sh", unshare, *namespaces, str(_BOOT), str(self._base), *self._init],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        eventually(self._is_up, within=TIMEOUT, what="the machine is up")

    def _is_up(self) -> bool:
        assert self._process
        assert self._process.stderr
        if self._process.poll() is not None:
            pytest.skip(f"this machine cannot boot another one: {self._process.stderr.read().strip()}")
        found = children(self._process.pid)
        # Before that the process is the script that mounts.
        first = self._init[0].rpartition("/")[2]
        if not found or Path(f"/proc/{found[0]}/comm").read_text().strip() != first:
            return False
        self._pid = found[0]
        if self._init != SYSTEMD:
            return self.run("test", "-e", "/old", check=False).returncode != 0
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in _UP

    def run(
        self, *command: str, stdin: str = "", check: bool = True, timeout: float = TIMEOUT
    ) -> subprocess.CompletedProcess[str]:
        """Run *command* as root; with *check* it has to succeed."""
        done = subprocess.run(
            self.command(*command), input=stdin, capture_output=True, text=True, check=False, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def shell(self, script: str, *, check: bool = True) -> str:
        """Run a script of bash(1), in which each command has to succeed; return what it printed."""
        return self.run("bash", "-euo", "pipefail", "-c", script, check=check).stdout

    def spawn(self, *command: str) -> subprocess.Popen[str]:
        """Start *command* as root."""
        return subprocess.Popen(
            self.command(*command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def command(self, *command: str) -> list[str]:
        """Return *command* as it has to be said out here."""
        namespaces = ["--mount", "--uts", "--ipc", "--pid", "--net", "--cgroup", "--root", "--wd"]
        enter = ["nsenter", "--target", str(self._pid), *namespaces]
        return [*enter, "env", "-i", f"PATH={_PATH}", "HOME=/root", "LC_ALL=C.UTF-8", *command]

    def path(self, path: str) -> Path:
        """Return the path by which a file of the machine is found out here."""
        return Path(f"/proc/{self._pid}/root{path}")

    def write(self, path: str, text: str) -> None:
        """Write a file."""
        self.run("tee", path, stdin=text)

    def pid_of(self, unit: str) -> int:
        """Return the main process of a unit, 0 when there is none."""
        return int(self.show(unit, "MainPID"))

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def journal(self, *arguments: str) -> str:
        """Return what the journal has, as journalctl(1) with *arguments* prints it."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--output=cat", *arguments).stdout

    def close(self) -> None:
        """Switch the machine off at once; of what was written to it nothing is left."""
        if self._process:
            if self._pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
            else:
                self._process.kill()
            self._process.communicate(timeout=TIMEOUT)
        if self._cgroup.exists():
            eventually(self._remove_cgroup, within=30, what="the machine's cgroups are empty")

    def _remove_cgroup(self) -> bool:
        try:
            for directory, _, _ in os.walk(self._cgroup, topdown=False):
                Path(directory).rmdir()
        except OSError:
            return False
        return True

    def __enter__(self) -> Machine:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _cgroups() -> Path:
    """Return where cgroups(7), version 2, are; skip the test where they are not."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    pytest.skip("this machine has no cgroups of version 2 mounted")
