"""The command ``check``: is the config file right, and could a worker start with it?"""

from __future__ import annotations

import argparse
import os
import sys

from prefork_socketmap.daemon import configfile
from prefork_socketmap.daemon.configfile import Settings
from prefork_socketmap.prefork.takeover import TakeoverError, refuse_another_layout


def check(arguments: argparse.Namespace) -> int:
    """Check the config file and open its maps; print what is wrong and return the exit code."""
    try:
        refuse_another_layout()
    except TakeoverError as error:
        print(f"prefork-socketmap: {error}", file=sys.stderr)
        return os.EX_UNAVAILABLE
    settings = configfile.load(arguments.config)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_open_maps(settings))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return _complain(f"{settings.path}: opening the maps ended with signal {-code}")
    if code == os.EX_OK:
        print(f"{settings.path}: OK")
    return code


def _open_maps(settings: Settings) -> int:
    """Do, in a process of its own, what a worker would do: as another user, with code that may do anything."""
    from prefork_socketmap.daemon import worker

    try:
        worker.open_maps(settings)
    except BaseException as error:  # noqa: BLE001 - user code, which may call sys.exit()
        return _complain(describe(error))
    return os.EX_OK


def _complain(problem: str) -> int:
    print(f"prefork-socketmap: {problem}", file=sys.stderr, flush=True)
    return os.EX_CONFIG


def describe(error: BaseException) -> str:
    """Return what went wrong, with the exception's type unless the text was worded for the user."""
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
