"""The job that a worker is doing, as it notes it in shared memory: there the master sees which one takes too long."""

from __future__ import annotations

from time import monotonic


class Job:
    """One job after the other, of one worker. What lies between ``begin`` and ``end`` may be interrupted.

    ``seconds`` is how long the last one took. ``left`` is how many more may begin before the worker has to leave.
    """

    __slots__ = ("_name", "_started", "left", "seconds")

    def __init__(self, name: memoryview[int], started: memoryview[float], left: float) -> None:
        """*name* and *started*: a cell each, for the index of the job's name and for when it began (0.0: no job)."""
        self._name = name
        self._started = started
        self.left = left
        self.seconds = 0.0

    def begin(self, name: int) -> None:
        """Begin a job, for the name with this index."""
        self.left -= 1
        self._name[0] = name
        self._started[0] = monotonic()

    def end(self) -> None:
        """End the job. Once more does no harm: an interruption may leave open whether it has ended."""
        started = self._started[0]
        if started:
            self._started[0] = 0.0
            self.seconds = monotonic() - started
