"""The state: what the master tells about itself to ``status``, ``reload`` and all who look for a server.

It is told in two places. The state file is for everybody: it is written whole to a new file that then takes the old
one's name, so a reader sees one state or the other. The same stands in memory of the master's, which can be found as
long as the process lives, whatever becomes of its directory: root and the server's own user read it in /proc. Only
that memory tells for certain who a process is, since nobody else writes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefork_socketmap.daemon import newfile
from prefork_socketmap.daemon.configfile import Places
from prefork_socketmap.daemon.owndescriptor import OwnDescriptor
from prefork_socketmap.prefork.plan import Observer

log = logging.getLogger("prefork_socketmap.master")

_MEMORY = "prefork-socketmap-state"
_LARGEST = 1 << 16  # bytes that are read: a process may say anything
_ATTEMPTS = 10  # at reading what is being written


@dataclass(frozen=True)
class Reload:
    """A reload that has begun. ``began`` is in seconds of the monotonic clock, which all processes share."""

    began: float
    done: bool = False
    problem: str | None = None
    """Why it was refused; None when it was not."""


@dataclass(frozen=True)
class State:
    """What is told. ``since`` is in seconds since the epoch, ``generation`` 0 until lookups are answered."""

    pid: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.time)
    generation: int = 0
    reload: Reload | None = None
    config: str = ""
    """The absolute path of the config file that the server was started with."""
    program: str = ""
    """The interpreter that runs the program: it tells one installation from another."""
    runtime_dir: str = ""
    pid_file: str = ""
    listening: Sequence[str] = ()
    """The endpoints, as they are bound."""
    board: int = -1
    """The master's descriptor of the scoreboard,"""
    backends: int = -1
    """and that of the board of the backends."""

    @property
    def places(self) -> Places:
        """Where its files are, or were."""
        return Places(Path(self.runtime_dir), Path(self.pid_file), are_defaults=False)


def read(path: Path) -> State | None:
    """Return the state in the file at *path*, or None when there is none. Raises OSError if it cannot be read."""
    try:
        return _parse(newfile.read(path))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(errno.EINVAL, "not the state of a server", str(path)) from error


def of_process(pid: int) -> State | None:
    """Return what the process *pid* tells of itself; None when it is no server, or gone. Raises PermissionError."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        with os.scandir(f"/proc/{pid}/fd") as entries:
            # In the order of their numbers: it is among the first, and a server may have a connection for each other.
            memory = next((Path(each.path) for each in entries if _is_memory(Path(each.path))), None)
        return _read_memory(memory) if memory else None
    return None


def _read_memory(path: Path) -> State | None:
    for _ in range(_ATTEMPTS):
        with path.open("rb") as file, contextlib.suppress(ValueError, TypeError, KeyError):
            return _parse(file.read(_LARGEST).decode())
    return None


def _is_memory(path: Path) -> bool:
    try:
        return str(path.readlink()).startswith(f"/memfd:{_MEMORY} ")
    except FileNotFoundError:  # it was closed since
        return False


def _parse(text: str) -> State:
    """Return the state in *text*; what another version of the program tells besides is left out."""
    document = json.loads(text)
    if document["reload"] is not None:
        document["reload"] = Reload(**document["reload"])
    state = State(**{each.name: document[each.name] for each in dataclasses.fields(State) if each.name in document})
    numbers = (state.pid, state.board, state.backends)
    if not (isinstance(state.config, str) and all(isinstance(each, int) for each in numbers)):
        raise TypeError("not the state of a server")
    return state


class StateFile(Observer):
    """Keeps what is told up to date while the master lives.

    ``listening`` is asked for the endpoints that are bound; whoever makes the master sets it.
    """

    def __init__(self, config: Path, places: Places, memory: int | None = None) -> None:
        """*memory*: the descriptor that the program had which was in this process before, to go on with."""
        self.listening: Callable[[], Sequence[str]] = tuple
        self.has_file = True
        """Whether there is a state file: where nobody may write the directory there is the memory only."""
        self._path = places.state_file
        # A worker is not to be believed when it says who its master is.
        self._memory = OwnDescriptor(os.memfd_create(_MEMORY, os.MFD_CLOEXEC) if memory is None else memory)
        before = of_process(os.getpid()) if memory is not None else None
        os.set_inheritable(self.fileno(), False)
        self._state = dataclasses.replace(
            before or State(),
            config=str(config),
            program=sys.executable,
            runtime_dir=str(places.runtime_dir),
            pid_file=str(places.pid_file),
        )
        self._remember()

    def fileno(self) -> int:
        """Return the descriptor of the memory."""
        return self._memory.fileno()

    def show_boards(self, board: int, backends: int) -> None:
        """Tell where the scoreboard, and that of the backends, is found when its file is not there any more."""
        self._state = dataclasses.replace(self._state, board=board, backends=backends)
        self._remember()

    def ready(self, generation: int) -> None:
        """Write the first state."""
        self._write(generation=generation)

    def reloading(self) -> None:
        """Write that a reload has begun."""
        self._write(reload=Reload(time.monotonic()))

    def reloaded(self, generation: int, problem: str | None) -> None:
        """Write how the reload ended."""
        began = self._state.reload or Reload(time.monotonic())
        self._write(generation=generation, reload=dataclasses.replace(began, done=True, problem=problem))

    def remove(self) -> None:
        """Remove the file, and let go of the memory."""
        if self.has_file:
            self._path.unlink(missing_ok=True)
        self._memory.close()

    def _write(self, **changes: Any) -> None:
        self._state = dataclasses.replace(self._state, **changes, listening=[*self.listening()])
        if self.has_file:
            try:
                newfile.write(self._path, self._text())
            except OSError as error:
                # The memory tells it all the same.
                log.warning("others than root cannot see the state of this server: %s", error)
        self._remember()  # last: commands look here whether a change is done, and the file is part of it

    def _remember(self) -> None:
        # Behind a shorter text, what is left of a longer one is overwritten with blanks: JSON ends in front of them.
        memory = self.fileno()
        os.pwrite(memory, self._text().encode().ljust(os.fstat(memory).st_size), 0)

    def _text(self) -> str:
        return json.dumps(dataclasses.asdict(self._state))
