"""How much a process may log: what repeats is counted, and only so many bytes are written in a minute.

Clients choose what is asked, and so what fails, and how often. So what is the same is told by what the server knows,
never by a client's words, and nothing that a client sent is kept beyond the beginning of one line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from prefork_socketmap.daemon.line import message

REPEAT_INTERVAL = 60.0
MINUTE = 60.0
_NEVER = float("inf")

Clock = Callable[[], float]


class Budget:
    """Lets ``limit`` bytes pass in a minute, and counts the lines that it does not let pass; 0: all pass."""

    def __init__(self, limit: int, clock: Clock = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._end = float("-inf")
        self._spent = 0
        self._held_back = 0

    def settle(self, *, early: bool = False) -> int:
        """If a minute is over, or *early*, begin the next one; return how many lines were held back in it, else 0."""
        now = self._clock()
        if now < self._end and not early:
            return 0
        held_back, self._held_back = self._held_back, 0
        self._end, self._spent = now + MINUTE, 0
        return held_back

    def admits(self, lines: int, size: int) -> bool:
        """Whether *lines* with *size* bytes may pass. The first ones of a minute always may, however long."""
        if self.limit and self._spent and self._spent + size > self.limit:
            self._held_back += lines
            return False
        self._spent += size
        return True

    @property
    def due(self) -> float:
        """When there will be something to ``settle``."""
        return self._end if self._held_back else _NEVER

    def forget(self) -> None:
        """Begin anew, in a process that was forked off."""
        self._held_back = 0
        self._end = float("-inf")


@dataclass
class _Repetition:
    """A warning that was logged, and how often it came again. The record itself would keep frames alive."""

    logger: str
    level: int
    text: str
    since: float
    count: int = 0

    def summary(self) -> logging.LogRecord:
        return logging.LogRecord(
            self.logger, self.level, "", 0, "%d more times: %s", (self.count, self.text), exc_info=None
        )


_Identity = tuple[str | int, ...]


class CountingHandler(logging.Handler):
    """Passes records on to *target*, but a warning or error that repeats only once in *interval* seconds.

    A record of a lower level is counted, too, if it has the attribute ``counted``. Two records are the same when they
    have the same logger, level, text before the arguments are put in, and kinds of exceptions, and are about the same
    map: the attribute ``map`` (``extra={"map": ...}``), which whoever logs sets to the name of a map in the
    configuration. The arguments do not count, for clients choose them. How often it came again is logged after the
    interval, with the next line of any kind or by ``look``.
    """

    _MOST = 500  # identities are remembered: code of maps may put anything into its texts
    _LONGEST = 300  # characters of each text that is remembered

    def __init__(
        self, target: logging.Handler, interval: float = REPEAT_INTERVAL, clock: Clock = time.monotonic
    ) -> None:
        super().__init__()
        self._target = target
        self._interval = interval
        self._clock = clock
        self._repetitions: dict[_Identity, _Repetition] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Log *record*, or count it."""
        self._report(self._clock() - self._interval)
        is_counted = record.levelno >= logging.WARNING or getattr(record, "counted", False)
        if is_counted and not self._is_new(record):
            return
        self._target.handle(record)

    def look(self) -> float:
        """Log the counts whose interval is over; return when the next one's is, in seconds of the clock."""
        self._report(self._clock() - self._interval)
        return min((each.since for each in self._repetitions.values() if each.count), default=_NEVER) + self._interval

    def forget(self) -> None:
        """Forget what was counted: in a process that was forked off, it is for the parent to tell."""
        self._repetitions.clear()

    def close(self) -> None:
        """Log the counts that are still to be told."""
        self._report(self._clock())
        super().close()

    def _is_new(self, record: logging.LogRecord) -> bool:
        """Remember *record*, or count it if there was one like it."""
        identity = self._identity(record)
        if identity in self._repetitions:
            self._repetitions[identity].count += 1
            return False
        if len(self._repetitions) >= self._MOST:
            self._tell(next(iter(self._repetitions)))
        text = message(record, self._LONGEST)
        self._repetitions[identity] = _Repetition(record.name, record.levelno, text, self._clock())
        return True

    def _identity(self, record: logging.LogRecord) -> _Identity:
        arguments = record.args if isinstance(record.args, tuple) else ()
        kinds = [type(argument).__qualname__ for argument in arguments if isinstance(argument, BaseException)]
        if record.exc_info and record.exc_info[0]:
            kinds.append(record.exc_info[0].__qualname__)
        texts = (str(record.msg), str(getattr(record, "map", "")), *kinds)
        return record.name, record.levelno, *(text[: self._LONGEST] for text in texts)

    def _report(self, until: float) -> None:
        """Log how often the records that were first logged before *until* came again, and forget them."""
        # In the order of their beginning, so the first that is too young ends it.
        while self._repetitions and next(iter(self._repetitions.values())).since <= until:
            self._tell(next(iter(self._repetitions)))

    def _tell(self, identity: _Identity) -> None:
        repetition = self._repetitions.pop(identity)
        if repetition.count:
            self._target.handle(repetition.summary())
