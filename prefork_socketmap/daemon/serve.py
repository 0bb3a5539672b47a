"""The command ``serve``: a master with everything around it that a service needs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Protocol

from prefork_socketmap.daemon import activation, backends, configfile, log, trust
from prefork_socketmap.daemon.backends import Memory
from prefork_socketmap.daemon.caches import Caches
from prefork_socketmap.daemon.configfile import Places, Settings
from prefork_socketmap.daemon.journal import complain
from prefork_socketmap.daemon.metrics import DESCRIPTOR, Metrics
from prefork_socketmap.daemon.notify import ServiceManager
from prefork_socketmap.daemon.pidfile import AlreadyRunningError, PidFile
from prefork_socketmap.daemon.state import StateFile
from prefork_socketmap.daemon.worker import plan
from prefork_socketmap.prefork.master import Master
from prefork_socketmap.prefork.plan import Observer, Plan
from prefork_socketmap.prefork.reload import StartError
from prefork_socketmap.prefork.scoreboard import Scoreboard
from prefork_socketmap.prefork.upgrade import MasterState, Upgrade
from prefork_socketmap.settings import SettingError

logger = logging.getLogger("prefork_socketmap.master")


# Names of descriptors that an upgrade hands on.
_PID_FILE = "pid_file"
_STATE = "state"
_LAST_STANDARD = 2
_FORBIDDEN = (errno.EPERM, errno.EACCES, errno.EROFS)


class Launch(Protocol):
    """Whom to tell how the start went."""

    def succeeded(self) -> None:
        """Lookups are answered."""

    def failed(self, code: int, reason: str) -> None:
        """They will not be; exit with *code*."""


class Foreground:
    """A start that somebody watches on a terminal, or a service manager through the log."""

    def succeeded(self) -> None:
        """Be silent: that is what success looks like."""

    def failed(self, code: int, reason: str) -> None:
        """Tell why."""
        complain(reason, code)


@dataclass(frozen=True)
class Source:
    """The config file, and what the command line puts in place of what it says."""

    path: Path
    pid_file: Path | None
    verbose: bool
    detached: bool

    def command(self, name: str) -> list[str]:
        """Return the command line that runs *name* with the program that is installed by then."""
        command = [sys.executable, *_safe_path(), "-m", "prefork_socketmap", name, "-c", str(self.path)]
        if name == "serve":
            command += ["--pid-file", str(self.pid_file)] if self.pid_file else []
            command += ["--verbose"] if self.verbose else []
            command += ["--daemon"] if self.detached else []
        return command

    def load(self) -> Settings:
        """Read the file. Raises SettingError."""
        settings = configfile.load(self.path)
        lines = settings.log
        if self.verbose:
            lines = dataclasses.replace(lines, level="debug")
        if self.detached:
            lines = dataclasses.replace(lines, to="syslog")  # there is no stderr
        return dataclasses.replace(settings, log=lines, places=settings.places.with_pid_file(self.pid_file))


def _safe_path() -> list[str]:
    """Return the option that keeps Python from looking for modules in the current directory, unless it has before.

    With -m it does, and somebody else might have put a program of our name there.
    """
    was_script = sys.modules["__main__"].__spec__ is None
    return ["-P"] if sys.flags.safe_path or was_script else []


def serve(arguments: argparse.Namespace) -> int:
    """Answer lookups until a signal says stop; in the background, return when they are answered."""
    source = Source(
        arguments.config.absolute(),
        arguments.pid_file and arguments.pid_file.absolute(),
        arguments.verbose,
        arguments.daemon,
    )
    settings = source.load()
    inherited = activation.inherited_sockets()
    state = MasterState.from_environment()
    if not state:
        _close_what_was_left_open([sock.fileno() for sock in inherited])
    run = functools.partial(_run, source, settings, inherited, state)
    if not arguments.daemon or state:  # the program before us was in the background, and so are we
        return run(Foreground())
    from prefork_socketmap.daemon.detach import in_background

    return in_background(run, [sock.fileno() for sock in inherited])


def _close_what_was_left_open(keep: Collection[int]) -> None:
    """Close the descriptors, but for *keep*, that whoever started this program had: every worker would have them."""
    for number in [int(each.name) for each in Path("/proc/self/fd").iterdir()]:
        with contextlib.suppress(OSError):  # that of the directory itself
            # What this program has opened itself does not survive an execve(2), and stays.
            if number > _LAST_STANDARD and number not in keep and os.get_inheritable(number):
                os.close(number)


def _run(
    source: Source, settings: Settings, inherited: Sequence[socket], state: MasterState | None, launch: Launch
) -> int:
    log.set_up("master", settings.log)
    try:
        with contextlib.ExitStack() as held, _claimed(settings, state) as claim:
            _warn(settings)
            metrics = Metrics(
                [sys.executable, *_safe_path()],
                lambda: (master.board.fileno(), claim.backends.board),
                claim.descriptors,
                state.others.get(DESCRIPTOR) if state else None,
            )
            held.callback(metrics.close)
            metrics.prepare(settings)
            caches = Caches(claim.descriptors, state.others if state else {})
            master = Master(
                plan(settings, claim.backends, caches.prepare(settings), is_first=state is None),
                load=functools.partial(_reload, source, claim.backends, caches, metrics),
                observer=Observers([caches, metrics, claim.state_file, ServiceManager(), Launched(launch), Log()]),
                inherited=inherited,
                upgrade=Upgrade(source.command("check"), source.command("serve"), claim.descriptors),
                state=state,
                board=claim.board,
            )
            claim.state_file.show_boards(master.board.fileno(), claim.backends.board)
            claim.state_file.listening = lambda: [*map(str, master.endpoints), *metrics.endpoints]
            master.run()
    except SettingError as error:
        return _fail(launch, os.EX_CONFIG, str(error))
    except StartError as error:
        return _fail(launch, os.EX_CONFIG if error.is_setting else os.EX_UNAVAILABLE, str(error))
    except OSError as error:
        # What is forbidden stays so, however often a service manager tries again.
        return _fail(launch, os.EX_NOPERM if error.errno in _FORBIDDEN else os.EX_UNAVAILABLE, str(error))
    except AlreadyRunningError as error:
        return _fail(launch, 1, str(error))
    return os.EX_OK


def _reload(source: Source, memory: Memory, caches: Caches, metrics: Metrics) -> Plan:
    settings = source.load()
    log.set_up("master", settings.log)
    _warn(settings)
    shared = caches.prepare(settings)
    metrics.prepare(settings)
    return plan(settings, memory, shared)


def _fail(launch: Launch, code: int, reason: str) -> int:
    launch.failed(code, reason)
    return code


@dataclass
class Claim:
    """What shows that this server runs, for as long as it does."""

    state_file: StateFile
    descriptors: dict[str, int] = dataclasses.field(default_factory=dict)
    board: Scoreboard | None = None
    backends: Memory = dataclasses.field(init=False)

    def share(self, memory: Memory) -> None:
        """Have the workers share *memory*."""
        self.backends = memory
        self.descriptors |= memory.descriptors()


@contextlib.contextmanager
def _claimed(settings: Settings, state: MasterState | None) -> Iterator[Claim]:
    """Hold the pid file while the server runs, or go on holding it, with *state*.

    Raises AlreadyRunningError, or OSError when a place that somebody chose cannot be written. In the default places
    that is only a warning: whoever tries the server out from a checkout need not be root for it.
    """
    places = settings.places
    with contextlib.ExitStack() as held:
        state_file = StateFile(settings.path, places, state.others.get(_STATE) if state else None)
        held.callback(state_file.remove)
        claim = Claim(state_file, {_STATE: state_file.fileno()})
        try:
            _claim(claim, places, state, held)
        except OSError as error:
            if not places.are_defaults:
                raise
            logger.warning("others than its own user will not see what this server does: %s; set runtime_dir", error)
            state_file.has_file = False
            claim.share(_backends(None, state))
        yield claim


def _claim(claim: Claim, places: Places, state: MasterState | None, held: contextlib.ExitStack) -> None:
    places.runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    if not state:  # otherwise the check of this program has done it, and to end here would be worse
        trust.refuse_places(places)
    pid_file = PidFile(places.pid_file, state.others.get(_PID_FILE) if state else None)
    held.callback(pid_file.remove)
    board = Scoreboard.resume(state.board, places.scoreboard) if state else Scoreboard(places.scoreboard)
    held.callback(board.remove)
    claim.descriptors[_PID_FILE] = pid_file.fileno()
    claim.board = board
    memory = _backends(places.backends, state)
    held.callback(memory.remove)
    claim.share(memory)


def _backends(path: Path | None, state: MasterState | None) -> Memory:
    """Go on with the memory of the program that was here before, or make new memory."""
    former = [state.others[name] for name in backends.DESCRIPTORS if name in state.others] if state else []
    return (Memory.resume(path, *former) if former else None) or Memory.make(path)


def _warn(settings: Settings) -> None:
    """Warn of what is dangerous, or raise SettingError if it is too much so."""
    for warning in trust.examine(settings):
        logger.warning(warning)  # each is a kind of its own
    if os.geteuid() == 0 and settings.account is None:
        logger.warning('workers run as root, which no map needs: set user = "..." in %s', settings.path)


class Observers(Observer):
    """Passes on to several observers what the master tells."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def ready(self, generation: int) -> None:
        """The first generation serves."""
        for observer in self._observers:
            observer.ready(generation)

    def reloading(self) -> None:
        """A reload begins."""
        for observer in self._observers:
            observer.reloading()

    def reloaded(self, generation: int, problem: str | None) -> None:
        """A reload is over."""
        for observer in self._observers:
            observer.reloaded(generation, problem)

    def stopping(self) -> None:
        """The server stops serving."""
        for observer in self._observers:
            observer.stopping()

    def due(self, now: float) -> float:
        """Something may have to be done regularly."""
        return min(observer.due(now) for observer in self._observers)


class Log(Observer):
    """Sends what of the log waits for a reader, and tells what was counted, when nothing else is logged."""

    def due(self, now: float) -> float:  # noqa: ARG002 - an Observer
        """Look after it."""
        return log.look()


class Launched(Observer):
    """Tells whoever waits for the start that it succeeded."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def ready(self, generation: int) -> None:  # noqa: ARG002 - an Observer
        """Tell."""
        self._launch.succeeded()
