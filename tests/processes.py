"""Processes, as /proc shows them (proc(5)). Another process may be gone at any moment: that is no error here."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from pathlib import Path

from tests.waiting import eventually

_ENDS_WITHIN = 20.0  # seconds; long before that, a process that is to end has ended


def children(pid: int) -> list[int]:
    """Return the process ids of a process's children, zombies excepted."""
    found: list[str] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += (task / "children").read_text().split()
    return [child for child in map(int, found) if is_alive(child)]


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that nobody has waited for yet does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def await_end(*pids: int, within: float = _ENDS_WITHIN) -> None:
    """Wait until the processes are gone."""
    eventually(lambda: not any(map(is_alive, pids)), within, f"the end of the processes {pids}")


def process_title(pid: int) -> str:
    """Return a process's title; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def process_status(pid: int) -> dict[str, list[str]]:
    """Return /proc/PID/status of a process that is there, each line's values by its name."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: values.split() for name, _, values in (line.partition(":") for line in lines)}


def open_files(pid: int) -> dict[int, str]:
    """Return what a process's open descriptors are, by number, as readlink(2) tells of /proc/PID/fd."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has been closed
            found[int(link.name)] = str(link.readlink())
    return found


def descriptors(pid: int, below: float = float("inf")) -> Counter[str]:
    """Return how many open descriptors with numbers *below* a process has of each kind."""
    return Counter(_kind_of(target) for number, target in open_files(pid).items() if number < below)


def memories(pid: int, name: str) -> list[Path]:
    """Return where a process has its memory with this name, as memfd_create(2) gives it."""
    files = open_files(pid)
    return [Path(f"/proc/{pid}/fd/{number}") for number, file in files.items() if file.startswith(f"/memfd:{name} ")]


def _kind_of(target: str) -> str:
    """Return a name that is the same for the same kind of descriptor: sockets and pipes differ in their numbers."""
    return target.partition(":[")[0]


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal."""
    os.kill(pid, number)
