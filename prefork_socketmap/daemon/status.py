"""The command ``status``: whether the server runs, and what it is doing, for people and for programs.

Which server is meant, and whether it runs, is told by ``identity``, the rest by the scoreboard and what the server
tells of itself: it is not asked, so it may be busy, stuck or stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from prefork_socketmap.daemon import asjson, backends, control, prometheus, report, tables
from prefork_socketmap.daemon.identity import Server, Sought, UnidentifiedError
from prefork_socketmap.daemon.journal import complain
from prefork_socketmap.daemon.report import Finding, Report
from prefork_socketmap.daemon.state import State
from prefork_socketmap.prefork.scoreboard import Scoreboard, ScoreboardError

# Exit codes of an init script's "status": LSB, "Init Script Actions".
DEAD_WITH_PID_FILE = 1
NOT_RUNNING = 3
UNKNOWN = 4

_RENDER = {"text": tables.render, "json": asjson.render, "prometheus": prometheus.render}
_CLEAR_SCREEN = "\x1b[H\x1b[2J"


def status(arguments: argparse.Namespace) -> int:
    """Print whether the server runs, and what it does; return the exit code that LSB demands of an init script."""
    sought = control.sought_by(arguments)
    if arguments.watch is None:
        return _show(sought, _RENDER[arguments.format])
    try:
        _watch(sought, _Rates().render if arguments.format == "text" else _RENDER[arguments.format], arguments.watch)
    except KeyboardInterrupt:
        return os.EX_OK


def _watch(sought: Sought, render: Callable[[Finding], str], pause: float) -> NoReturn:
    while True:
        if sys.stdout.isatty():
            print(_CLEAR_SCREEN, end="")
        _show(sought, render)
        sys.stdout.flush()
        time.sleep(pause)


class _Rates:
    """Renders each finding in comparison with the one before."""

    def __init__(self) -> None:
        self._before: Report | None = None
        self._then = 0.0

    def render(self, finding: Finding) -> str:
        now = time.monotonic()
        text = tables.render_rates(finding, self._before, now - self._then)
        self._before, self._then = finding.report, now
        return text


def _show(sought: Sought, render: Callable[[Finding], str]) -> int:
    try:
        finding = _look(sought)
    except (PermissionError, UnidentifiedError) as error:
        return complain(f"not known whether it is running: {error}", UNKNOWN)
    print(render(finding), end="")
    return finding.code


def _look(sought: Sought) -> Finding:
    """Find the server. Raises UnidentifiedError, or PermissionError when that cannot be known."""
    with sought.find() as server:
        if server:
            return _look_at(server)
    if other := sought.other():
        return Finding(NOT_RUNNING, f"prefork-socketmap is not running: {other}")
    if sought.problem:
        return Finding(NOT_RUNNING, f"prefork-socketmap is not running: no server was started with {sought.config}")
    if sought.places.pid_file.exists():
        return Finding(DEAD_WITH_PID_FILE, f"prefork-socketmap is dead: it left {sought.places.pid_file} behind")
    return Finding(NOT_RUNNING, "prefork-socketmap is not running")


def _look_at(server: Server) -> Finding:
    told = server.state()
    if not told or not told.generation:
        return Finding(os.EX_OK, f"prefork-socketmap is starting, pid {server.pid}", server.pid)
    line = f"prefork-socketmap is running, pid {server.pid}"
    try:
        board, where = _boards(server, told)
    except (OSError, ScoreboardError) as error:
        return Finding(os.EX_OK, line, server.pid, problem=f"what it does cannot be read: {error}")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(board.started))
    problem = f"the last reload was refused: {told.reload.problem}" if told.reload and told.reload.problem else None
    found = report.make(board, backends.read(where))
    return Finding(os.EX_OK, f"{line}, since {since}", server.pid, found, problem)


def _boards(server: Server, told: State) -> tuple[Scoreboard, Path]:
    """Open the scoreboard; return it, and where the board of the backends is.

    They are the master's own descriptors if the file is gone, or another server's by now.
    """
    problem: Exception
    try:
        board = Scoreboard.read(server.places.scoreboard)
    except FileNotFoundError as error:
        problem = error
    else:
        if board.pid == server.pid:
            return board, server.places.backends
        problem = ScoreboardError(f"{server.places.scoreboard}: of another process, {board.pid}")
    own = Path(f"/proc/{server.pid}/fd")
    with contextlib.suppress(OSError):
        return Scoreboard.read(own / str(told.board)), own / str(told.backends)
    raise problem
