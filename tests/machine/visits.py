"""A program on a machine that asks the server there while something is done to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.machine.machine import TIMEOUT, Machine

_PROGRAM = Path(__file__).with_name("visitor.py")


@dataclass
class Visits:
    """What came of it, known when it is over: each answer that failed, of a connection kept open or of a new one."""

    problems: list[str] = field(default_factory=list)

    @property
    def of_new_connections(self) -> list[str]:
        """Those of connections that were made for one question."""
        return [problem for problem in self.problems if problem.startswith("new")]


@contextlib.contextmanager
def visits(machine: Machine) -> Iterator[Visits]:
    """Ask the server on the machine as long as the context lasts."""
    machine.write("/tmp/visitor.py", _PROGRAM.read_text())
    visitor = machine.spawn("python3", "/tmp/visitor.py")
    found = Visits()
    try:
        assert visitor.stdout
        first = visitor.stdout.readline()
        assert first == "asking\n", visitor.communicate(timeout=TIMEOUT)[1]
        yield found
        out, errors = visitor.communicate("enough\n", timeout=TIMEOUT)
        assert visitor.returncode == 0, errors
        _asked, *found.problems = out.splitlines()
    finally:
        visitor.kill()
        visitor.communicate()
