"""The command ``check``: is the config file right, and could a worker start with it?"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from prefork_socketmap.daemon import caches, configfile, log, trust
from prefork_socketmap.daemon.configfile import LogSettings, Settings
from prefork_socketmap.prefork.upgrade import UpgradeError, is_for_upgrade, refuse_another_layout
from prefork_socketmap.settings import SettingError

if TYPE_CHECKING:
    from prefork_socketmap.maps.base import Map

# A dead server costs each of its maps a timeout, and who upgrades during an outage does not wait for ever.
_LONGEST_VERIFICATION = 10.0


def check(arguments: argparse.Namespace) -> int:
    """Check the config file and open its maps; print what is wrong and return the exit code."""
    try:
        refuse_another_layout()
    except UpgradeError as error:
        print(f"prefork-socketmap: {error}", file=sys.stderr)
        return os.EX_UNAVAILABLE
    settings = configfile.load(arguments.config)
    if is_for_upgrade():  # otherwise the server may be, or become, another user's
        trust.refuse_places(settings.places)
    log.set_up("check", LogSettings(level="warning", budget=0), waits=True)
    for warning in [*trust.examine(settings), *caches.missing(settings)]:
        print(f"prefork-socketmap: warning: {warning}", file=sys.stderr)
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
        _verify(settings.path, worker.open_maps(settings).values())
    except BaseException as error:  # noqa: BLE001 - user code, which may call sys.exit()
        return _complain(describe(error))
    return os.EX_OK


def _verify(path: Path, maps: Iterable[Map]) -> None:
    """Have *maps* ask their servers whether the queries are right; where none answers, warn."""
    from prefork_socketmap.maps.base import UncheckedError

    deadline = time.monotonic() + _LONGEST_VERIFICATION
    for each in maps:
        try:
            if time.monotonic() >= deadline:
                raise UncheckedError(f"maps.{each.name}", "cannot be checked: other maps have taken too long")
            each.verify()
        except UncheckedError as doubt:
            print(f"prefork-socketmap: warning: {configfile.in_file(path, doubt)}", file=sys.stderr, flush=True)
        except SettingError as error:
            raise configfile.in_file(path, error) from error


def _complain(problem: str) -> int:
    print(f"prefork-socketmap: {problem}", file=sys.stderr, flush=True)
    return os.EX_CONFIG


def describe(error: BaseException) -> str:
    """Return what went wrong, with the exception's type unless the text was worded for the user."""
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
