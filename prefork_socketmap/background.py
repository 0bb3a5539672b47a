"""A master in a process of its own, for ``Server.start()``: started, waited for, stopped from the starting process.

One socket pair ties the two together. Over it the child reports that it serves, or why it does not; its end tells
the parent that the server and all its workers are gone, and tells the child that the parent is: then it stops.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import select
import signal
import socket
import threading
from collections.abc import Callable

from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.prefork.master import Master
from prefork_socketmap.prefork.plan import Observer
from prefork_socketmap.prefork.reload import StartError
from prefork_socketmap.prefork.worker import flush_output, leave_process

log = logging.getLogger("prefork_socketmap.master")

_MAX_REPORT = 1 << 20


class BackgroundMaster:
    """A running master process. ``endpoints`` is where it listens."""

    def __init__(self, make_master: Callable[[Observer, socket.socket], Master]) -> None:
        """Fork and wait until the server answers. Raises what keeps it from that: ListenError, or StartError.

        *make_master* gets the observer to report to, and the socket whose end shall stop the master.
        """
        self._link, childs_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._reaping = threading.RLock()  # a signal handler may stop the server while its thread waits for it
        flush_output()
        self.pid = os.fork()
        if self.pid == 0:
            self._link.close()
            _be_master(make_master, childs_end)
        childs_end.close()
        report = self._link.recv(_MAX_REPORT)
        found = pickle.loads(report) if report else StartError("the server died before it was ready")  # noqa: S301
        if isinstance(found, BaseException):
            self.wait(None)
            raise found
        self.endpoints: list[Endpoint] = found

    def send(self, number: int) -> None:
        """Send a signal to the master, if it is still there."""
        with self._reaping:
            if self.pid:
                os.kill(self.pid, number)

    def wait(self, timeout: float | None) -> bool:
        """Wait until the master and its workers are gone, at most *timeout* seconds; return whether they are."""
        poll = select.poll()
        if self._link.fileno() >= 0:
            poll.register(self._link, select.POLLIN)
            if not poll.poll(None if timeout is None else timeout * 1000):
                return False
        with self._reaping:
            if self.pid:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(self.pid, 0)
                self.pid = 0
                self._link.close()
        return True


class _Reporter(Observer):
    """Tells the parent that the server answers."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self.master: Master | None = None
        self.is_serving = False

    def ready(self, generation: int) -> None:  # noqa: ARG002
        self.is_serving = True
        if self.master:
            self._link.send(pickle.dumps(self.master.endpoints))


def _be_master(make_master: Callable[[Observer, socket.socket], Master], link: socket.socket) -> None:
    """In the child: run the master, and never return."""
    status = 1
    try:
        # A handler of the parent's program is not ours.
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                with contextlib.suppress(ValueError):
                    signal.signal(number, signal.SIG_DFL)
        reporter = _Reporter(link)
        try:
            reporter.master = make_master(reporter, link)
            reporter.master.run()
            status = 0
        except Exception as error:
            if reporter.is_serving:
                log.exception("the server gives up")
            else:
                link.send(pickle.dumps(error))
    finally:
        leave_process(status)
