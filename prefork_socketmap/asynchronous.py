"""Coroutines as lookups: the event loop of a worker, which runs them one at a time.

The loop runs while a lookup is under way, and rests with the worker: what others have started in it goes on then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger("prefork_socketmap.worker")

# The loop had better cancel a task itself than be interrupted at any point by whoever watches the worker; so it does
# so a little earlier: by this part of the limit, or so many seconds.
_PART, _MOST = 0.1, 0.25
_LAST_WORDS = 1.0  # seconds; a worker that does not react to an interruption is killed after two


class EventLoop:
    """An event loop in which each lookup has *limit* seconds (0: as many as it likes); then its task is cancelled."""

    def __init__(self, limit: float) -> None:
        self._limit = limit - min(_MOST, limit * _PART) if limit else None
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)

    def lookup(self, function: Callable[..., Awaitable[T]]) -> Callable[..., T]:
        """Return a function that returns what comes of *function*, or raises TimeoutError when that is late."""

        def call(*arguments: str) -> T:
            return self.run(self._within_limit(function, arguments))

        return call

    async def _within_limit(self, function: Callable[..., Awaitable[T]], arguments: tuple[str, ...]) -> T:
        async with asyncio.timeout(self._limit):
            return await function(*arguments)

    def run(self, awaitable: Awaitable[T]) -> T:
        """Return what comes of *awaitable*. When this is interrupted, its task is cancelled first."""
        task = asyncio.ensure_future(awaitable, loop=self._loop)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            self._cancel({task})
            raise

    def _cancel(self, tasks: set[asyncio.Task[Any]]) -> None:
        """Cancel those of *tasks* that are not done, and wait a moment for them."""
        for task in tasks:
            task.cancel()
        self._await_end(tasks)

    def _await_end(self, tasks: set[asyncio.Task[Any]]) -> None:
        left = {task for task in tasks if not task.done()}
        if left:
            _, left = self._loop.run_until_complete(asyncio.wait(left, timeout=_LAST_WORDS))
        for task in left:
            log.error("a task goes on, though it should end: %r", task)

    def close(self) -> None:
        """Cancel all tasks, and close the loop; but wait for none that goes on all the same, nor for threads."""
        self._cancel(asyncio.all_tasks(self._loop))
        self._await_end({self._loop.create_task(self._loop.shutdown_asyncgens())})
        self._loop.close()
