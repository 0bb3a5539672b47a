"""The commands ``reload``, ``upgrade`` and ``stop``: they find the running server, signal it, and wait.

Whom to signal is told by the lock on the pid file, and the signal is sent through a descriptor of that very process
(pidfd_open(2)): no other process ever gets it, however stale a file is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefork_socketmap.daemon import configfile, pidfile, state
from prefork_socketmap.daemon.configfile import Places
from prefork_socketmap.settings import SettingError

# Exit codes of an init script's actions: LSB, "Init Script Actions".
FAILED = 1
NOT_RUNNING_FOR_AN_ACTION = 7

RELOAD_TIMEOUT = 120.0
"""How long ``reload`` waits, in seconds: a new worker has a minute to get ready, and another reload may be ahead."""
_PAUSE = 0.05


@dataclass(frozen=True)
class Server:
    """A running server: its pid, and a descriptor that stands for its process."""

    pid: int
    descriptor: int

    def send(self, number: signal.Signals) -> None:
        """Send a signal. Raises PermissionError, or ProcessLookupError when the process has ended."""
        signal.pidfd_send_signal(self.descriptor, number)

    def has_ended(self, within: float | None) -> bool:
        """Wait *within* seconds for its end, None: as long as it takes; return whether it has come."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(None if within is None else within * 1000))


@contextlib.contextmanager
def running(places: Places) -> Iterator[Server | None]:
    """Find the server that holds the lock on the pid file."""
    pid = pidfile.holder(places.pid_file)
    if pid is None:
        yield None
        return
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        # Asked again: only now is it certain that the descriptor stands for the process that holds the lock.
        yield Server(pid, descriptor) if pidfile.holder(places.pid_file) == pid else None
    finally:
        os.close(descriptor)


def reload(arguments: argparse.Namespace) -> int:
    """Make the server read its config file again; wait for the outcome and return the exit code."""
    return _renew(arguments, signal.SIGHUP, "reload")


def upgrade(arguments: argparse.Namespace) -> int:
    """Make the server run the program that is installed by now; wait for the outcome and return the exit code."""
    return _renew(arguments, signal.SIGUSR2, "upgrade")


def _renew(arguments: argparse.Namespace, number: signal.Signals, what: str) -> int:
    places = configfile.load_places(arguments.config).with_pid_file(arguments.pid_file)
    with running(places) as server:
        if not server:
            return _complain("not running", NOT_RUNNING_FOR_AN_ACTION)
        sent = time.monotonic()
        server.send(number)
        outcome = _await_reload(server, places.state_file, sent)
    if outcome is None:
        return _complain(f"the outcome of the {what} is not known; see the log", FAILED)
    if outcome.problem:
        return _complain(f"{what} refused, the server goes on as it was: {outcome.problem}", FAILED)
    return os.EX_OK


def _await_reload(server: Server, file: Path, sent: float) -> state.Reload | None:
    """Return the outcome of a reload that began after *sent*; None when there is none, or the server has ended."""
    deadline = sent + RELOAD_TIMEOUT
    while time.monotonic() < deadline and not server.has_ended(within=_PAUSE):
        found = state.read(file)
        if found and found.reload and found.reload.done and found.reload.began >= sent:
            return found.reload
    return None


def stop(arguments: argparse.Namespace) -> int:
    """Let the server finish its lookups and stop; wait until it is gone and return the exit code."""
    with running(places_of(arguments)) as server:
        if not server:
            print("prefork-socketmap is not running")
            return os.EX_OK
        server.send(signal.SIGTERM)
        # No limit of our own: the server knows how long its lookups may take (stop_timeout), and keeps to it.
        server.has_ended(within=None)
    return os.EX_OK


def places_of(arguments: argparse.Namespace) -> Places:
    """Return where the server is found, even if the config file cannot be read by now: it can be stopped anyway."""
    try:
        places = configfile.load_places(arguments.config)
    except SettingError as error:
        places = Places()
        print(f"prefork-socketmap: {error}; looking for the server in {places.runtime_dir}", file=sys.stderr)
    return places.with_pid_file(arguments.pid_file)


def _complain(problem: str, code: int) -> int:
    print(f"prefork-socketmap: {problem}", file=sys.stderr)
    return code
