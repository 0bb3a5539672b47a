"""Upgrade: how the master's state passes from one program to the next, in the same process.

An upgrade executes the new program in the master's place. The process stays what it was: its pid, its children, its
open files. What the new program needs to know of them is written to a file without a name, whose descriptor it finds
in its environment; every descriptor that the state names is left open across execve(2).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any, NoReturn, Self

from prefork_socketmap.prefork import scoreboard, table
from prefork_socketmap.prefork.channel import Given
from prefork_socketmap.prefork.connections import ConnectionsState
from prefork_socketmap.prefork.duty import DutyState
from prefork_socketmap.prefork.layout import constants, fingerprint
from prefork_socketmap.prefork.listener import ListenerState
from prefork_socketmap.prefork.table import TableState

log = logging.getLogger("prefork_socketmap.master")

_STATE = "PREFORK_SOCKETMAP_STATE"
_LAYOUT = "PREFORK_SOCKETMAP_LAYOUT"
_CHECK_LIMIT = 60.0


class UpgradeError(Exception):
    """The program cannot be replaced; the text says why. The old one goes on."""


@dataclass(frozen=True)
class ChildState:
    """A worker: its process, and its slot on the scoreboard."""

    pid: int
    slot: int
    born: float
    ready: bool
    leaves_by: float
    inherited: int
    horizon: int


@dataclass(frozen=True)
class MasterState:
    """All that a running master is, apart from its plan. Numbers are descriptors, where they are not counts."""

    generation: int
    listeners: list[ListenerState]
    inherited: list[int]
    children: list[ChildState]
    connections: ConnectionsState
    inbox: tuple[int, int]
    bell: int
    lifeline: tuple[int, int]
    table: TableState
    duty: DutyState
    board: int
    others: dict[str, int] = field(default_factory=dict)
    """Descriptors of the embedding program, by names of its own."""

    @classmethod
    def from_environment(cls) -> Self | None:
        """Return the state that the program before this one has left, None when this one was simply started."""
        fd = os.environ.pop(_STATE, None)
        if fd is None:
            return None
        with open(int(fd), encoding="ascii") as file:  # noqa: PTH123 - a descriptor
            document: dict[str, Any] = json.load(file)
        document["listeners"] = [ListenerState(**each) for each in document["listeners"]]
        document["connections"] = ConnectionsState(**document["connections"])
        document["table"] = TableState(**document["table"])
        document["duty"] = DutyState(**document["duty"])
        document["children"] = [ChildState(**each) for each in document["children"]]
        return cls(**document)

    def execute(self, command: Sequence[str]) -> NoReturn:
        """Run *command* in this process's place. Raises OSError, when nothing has happened."""
        fds = self._descriptors()
        file = os.memfd_create("state", 0)
        os.write(file, json.dumps(asdict(self)).encode("ascii"))
        os.lseek(file, 0, os.SEEK_SET)
        try:
            for fd in fds:
                os.set_inheritable(fd, True)
            os.environ[_STATE] = str(file)
            os.execv(command[0], list(command))  # noqa: S606 - our own command
        finally:
            del os.environ[_STATE]
            os.close(file)
            for fd in fds:
                os.set_inheritable(fd, False)

    def take_descriptors(self) -> None:
        """Keep the descriptors from what this process executes: it may be an upgrade again, or a map's helper."""
        for fd in self._descriptors():
            os.set_inheritable(fd, False)

    def _descriptors(self) -> list[int]:
        return [
            *(listener.fd for listener in self.listeners),
            *self.inherited,
            *(place[0] for place in self.connections.places),
            *self.inbox,
            self.bell,
            *self.lifeline,
            self.table.set,
            self.table.memory,
            self.table.buffers,
            self.table.nudged,
            self.duty.reserve,
            self.duty.calls,
            self.duty.dismissals,
            self.duty.gong,
            self.board,
            *self.others.values(),
        ]


def layout_of(*states: type) -> str:
    """Return the number of the layout of *states*, as they are handed on, and of all shared memory."""
    fields = [(state.__name__, sorted(vars(state)["__annotations__"].items())) for state in states]
    memory = constants(vars(table)), [(each.name, each.value) for each in table.Stage]
    return f"{fingerprint(fields, memory):08x}.{scoreboard.LAYOUT:08x}"


LAYOUT = layout_of(MasterState, ChildState, ListenerState, ConnectionsState, TableState, DutyState, Given)
"""Of the state and of the shared memory. A program takes over only from one with the same."""


@dataclass
class Upgrade:
    """How to replace the program: *check* is a command that succeeds if the new one will start, *execute* starts it.

    *others* tells the descriptors that the embedding program wants to keep, by names of its own.
    """

    check: Sequence[str]
    execute: Sequence[str]
    others: dict[str, int] = field(default_factory=dict)

    def begin(self) -> Check:
        """Start the check. Raises OSError."""
        return Check(self.check)


class Check:
    """A running check of the new program."""

    def __init__(self, command: Sequence[str]) -> None:
        # Here, not above: every worker would pay for them with memory.
        import subprocess
        import tempfile

        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the check
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, _LAYOUT: LAYOUT},
            process_group=0,  # it opens the maps in a child of its own, which shall not outlive it
        )
        self.pid = self._process.pid
        self.deadline = monotonic() + _CHECK_LIMIT

    def is_over(self) -> bool:
        """Return whether it has ended; a check that takes too long is ended."""
        if self._process.poll() is None and monotonic() >= self.deadline:
            self._output.write(f"\nits check takes longer than {_CHECK_LIMIT:.0f} s".encode("ascii"))
            self._end()
        return self._process.returncode is not None

    def cancel(self) -> None:
        """End it: nobody wants to know any more."""
        self._end()
        self._output.close()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def problem(self) -> str | None:
        """Return why the new program would not start, None if it would. To be called once, when it is over."""
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", "replace").strip().splitlines()
        self._output.close()
        if self._process.returncode == 0:
            return None
        reason = lines[-1] if lines else f"its check ended with status {self._process.returncode}"
        return reason.removeprefix("prefork-socketmap: ")


def is_for_upgrade() -> bool:
    """In a check: whether a master asks, to be replaced by this program."""
    return _LAYOUT in os.environ


def refuse_another_layout() -> None:
    """In a check: raise UpgradeError when the master that asks has another layout than this program."""
    running = os.environ.get(_LAYOUT, LAYOUT)
    if running != LAYOUT:
        raise UpgradeError(
            f"this program cannot take over from the running one (layout {running}): stop and start it"
        )
