"""Signals become messages in a loop; nothing happens inside a handler.

The interpreter writes each signal's number to a socket (``signal.set_wakeup_fd``); the loop waits on that socket
beside everything else it waits on, and takes the numbers out when it is ready for them. Code that runs inside a
handler would run between any two instructions of the loop, which is how other masters came to log, reap and fork
in the middle of logging, reaping and forking.

A worker has no such loop. It takes over what its master has set up, with handlers that set a flag.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


class Signals:
    """The signals *handled*, as numbers to ``take``; ``fileno`` is readable when there are some.

    *others* are handled, too, where nobody has said what to do with them: by default they would end the process.

    Until ``install`` is called, and in a thread that is not the main one, where Python cannot handle signals, only
    ``send`` brings messages.
    """

    def __init__(self, handled: Sequence[int], others: Sequence[int] = ()) -> None:
        self._handled = handled
        self._others = others
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._handlers: Mapping[int, Handler] = {}
        self._previous: dict[int, object] = {}
        self._previous_wakeup = -1

    def install(self) -> None:
        """Receive the signals from now on."""
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._set_handlers()

    def _set_handlers(self) -> None:
        others = [number for number in self._others if signal.getsignal(number) == signal.SIG_DFL]
        for number in (*self._handled, *others):
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # In the master there is nothing to do, but for its number to be written a handler must exist.
        handler = self._handlers.get(number)
        if handler:
            handler(number, frame)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._reader.fileno()

    def send(self, number: int) -> None:
        """Make *number* appear as if the signal had arrived. May be called from any thread and signal handler."""
        with contextlib.suppress(OSError):  # full: the loop has more than enough to wake up for
            self._writer.send(bytes([number]))

    def take(self) -> Iterable[int]:
        """Return the signals that have arrived since the last call, each once, in order."""
        try:
            return dict.fromkeys(self._reader.recv(4096))
        except BlockingIOError:
            return ()

    def blocked(self) -> contextlib.AbstractContextManager[None]:
        """Let signals wait in the kernel, around a fork: until the child has called ``enter_child``."""
        return _blocked(self._handled)

    def enter_child(self, handlers: Mapping[int, Handler]) -> None:
        """In a child that was forked while they were ``blocked``: handle them by *handlers*, and ignore the rest.

        The parent's own handlers stay in place and only pass signals on: to replace them by way of the signal module
        would take a child more time, and more memory of its own, than anything else it does to get ready.
        """
        self._handlers = handlers
        if self._previous:
            signal.set_wakeup_fd(-1)
        else:
            self._set_handlers()
        self._reader.close()
        self._writer.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._handled)

    @contextlib.contextmanager
    def left_to_successor(self) -> Iterator[None]:
        """Let signals wait in the kernel, which keeps them across execve(2): those that nobody has taken yet, too.

        The next program unblocks them when it has handlers: by default they would kill it.
        """
        with _blocked(signal.valid_signals()):
            for number in self.take():
                os.kill(os.getpid(), number)
            yield

    def close(self) -> None:
        """Restore the handlers that were there before."""
        if self._previous:
            signal.set_wakeup_fd(self._previous_wakeup)
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
        self._reader.close()
        self._writer.close()


@contextlib.contextmanager
def _blocked(numbers: Iterable[int]) -> Iterator[None]:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
