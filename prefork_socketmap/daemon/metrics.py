"""The metrics process, as the master keeps it: started, watched, started again; taken along by reload and upgrade.

Whoever scrapes talks to that process alone (see ``exporter``). It gets a descriptor to read the scoreboard, and one
whose end tells it that the master is gone. The master waits for it in no way, and serves without it as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from prefork_socketmap.daemon.configfile import LogSettings, Settings
from prefork_socketmap.daemon.privileges import ENVIRONMENT
from prefork_socketmap.prefork.plan import Observer

log = logging.getLogger("prefork_socketmap.master")

MODULE = "prefork_socketmap.daemon.exporter"
LIFELINE, BOARD, BACKENDS = 3, 4, 5
"""The descriptors that the process finds open, beside the standard ones."""
DESCRIPTOR = "metrics"
"""The name of the descriptor that an upgrade hands on."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_STEADY = 60.0  # seconds: who has lived for so long may be started again at once
_GRACE = 5.0  # seconds between asking it to end and killing it
_LOOK = 0.1
_NEVER = float("inf")
_ABOVE = 16  # the numbers of the descriptors while they are moved to their places


@dataclass(frozen=True)
class Spec:
    """What the process is to do. ``user`` and ``group``: whom it runs as when the master is root."""

    listen: str
    log: LogSettings
    user: str = "nobody"
    group: str | None = None

    @classmethod
    def of(cls, settings: Settings) -> Spec | None:
        """Return what *settings* want; None: no such process."""
        if settings.metrics is None:
            return None
        endpoint = str(settings.metrics).removeprefix("inet:")
        if settings.account is None:
            return cls(endpoint, settings.log)
        return cls(endpoint, settings.log, settings.account.user, str(settings.account.gid))

    def encode(self) -> str:
        """Return it as an argument of a command."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> Spec:
        """Undo ``encode``."""
        document = json.loads(text)
        return cls(**{**document, "log": LogSettings(**document["log"])})


@dataclass
class _Process:
    """A running process, or one that has just ended: a descriptor of it, and the one whose end it waits for."""

    descriptor: int
    lifeline: int | None
    spec: Spec | None
    started: float
    kill_at: float = _NEVER

    def ending(self) -> str | None:
        """Return how it has ended; None while it has not."""
        try:
            found = os.waitid(os.P_PIDFD, self.descriptor, os.WEXITED | os.WNOHANG)
        except ChildProcessError:  # as process 1 we wait for all children
            return "ended"
        if found is None:
            return None
        how = "exited with status" if found.si_code == os.CLD_EXITED else "was killed by signal"
        return f"{how} {found.si_status}"

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.descriptor, number)

    def close(self) -> None:
        os.close(self.descriptor)
        self.let_go()

    def let_go(self) -> None:
        """Let it end: its lifeline does."""
        if self.lifeline is not None:
            os.close(self.lifeline)
            self.lifeline = None


class Metrics(Observer):
    """Keeps the process running that the settings want.

    *interpreter* is the beginning of the command. *boards*: returns the descriptors of the scoreboard and of the
    board of the backends. *descriptors*: what an upgrade hands on; *former* is what it has handed to us.
    """

    def __init__(
        self,
        interpreter: Sequence[str],
        boards: Callable[[], Sequence[int]],
        descriptors: dict[str, int],
        former: int | None,
    ) -> None:
        self._interpreter = interpreter
        self._boards = boards
        self._descriptors = descriptors
        self._next: Spec | None = None
        self._wanted: Spec | None = None
        self._process: _Process | None = None
        self._pause = 0.0
        self._resume = 0.0
        if former is not None:
            os.set_inheritable(former, False)
            # Of the program that was here before: it ends, since that held its lifeline.
            self._process = _Process(former, None, None, monotonic())
        os.register_at_fork(after_in_child=self._leave_to_child)

    @property
    def endpoints(self) -> list[str]:
        """Where metrics are served, or will be."""
        return [f"http://{self._wanted.listen}"] if self._wanted else []

    def prepare(self, settings: Settings) -> None:
        """Note what *settings* want, if they come into force."""
        self._next = Spec.of(settings)

    def ready(self, generation: int) -> None:  # noqa: ARG002
        """Start it."""
        self._apply()

    def reloaded(self, generation: int, problem: str | None) -> None:  # noqa: ARG002
        """Have it do what is wanted now."""
        if problem is None:
            self._apply()

    def stopping(self) -> None:
        """End it."""
        self._wanted = None
        self.due(monotonic())

    def close(self) -> None:
        """Let it end, however the server does."""
        if self._process:
            self._process.close()
            self._process = None

    def due(self, now: float) -> float:
        """Look after it. Return when to look again; its end is a signal."""
        process = self._process
        if process and (ending := process.ending()):
            self._end(process, ending, now)
            process = None
        if process is None:
            if self._wanted is None:
                return _NEVER
            if now < self._resume:
                return self._resume
            self._start(self._wanted, now)
            return _NEVER if self._process else self._resume
        if process.spec == self._wanted:
            return _NEVER
        return self._replace(process, now)

    def _apply(self) -> None:
        self._wanted = self._next
        self._pause = self._resume = 0.0
        self.due(monotonic())

    def _replace(self, process: _Process, now: float) -> float:
        """End one that does what is not wanted any more; the next is started when it has ended."""
        if process.kill_at == _NEVER:
            process.kill_at = now + _GRACE
            process.let_go()
            process.send(signal.SIGTERM)
        elif now >= process.kill_at:
            process.send(signal.SIGKILL)
        return now + _LOOK

    def _end(self, process: _Process, ending: str, now: float) -> None:
        process.close()
        self._process = None
        self._descriptors.pop(DESCRIPTOR, None)
        if process.spec is None or process.spec != self._wanted:
            return
        steady = now - process.started >= _STEADY
        self._pause = _FIRST_PAUSE if steady else min(self._pause * 2, _LONGEST_PAUSE) or _FIRST_PAUSE
        self._resume = now + self._pause
        log.error("the metrics process %s; it is started again in %.0f s", ending, self._pause)

    def _start(self, spec: Spec, now: float) -> None:
        try:
            self._process = self._spawn(spec, now)
        except OSError as error:
            self._pause = min(self._pause * 2, _LONGEST_PAUSE) or _FIRST_PAUSE
            self._resume = now + self._pause
            log.error("the metrics process cannot be started: %s; next attempt in %.0f s", error, self._pause)
            return
        self._descriptors[DESCRIPTOR] = self._process.descriptor

    def _spawn(self, spec: Spec, now: float) -> _Process:
        with contextlib.ExitStack() as opened:
            reader, writer = os.pipe()
            opened.callback(os.close, reader)
            sources = [fcntl.fcntl(reader, fcntl.F_DUPFD_CLOEXEC, _ABOVE)]
            opened.callback(os.close, sources[0])
            for fd in self._boards():
                # For reading only, whatever becomes of the process.
                board = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
                opened.callback(os.close, board)
                sources.append(fcntl.fcntl(board, fcntl.F_DUPFD_CLOEXEC, _ABOVE))
                opened.callback(os.close, sources[-1])
            try:
                pid = os.posix_spawn(
                    self._interpreter[0],
                    [*self._interpreter, "-m", MODULE, spec.encode()],
                    _environment(),
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, source, target)
                        for source, target in zip(sources, (LIFELINE, BOARD, BACKENDS), strict=True)
                    ],
                    setpgroup=0,  # a terminal's signals are for the master
                    setsigmask=[],
                    setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
                )
            except OSError:
                os.close(writer)
                raise
        return _Process(os.pidfd_open(pid), writer, spec, now)

    def _leave_to_child(self) -> None:
        """In a process that is forked off: the lifeline is held by the master alone."""
        if self._process:
            self._process.close()
            self._process = None


def _environment() -> dict[str, str]:
    prefixes = (*(name[:-1] for name in ENVIRONMENT if name.endswith("*")), "PYTHON")
    return {name: value for name, value in os.environ.items() if name in ENVIRONMENT or name.startswith(prefixes)}
