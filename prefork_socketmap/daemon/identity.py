"""Which running server is meant: the one that was started with the config file, wherever that leads by now.

A process is the server of a file when it says so itself, in memory that nobody else writes (see ``state``). The lock
on the pid file that the file names leads to it at once; but the file may be broken, changed or gone, and so may the
directory of the pid file. Then /proc is searched. A process of another user may say anything, so it is not believed
there; but it may be the one, and that is told, rather than "not running".

Signals are sent through a descriptor of that very process (pidfd_open(2)): no other process ever gets one.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefork_socketmap.daemon import configfile, pidfile, state, trust
from prefork_socketmap.daemon.configfile import Places
from prefork_socketmap.daemon.state import State
from prefork_socketmap.settings import SettingError

_TITLE = re.compile(r"prefork-socketmap: master(?: \[(.*)\])?")
_ROOT = 0


class UnidentifiedError(Exception):
    """It cannot be told which server is meant, or whether it runs; the text says why."""


@dataclass(frozen=True)
class Server:
    """A running server: its pid, and a descriptor that stands for its process.

    ``places`` is where its files are.
    """

    pid: int
    descriptor: int
    places: Places

    def send(self, number: signal.Signals) -> None:
        """Send a signal. Raises PermissionError, or ProcessLookupError when the process has ended."""
        signal.pidfd_send_signal(self.descriptor, number)

    def has_ended(self, within: float | None) -> bool:
        """Wait *within* seconds for its end, None: as long as it takes; return whether it has come."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(None if within is None else within * 1000))

    def state(self) -> State | None:
        """Return what it tells of itself; None when it does not yet. Raises OSError if that cannot be read."""
        with contextlib.suppress(PermissionError):
            return state.of_process(self.pid)
        told = state.read(self.places.state_file)
        return told if told and told.pid == self.pid else None


@dataclass(frozen=True)
class Sought:
    """The server that a command is about, as far as its config file and command line tell."""

    config: Path
    """Absolute."""
    pid_file: Path | None
    """The one that the command line names, absolute."""
    places: Places
    """Where its files should be; what is the default when the file does not tell."""
    problem: str = ""
    """Why the file does not tell."""

    @classmethod
    def of(cls, config: Path, pid_file: Path | None) -> Sought:
        """Read what *config* tells of it; nothing else in it has to be right."""
        config, pid_file = config.absolute(), pid_file and pid_file.absolute()
        try:
            trust.refuse_file(config)
            places, problem = configfile.load_places(config), ""
        except SettingError as error:
            places, problem = Places(), str(error)
        return cls(config, pid_file, places.with_pid_file(pid_file), problem)

    @contextlib.contextmanager
    def find(self) -> Iterator[Server | None]:
        """Find it; None: it does not run. Raises UnidentifiedError, or PermissionError for a locked directory."""
        with contextlib.ExitStack() as held:
            yield self._holder(held) or self._search(held)

    def _holder(self, held: contextlib.ExitStack) -> Server | None:
        """Return the server that holds the pid file, if it is the one."""
        pid = pidfile.holder(self.places.pid_file)
        process = _Process.open(pid, held) if pid else None
        # Asked again: only now is it certain that the descriptor stands for the process that holds the lock.
        if not process or pidfile.holder(self.places.pid_file) != pid or not self._may_be(process):
            return None
        return self._server(process)

    def _may_be(self, process: _Process) -> bool:
        """Whether the process that holds the pid file is the one: who cannot see what it is takes the file's word."""
        return self._is_named_by(process) or (process.is_hidden and not process.config and not self.problem)

    def _is_named_by(self, process: _Process) -> bool:
        """Whether *process* says that it was started with the file."""
        return bool(process.config) and os.path.realpath(process.config) == os.path.realpath(self.config)

    def _search(self, held: contextlib.ExitStack) -> Server | None:
        """Look at all processes for the one."""
        masters = [each for each in _masters(held) if each.told or each.is_hidden]
        # One that is hidden, and has no room in its title for the file's name, may be the one.
        candidates = [each for each in masters if self._is_named_by(each) or (each.is_hidden and not each.config)]
        # A worker has its master's title in its first moment.
        pids = {each.pid for each in candidates}
        candidates = [each for each in candidates if each.parent not in pids]
        if self.pid_file:
            candidates = [each for each in candidates if not each.told or each.told.pid_file == str(self.pid_file)]
        found = [each for each in candidates if each.config and each.is_ours]
        if len(found) == 1:
            return self._server(found[0])
        if found:
            raise UnidentifiedError(f"{self.config}: several servers were started with it: {_pids(found)}")
        if candidates:
            whose = ", ".join(f"process {each.pid} of user {each.uid}" for each in candidates)
            raise UnidentifiedError(
                f"{self.config}: not known whether its server runs: {whose} may be it; ask as that user"
            )
        if self.problem and not Path("/proc/1").exists():
            raise UnidentifiedError(f"{self.problem}; and not all processes can be seen: ask as root")
        return None

    def other(self) -> str:
        """Return what is to be said about the server of another file that holds the pid file; "" if there is none."""
        with contextlib.ExitStack() as held:
            pid = pidfile.holder(self.places.pid_file)
            process = _Process.open(pid, held) if pid else None
            if not process:
                return ""
            whose = f"the server of {process.config}" if process.config else "another program"
            held_by = f"{self.places.pid_file} is held by {whose}, pid {pid}"
            return f"{held_by}, and no server runs that was started with {self.config}"

    def _server(self, process: _Process) -> Server:
        return Server(process.pid, process.descriptor, process.told.places if process.told else self.places)


@dataclass(frozen=True)
class _Process:
    """A process that may be a server. ``config`` is the file that it says it was started with; "": not known."""

    pid: int
    parent: int
    uid: int
    descriptor: int
    told: State | None
    config: str
    is_hidden: bool
    """Whether what it tells is not for us."""

    @classmethod
    def open(cls, pid: int, held: contextlib.ExitStack) -> _Process | None:
        """Look at the process *pid*; None when it is gone. The descriptor is closed with *held*."""
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return None
        held.callback(os.close, descriptor)
        try:
            told, is_hidden = state.of_process(pid), False
        except PermissionError:
            told, is_hidden = None, True
        if told and told.pid != pid:
            told = None  # it has just been forked off by the one that says so
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            title = _TITLE.fullmatch(_command_line(pid))
        except OSError:
            return None
        config = told.config if told else (title and title[1]) or ""
        return cls(pid, int(status["PPid"]), int(status["Uid"].split()[1]), descriptor, told, config, is_hidden)

    @property
    def is_ours(self) -> bool:
        """Whether what it says can be believed: it is root's, or of whoever asks."""
        return self.uid in (_ROOT, os.geteuid())


def _masters(held: contextlib.ExitStack) -> Iterator[_Process]:
    """Iterate over all processes that call themselves masters."""
    for pid in [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]:
        with contextlib.suppress(OSError):
            if _TITLE.match(_command_line(pid)) and (process := _Process.open(pid, held)):
                yield process


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode("utf-8", "surrogateescape")


def _pids(processes: list[_Process]) -> str:
    return "pid " + ", ".join(str(each.pid) for each in processes) + "; name its --pid-file"
