"""Where log lines go: to syslog or to stderr, never to both. Each begins with ``prefork-socketmap/worker[PID]: ``.

What they look like is in ``line``, how many there may be in ``budget``, and how they leave in ``outlet``.
"""

from __future__ import annotations

import logging
import os
import sys
import syslog
import time
from collections.abc import Iterator

from prefork_socketmap.daemon.budget import Budget, CountingHandler
from prefork_socketmap.daemon.configfile import LogSettings
from prefork_socketmap.daemon.line import LineFormatter
from prefork_socketmap.daemon.outlet import Outlet, Stderr, Syslog

NAME = "prefork-socketmap"
_RETRY_INTERVAL = 1.0

_PRIORITIES = {
    logging.DEBUG: syslog.LOG_DEBUG,
    logging.INFO: syslog.LOG_INFO,
    logging.WARNING: syslog.LOG_WARNING,
    logging.ERROR: syslog.LOG_ERR,
    logging.CRITICAL: syslog.LOG_CRIT,
}
# Who asks for a line per lookup gets it, whatever it costs.
_LOOKUPS = "prefork_socketmap.worker.lookups"


def set_up(process: str, settings: LogSettings, *, waits: bool = False) -> None:
    """Send the log of this process, the ``"master"`` or a ``"worker"``, where *settings* say, without ever waiting.

    With *waits*, a stderr that nobody reads is waited for. What still waits to be written, or told, is not forgotten
    when the destination stays the same.
    """
    root = logging.getLogger()
    destination = f"{NAME}/{process} to {settings.to}"
    handler = next((each for each in _handlers() if each.name == destination), None)
    for each in _handlers():
        if each is not handler:
            each.close()
    if handler is None:
        handler = Handler(_outlet(f"{NAME}/{process}", settings.to, waits=waits), Budget(settings.budget))
        handler.name = destination
    handler.budget.limit = settings.budget
    root.handlers[:] = [handler]
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    # Debugging us is no reason to debug every library: some log at that level what is secret.
    root.setLevel(max(level, logging.INFO))
    logging.getLogger("prefork_socketmap").setLevel(level)


def look() -> float:
    """Tell what is to be told at a time, or waits; return when to look again, in seconds of the monotonic clock."""
    return min((handler.look() for handler in _handlers()), default=float("inf"))


def _handlers() -> Iterator[Handler]:
    return (handler for handler in logging.getLogger().handlers[:] if isinstance(handler, Handler))


def _outlet(name: str, to: str, *, waits: bool) -> Outlet:
    if to == "syslog":
        return Syslog(name)
    # Without a stderr, number 2 is any file, a client's connection perhaps.
    return Stderr(name, descriptor=2 if sys.stderr else os.open(os.devnull, os.O_WRONLY), waits=waits)


class LineHandler(logging.Handler):
    """Writes the lines of records to *outlet*, within *budget*."""

    def __init__(self, outlet: Outlet, budget: Budget) -> None:
        super().__init__()
        self._outlet = outlet
        self._budget = budget
        self._formatter = LineFormatter()

    def emit(self, record: logging.LogRecord) -> None:
        """Write *record*, or hold it back."""
        self.settle()
        lines = self._formatter.lines(record)
        is_wanted = record.levelno < logging.INFO or record.name == _LOOKUPS
        if is_wanted or self._budget.admits(len(lines), sum(len(line.encode()) for line in lines)):
            for line in lines:
                self._outlet.write(_PRIORITIES.get(record.levelno, syslog.LOG_INFO), line)

    def settle(self, *, early: bool = False) -> None:
        """Tell how many lines were held back in a minute that is over, or, if *early*, until now."""
        if held_back := self._budget.settle(early=early):
            problem = f"warning: {held_back} lines were held back: a minute's would be more than log.budget"
            self._outlet.write(syslog.LOG_WARNING, problem)

    def look(self) -> float:
        """Tell what is due, send what waits; return when to look again."""
        self.settle()
        return self._budget.due if self._outlet.flush() else time.monotonic() + _RETRY_INTERVAL

    def forget(self) -> None:
        """Begin anew, in a process that was forked off."""
        self._budget.forget()
        self._outlet.forget()

    def close(self) -> None:
        """Tell what is still to be told, send what waits, as far as there is room, and close the outlet."""
        self.settle(early=True)
        self._outlet.flush()
        self._outlet.close()
        super().close()


class Handler(CountingHandler):
    """The one handler of a process: counts what repeats, and writes the rest as lines."""

    def __init__(self, outlet: Outlet, budget: Budget) -> None:
        self.budget = budget
        self._lines = LineHandler(outlet, budget)
        super().__init__(self._lines)

    def look(self) -> float:
        """Tell what is due, send what waits; return when to look again."""
        return min(super().look(), self._lines.look())

    def forget(self) -> None:
        """Begin anew, in a process that was forked off: what was counted and what waits is for the parent to tell."""
        super().forget()
        self._lines.forget()

    def close(self) -> None:
        """Log the counts that are still to be told, send what waits, and close the outlet."""
        super().close()
        self._lines.close()


def _begin_anew() -> None:
    for handler in _handlers():
        handler.forget()


os.register_at_fork(after_in_child=_begin_anew)
