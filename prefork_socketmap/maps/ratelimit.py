"""A logger for what may go wrong at every lookup: it must be said, but not a thousand times a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class RateLimitedLogger:
    """Passes one message per *interval* seconds to *logger*, and tells with it how many it kept back before.

    *prefix* comes before each message.
    """

    def __init__(
        self,
        logger: logging.Logger,
        prefix: str = "",
        interval: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._prefix = prefix.replace("%", "%%")
        self._interval = interval
        self._clock = clock
        self._next = float("-inf")
        self._kept_back = 0

    def log(self, level: int, message: str, *arguments: object) -> None:
        """Log *message*, unless another was logged less than the interval ago."""
        now = self._clock()
        if now < self._next:
            self._kept_back += 1
            return
        if self._kept_back:
            message += f" (and {self._kept_back} times something like it since the last such line)"
        self._next = now + self._interval
        self._kept_back = 0
        self._logger.log(level, self._prefix + message, *arguments)
