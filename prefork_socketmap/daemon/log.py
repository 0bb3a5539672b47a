"""Where log lines go, and what they look like: Postfix's look, on syslog or on stderr, never on both.

A line is ``prefork-socketmap/worker[PID]: warning: text``. Whatever a client or a database puts into the text stays
inside its line. An error that repeats is logged once and then counted.
"""

from __future__ import annotations

import logging
import os
import sys
import syslog
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TextIO

from prefork_socketmap.daemon.configfile import LogSettings

NAME = "prefork-socketmap"
MAX_LENGTH = 2000  # syslog daemons cut longer lines, and so does Postfix
REPEAT_INTERVAL = 60.0

_PRIORITIES = {
    logging.DEBUG: syslog.LOG_DEBUG,
    logging.INFO: syslog.LOG_INFO,
    logging.WARNING: syslog.LOG_WARNING,
    logging.ERROR: syslog.LOG_ERR,
    logging.CRITICAL: syslog.LOG_CRIT,
}
# Postfix writes no prefix for what is merely told.
_PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "fatal: "}


def set_up(process: str, settings: LogSettings) -> None:
    """Send the log of this process, the ``"master"`` or a ``"worker"``, where *settings* say."""
    handler = SyslogHandler(process) if settings.to == "syslog" else StderrHandler(process)
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    root = logging.getLogger()
    root.handlers[:] = [CountingHandler(handler)]
    # Debugging us is no reason to debug every library: some log at that level what is secret.
    root.setLevel(max(level, logging.INFO))
    logging.getLogger("prefork_socketmap").setLevel(level)


def printable(text: str) -> str:
    """Return *text* with everything that is not printable, line ends above all, as a backslash escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class LineFormatter(logging.Formatter):
    """Makes of a record one printable line, and one more, indented, for each line of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of *record*."""
        lines = [_PREFIXES.get(record.levelno, "") + printable(record.getMessage())]
        if record.exc_info:
            # The indent tells them from lines of their own, which a hostile key in a message could otherwise forge.
            lines += [f"  {printable(line)}" for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(line[:MAX_LENGTH] for line in lines)


class SyslogHandler(logging.Handler):
    """Logs to syslog, facility mail, through the C library, which finds a restarted syslog daemon by itself."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())
        syslog.openlog(f"{NAME}/{process}", syslog.LOG_PID, syslog.LOG_MAIL)

    def emit(self, record: logging.LogRecord) -> None:
        """Log *record*."""
        for line in self.format(record).split("\n"):
            syslog.syslog(_PRIORITIES.get(record.levelno, syslog.LOG_INFO), line)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Logs to stderr, each line with the tag that it would have in a syslog file."""

    def __init__(self, process: str) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(LineFormatter())
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of *record*, each with the tag."""
        tag = f"{NAME}/{self._process}[{os.getpid()}]: "
        return "\n".join(tag + line for line in super().format(record).split("\n"))


@dataclass
class _Repetition:
    """A warning that was logged, and how often it came again."""

    record: logging.LogRecord
    since: float
    count: int = 0


class CountingHandler(logging.Handler):
    """Passes records on to *target*, but a warning or error that repeats only once in *interval* seconds.

    Two records are the same when they have the same text before the arguments are put in, the same first argument
    and the same kinds of exceptions. So the first argument says what failed (a map, an endpoint), and the others,
    a key for one, may differ. How often it came again is logged after the interval, with the next line of any kind.
    """

    _MOST = 1000  # identities are remembered: whoever can vary the first argument shall not fill the memory

    def __init__(
        self, target: logging.Handler, interval: float = REPEAT_INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._target = target
        self._interval = interval
        self._clock = clock
        self._repetitions: dict[Hashable, _Repetition] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Log *record*, or count it."""
        now = self._clock()
        self._report(now - self._interval)
        if record.levelno < logging.WARNING:
            self._target.handle(record)
            return
        identity = _identity(record)
        if identity in self._repetitions:
            self._repetitions[identity].count += 1
            return
        if len(self._repetitions) >= self._MOST:
            self._report(now)
        self._repetitions[identity] = _Repetition(record, now)
        self._target.handle(record)

    def close(self) -> None:
        """Log the counts that are still to be told."""
        self._report(self._clock())
        super().close()

    def _report(self, until: float) -> None:
        """Log how often the records that were first logged before *until* came again, and forget them."""
        # In the order of their beginning, so the first that is too young ends it.
        while self._repetitions:
            identity, repetition = next(iter(self._repetitions.items()))
            if repetition.since > until:
                return
            del self._repetitions[identity]
            if repetition.count:
                self._target.handle(_summary(repetition))


def _identity(record: logging.LogRecord) -> Hashable:
    arguments = record.args if isinstance(record.args, tuple) else ()
    exceptions = [type(argument) for argument in arguments if isinstance(argument, BaseException)]
    if record.exc_info:
        exceptions.append(record.exc_info[0] or BaseException)
    return record.name, record.levelno, record.msg, str(arguments[:1]), tuple(exceptions)


def _summary(repetition: _Repetition) -> logging.LogRecord:
    record = repetition.record
    return logging.LogRecord(
        record.name,
        record.levelno,
        record.pathname,
        record.lineno,
        "%d more times: %s",
        (repetition.count, record.getMessage()),
        None,
    )
