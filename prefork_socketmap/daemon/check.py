"""The command ``check``: would a start succeed with this config file, and would every map answer?

All that a start does is done, short of serving: as the workers' user maps are opened, their servers asked, queries
prepared; as whoever checks, endpoints are bound that the running server of this file does not hold.
"""

from __future__ import annotations

import argparse
import os
import sys
import syslog
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from prefork_socketmap.daemon import caches, configfile, log, trust
from prefork_socketmap.daemon.configfile import DEFAULT_MAP, LogSettings, Settings
from prefork_socketmap.daemon.identity import Sought, UnidentifiedError
from prefork_socketmap.daemon.journal import complain
from prefork_socketmap.prefork.listener import ListenError, rehearse, resolve
from prefork_socketmap.prefork.upgrade import UpgradeError, is_for_upgrade, refuse_another_layout
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Status, printable

if TYPE_CHECKING:
    from prefork_socketmap.maps.base import Map


def check(arguments: argparse.Namespace) -> int:
    """Check the config file and all that it leads to; print what is wrong and return the exit code."""
    try:
        refuse_another_layout()
    except UpgradeError as error:
        return complain(str(error), os.EX_UNAVAILABLE)
    settings = configfile.load(arguments.config)
    probes = [_probe(text, settings) for text in arguments.probe]
    # Asked now: the environment that tells it is not for the code of maps.
    if for_upgrade := is_for_upgrade():  # otherwise the server may be, or become, another user's
        trust.refuse_places(settings.places)
    log.set_up("check", LogSettings(level="warning", budget=0), waits=True)
    for warning in [*trust.examine(settings), *caches.missing(settings)]:
        complain(f"warning: {warning}", priority=syslog.LOG_WARNING)
    code = _bind(settings)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_open_maps(settings, probes, connects=not arguments.no_connect, for_upgrade=for_upgrade))
    _, status = os.waitpid(child, 0)
    of_maps = os.waitstatus_to_exitcode(status)
    if of_maps < 0:
        return complain(f"{settings.path}: opening the maps ended with signal {-of_maps}", os.EX_CONFIG)
    code = max(code, of_maps)
    if code == os.EX_OK:
        print(f"{settings.path}: OK")
    return code


def _probe(text: str, settings: Settings) -> tuple[str, str]:
    name, equals, key = text.partition("=")
    if not equals:
        raise SettingError("--probe", f"{text!r} is not accepted here; expected MAP=KEY")
    if name not in settings.maps and settings.default_map is None:
        raise SettingError("--probe", f"there is no map {name!r}; the file has: {', '.join(settings.maps)}")
    return name, key


# Endpoints.


def _bind(settings: Settings) -> int:
    """Try to bind what the running server of the file does not hold; return the exit code."""
    held = _held(settings)
    code = os.EX_OK
    for endpoint in settings.endpoints:
        try:
            for address in resolve(endpoint):
                if str(address) not in held:
                    rehearse(address)
        except ListenError as error:
            code = complain(str(error.strerror), os.EX_UNAVAILABLE)
    if settings.metrics and f"http://{str(settings.metrics).removeprefix('inet:')}" not in held:
        try:
            rehearse(settings.metrics)
        except ListenError as error:
            code = complain(str(error.strerror), os.EX_UNAVAILABLE)
    return code


def _held(settings: Settings) -> Sequence[str]:
    """Return what the running server of the file listens on."""
    try:
        with Sought.of(settings.path, None).find() as server:
            told = server.state() if server else None
            return told.listening if told else ()
    except (OSError, UnidentifiedError):
        return ()


# Maps.


def _open_maps(settings: Settings, probes: Sequence[tuple[str, str]], *, connects: bool, for_upgrade: bool) -> int:
    """Do, in a process of its own, what a worker would do: as another user, with code that may do anything."""
    from prefork_socketmap.daemon import worker

    try:
        maps = worker.open_maps(settings)
        code = _verify(settings, maps.values(), for_upgrade=for_upgrade) if connects else os.EX_OK
        if settings.metrics:
            with configfile.errors_in(settings.path):
                _require_exporter()
        return max(code, *(_ask(maps, name, key) for name, key in probes)) if probes else code
    except BaseException as error:  # noqa: BLE001 - user code, which may call sys.exit()
        return complain(describe(error), os.EX_CONFIG)


def _require_exporter() -> None:
    from prefork_socketmap.daemon import exporter

    exporter.library()


def _verify(settings: Settings, maps: Iterable[Map], *, for_upgrade: bool) -> int:
    """Have *maps* ask their servers whether all is right; return the exit code."""
    from prefork_socketmap.daemon import worker
    from prefork_socketmap.maps.base import UncheckedError

    code = os.EX_OK
    for error in worker.verify(settings, maps):
        if not isinstance(error, UncheckedError):
            code = complain(str(error), os.EX_CONFIG)
        elif for_upgrade:  # a server that is down is no reason to go on with the old program
            complain(f"warning: {error}", priority=syslog.LOG_WARNING)
        else:
            code = complain(str(error), max(code, os.EX_UNAVAILABLE))
    return code


def _ask(maps: Mapping[str, Map], name: str, key: str) -> int:
    """Look *key* up in the map *name*; print the answer, as a server would give it, and return the exit code."""
    from prefork_socketmap.daemon import direct

    reply = direct.answer(maps[name if name in maps else DEFAULT_MAP], key)
    print(f"{name}={printable(key)}: {reply.status.value} {printable(reply.text)}".rstrip(), flush=True)
    return os.EX_OK if reply.status in (Status.OK, Status.NOT_FOUND) else os.EX_TEMPFAIL


def describe(error: BaseException) -> str:
    """Return what went wrong, with the exception's type unless the text was worded for the user."""
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
