"""The state file: what the master tells about itself to ``status`` and ``reload``.

It is written whole to a new file that then takes the old one's name, so a reader sees one state or the other. That a
server runs at all is not told here but by the lock on its pid file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefork_socketmap.daemon import newfile
from prefork_socketmap.prefork.plan import Observer


@dataclass(frozen=True)
class Reload:
    """A reload that has begun. ``began`` is in seconds of the monotonic clock, which all processes share."""

    began: float
    done: bool = False
    problem: str | None = None
    """Why it was refused; None when it was not."""


@dataclass(frozen=True)
class State:
    """What the file says. ``since`` is in seconds since the epoch."""

    pid: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.time)
    generation: int = 0
    reload: Reload | None = None


def read(path: Path) -> State | None:
    """Return the state at *path*, or None when there is none. Raises OSError if it cannot be read."""
    try:
        document = json.loads(newfile.read(path))
        if document["reload"] is not None:
            document["reload"] = Reload(**document["reload"])
        return State(**document)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(errno.EINVAL, "not the state of a server", str(path)) from error


class StateFile(Observer):
    """Keeps the file up to date while the master lives."""

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """*resume*: go on with the file of the program that was in this process before."""
        self._path = path
        self._state = State()
        if resume:
            with contextlib.suppress(OSError):  # whatever has become of the file, the server goes on
                self._state = read(path) or self._state

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
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    def _write(self, **changes: Any) -> None:
        self._state = dataclasses.replace(self._state, **changes)
        newfile.write(self._path, json.dumps(dataclasses.asdict(self._state)))
