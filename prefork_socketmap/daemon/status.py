"""The command ``status``: whether the server runs, and what it is doing, for people and for programs.

That it runs is told by the lock on the pid file, the rest by the scoreboard and the state file: the server itself is
not asked, so it may be busy, stuck or stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from prefork_socketmap.daemon import asjson, backends, control, prometheus, report, state, tables
from prefork_socketmap.daemon.configfile import Places
from prefork_socketmap.daemon.control import Server
from prefork_socketmap.daemon.report import Finding
from prefork_socketmap.prefork.scoreboard import Scoreboard, ScoreboardError

# Exit codes of an init script's "status": LSB, "Init Script Actions".
DEAD_WITH_PID_FILE = 1
NOT_RUNNING = 3
UNKNOWN = 4

_RENDER = {"text": tables.render, "json": asjson.render, "prometheus": prometheus.render}
_CLEAR_SCREEN = "\x1b[H\x1b[2J"


def status(arguments: argparse.Namespace) -> int:
    """Print whether the server runs, and what it does; return the exit code that LSB demands of an init script."""
    places = control.places_of(arguments)
    if arguments.watch is None:
        return _show(places, arguments.format)
    try:
        while True:
            if sys.stdout.isatty():
                print(_CLEAR_SCREEN, end="")
            _show(places, arguments.format)
            sys.stdout.flush()
            time.sleep(arguments.watch)
    except KeyboardInterrupt:
        return os.EX_OK


def _show(places: Places, format_: str) -> int:
    try:
        finding = _look(places)
    except PermissionError as error:
        print(f"prefork-socketmap: not known whether it is running: {error}", file=sys.stderr)
        return UNKNOWN
    print(_RENDER[format_](finding), end="")
    return finding.code


def _look(places: Places) -> Finding:
    """Find the server. Raises PermissionError when that cannot be known."""
    with control.running(places) as server:
        if server:
            return _look_at(server, places)
    if places.pid_file.exists():
        return Finding(DEAD_WITH_PID_FILE, f"prefork-socketmap is dead: it left {places.pid_file} behind")
    return Finding(NOT_RUNNING, "prefork-socketmap is not running")


def _look_at(server: Server, places: Places) -> Finding:
    told = state.read(places.state_file)
    if not told or told.pid != server.pid:
        return Finding(os.EX_OK, f"prefork-socketmap is starting, pid {server.pid}", server.pid)
    line = f"prefork-socketmap is running, pid {server.pid}"
    try:
        board = Scoreboard.read(places.scoreboard)
    except (OSError, ScoreboardError) as error:
        return Finding(os.EX_OK, line, server.pid, problem=f"what it does cannot be read: {error}")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(board.started))
    problem = f"the last reload was refused: {told.reload.problem}" if told.reload and told.reload.problem else None
    found = report.make(board, backends.read(places.backends))
    return Finding(os.EX_OK, f"{line}, since {since}", server.pid, found, problem)
