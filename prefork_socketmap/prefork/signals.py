"""Signals become messages in a loop; nothing happens inside a handler.

The interpreter writes each signal's number to a socket (``signal.set_wakeup_fd``); the loop waits on that socket
beside everything else it waits on, and takes the numbers out when it is ready for them. Code that runs inside a
handler would run between any two instructions of the loop, which is how other masters came to log, reap and fork
in the middle of logging, reaping and forking.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


class Signals:
    """Signals, as numbers to ``take``; ``fileno`` is readable when there are some.

    Until ``install`` is called, and in a thread that is not the main one, where Python cannot handle signals, only
    ``send`` brings messages.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous: dict[int, object] = {}
        self._previous_wakeup = -1

    def install(self, handlers: Mapping[int, Handler | None]) -> None:
        """Receive the signals in *handlers* from now on.

        A handler of None only makes the number appear; a worker gives a function that sets a flag.
        """
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number, handler in handlers.items():
            self._previous[number] = signal.signal(number, handler or _do_nothing)

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

    @contextlib.contextmanager
    def left_to_successor(self) -> Iterator[None]:
        """Let signals wait in the kernel, which keeps them across execve(2): those that nobody has taken yet, too.

        The next program unblocks them when it has handlers: by default they would kill it.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            for number in self.take():
                os.kill(os.getpid(), number)
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def close(self) -> None:
        """Restore the handlers that were there before."""
        if self._previous:
            signal.set_wakeup_fd(self._previous_wakeup)
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
        self._reader.close()
        self._writer.close()


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """Accept the signal: a handler must exist for its number to be written to the socket."""
