"""The commands ``reload``, ``upgrade`` and ``stop``: they find the running server, signal it, and wait."""

from __future__ import annotations

import argparse
import os
import signal
import time

from prefork_socketmap.daemon import state
from prefork_socketmap.daemon.identity import Server, Sought, UnidentifiedError
from prefork_socketmap.daemon.journal import complain

# Exit codes of an init script's actions: LSB, "Init Script Actions".
FAILED = 1
NOT_RUNNING_FOR_AN_ACTION = 7

RELOAD_TIMEOUT = 120.0
"""How long ``reload`` waits, in seconds: a new worker has a minute to get ready, and another reload may be ahead."""
_PAUSE = 0.05


def reload(arguments: argparse.Namespace) -> int:
    """Make the server read its config file again; wait for the outcome and return the exit code."""
    return _renew(arguments, signal.SIGHUP, "reload")


def upgrade(arguments: argparse.Namespace) -> int:
    """Make the server run the program that is installed by now; wait for the outcome and return the exit code."""
    return _renew(arguments, signal.SIGUSR2, "upgrade")


def _renew(arguments: argparse.Namespace, number: signal.Signals, what: str) -> int:
    sought = sought_by(arguments)
    try:
        with sought.find() as server:
            if not server:
                return _not_found(sought, NOT_RUNNING_FOR_AN_ACTION)
            sent = time.monotonic()
            server.send(number)
            outcome = _await_reload(server, sent)
    except UnidentifiedError as error:
        return complain(str(error), FAILED)
    if outcome is None:
        return complain(f"the outcome of the {what} is not known; see the log", FAILED)
    if outcome.problem:
        return complain(f"{what} refused, the server goes on as it was: {outcome.problem}", FAILED)
    return os.EX_OK


def _await_reload(server: Server, sent: float) -> state.Reload | None:
    """Return the outcome of a reload that began after *sent*; None when there is none, or the server has ended."""
    deadline = sent + RELOAD_TIMEOUT
    while time.monotonic() < deadline and not server.has_ended(within=_PAUSE):
        found = server.state()
        if found and found.reload and found.reload.done and found.reload.began >= sent:
            return found.reload
    return None


def stop(arguments: argparse.Namespace) -> int:
    """Let the server finish its lookups and stop; wait until it is gone and return the exit code."""
    sought = sought_by(arguments)
    try:
        with sought.find() as server:
            if not server:
                return _not_found(sought, os.EX_OK)
            server.send(signal.SIGTERM)
            # No limit of our own: the server knows how long its lookups may take (stop_timeout), and keeps to it.
            server.has_ended(within=None)
    except UnidentifiedError as error:
        return complain(str(error), FAILED)
    return os.EX_OK


def sought_by(arguments: argparse.Namespace) -> Sought:
    """Return which server the command line is about; say so if the config file does not tell any more."""
    sought = Sought.of(arguments.config, arguments.pid_file)
    if sought.problem:
        complain(f"{sought.problem}; looking for a server that was started with it")
    return sought


def _not_found(sought: Sought, code: int) -> int:
    """Say that the server does not run; return *code*, unless there is another one that might have been meant."""
    if other := sought.other():
        return complain(other, FAILED)
    if sought.problem:
        return complain(f"no server runs that was started with {sought.config}", os.EX_CONFIG)
    if code != os.EX_OK:
        return complain("not running", code)
    print("prefork-socketmap is not running")
    return code
