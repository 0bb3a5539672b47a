"""Interrupting a job from within, in a process where Python does not run the handlers of signals in time.

From CPython 3.13 on, a process that was forked in another thread than the main one, and each that is forked from it,
runs them only in system calls that a signal ends: the interpreter notes the signal with a thread that is no more
(measured with 3.13.0 and 3.14.10; 3.12.1 does not). What still comes through is the number that the interpreter
writes to a descriptor. So a thread waits for that, and has the interpreter call the handler at the next thing that
the job does, by way of ``sys.monitoring``: that costs nothing while nobody is interrupted.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

log = logging.getLogger("prefork_socketmap.worker")

_TOOLS = (4, 3, 2, 1, 0, 5)  # those without a meaning first
_monitoring: Any = getattr(sys, "monitoring", None)
_LOOK = 0.05  # seconds; a signal that comes right before a system call does not end it
_libc = ctypes.CDLL(None)


def handlers_run(number: int, handlers: dict[int, Callable[[int, FrameType | None], None]]) -> bool:
    """Whether the handler of signal *number* in *handlers* is called at once here: the process sends itself one.

    Where there is no ``sys.monitoring`` there was never any doubt, and nothing to be done about it.
    """
    called: list[int] = []
    handlers[number], handler = lambda number, _frame: called.append(number), handlers[number]
    try:
        _libc.kill(os.getpid(), number)  # os.kill() would look after handlers itself
        return bool(called) or not _monitoring
    finally:
        handlers[number] = handler


class Interrupter:
    """Calls *handler* in the thread that has made this, soon after a signal has arrived that Python handles."""

    def __init__(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        """*number* is the signal that ends a system call of the job."""
        self._number = number
        self._handler = handler
        self._main = threading.get_ident()
        self._has_called = threading.Event()
        self._tool = next((tool for tool in _TOOLS if not _monitoring.get_tool(tool)), None)
        if self._tool is None:
            log.warning("a lookup past lookup_timeout cannot be interrupted: sys.monitoring has no tool left")
            return
        events = _monitoring.events
        self._events = events.LINE | events.JUMP | events.PY_START
        _monitoring.use_tool_id(self._tool, "prefork_socketmap")
        for event in (events.LINE, events.JUMP, events.PY_START):
            _monitoring.register_callback(self._tool, event, self._call)
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="prefork_socketmap interrupter", daemon=True).start()

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while os.read(self._reader, 64):
            self._has_called.clear()
            _monitoring.set_events(self._tool, self._events)
            if not self._has_called.wait(_LOOK):
                signal.pthread_kill(self._main, self._number)  # which brings us here again

    def _call(self, *_event: object) -> None:
        if threading.get_ident() == self._main and not self._has_called.is_set():
            _monitoring.set_events(self._tool, 0)
            self._has_called.set()
            self._handler(self._number, None)
