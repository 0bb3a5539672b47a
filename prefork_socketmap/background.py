"""A master in a process of its own, for ``Server.start()``: started, waited for, stopped from the starting process.

One socket pair ties the two together. Over it the child reports that it serves, or why it does not; its end tells
the parent that the server and all its workers are gone, and tells the child that the parent is: then it stops. Over
another one the child tells of reloads.
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
from prefork_socketmap.prefork.shared import is_ready
from prefork_socketmap.prefork.worker import flush_output, leave_process

log = logging.getLogger("prefork_socketmap.master")

_MAX_REPORT = 1 << 20
_BEGUN, _OVER = "begun", "over"
LOOK = 1.0
"""Seconds after which a wait begins anew: a signal that comes right before a system call does not end it."""


MakeMaster = Callable[[Observer, socket.socket | None], Master]
"""Makes a master from the observer to report to, and the socket whose end shall stop it (None: nothing does)."""


def has_stopped() -> RuntimeError:
    """Return the error of a reload that has no outcome."""
    return RuntimeError("the server has stopped before it had new workers")


class BackgroundMaster:
    """A running master process. ``endpoints`` is where it listens, ``pid`` is 0 when it is gone."""

    pid: int

    def __init__(self, make_master: MakeMaster) -> None:
        """Fork and wait until the server answers. Raises what keeps it from that: ListenError, or StartError."""
        self._link, childs_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._news, childs_news = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._is_reloading = False
        self._reaping = threading.RLock()  # a signal handler may stop the server while its thread waits for it
        flush_output()
        self.pid = os.fork()
        if self.pid == 0:
            self._link.close()
            self._news.close()
            _be_master(make_master, childs_end, childs_news)
        childs_end.close()
        childs_news.close()
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

    def reload(self) -> None:
        """Have the master reload. Raises StartError when it refuses, RuntimeError when it has stopped."""
        self._is_reloading = True
        try:
            problem = self._await_outcome()
        except (OSError, ValueError):  # somebody has stopped it meanwhile
            raise has_stopped() from None
        finally:
            self._is_reloading = False
            if not self.pid:
                self._news.close()
        if problem is not None:
            raise StartError(problem)

    def _await_outcome(self) -> str | None:
        with contextlib.suppress(BlockingIOError):
            while self._news.recv(_MAX_REPORT, socket.MSG_DONTWAIT):
                pass  # of reloads that others have asked for
        self.send(signal.SIGHUP)
        has_begun = False
        while report := self._next_report():
            event, problem = pickle.loads(report)  # noqa: S301
            if event == _OVER and has_begun:
                return str(problem) if problem is not None else None
            has_begun = has_begun or event == _BEGUN
        raise has_stopped()

    def _next_report(self) -> bytes:
        while not is_ready(self._news.fileno(), milliseconds=LOOK * 1000):
            pass
        return self._news.recv(_MAX_REPORT)

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
                if not self._is_reloading:  # another thread reads from it, and closes it then
                    self._news.close()
        return True


class _Reporter(Observer):
    """Tells the parent that the server answers, and of reloads."""

    def __init__(self, link: socket.socket, news: socket.socket) -> None:
        self._link = link
        self._news = news
        self.master: Master | None = None
        self.is_serving = False

    def ready(self, generation: int) -> None:  # noqa: ARG002
        self.is_serving = True
        if self.master:
            self._link.send(pickle.dumps(self.master.endpoints))

    def reloading(self) -> None:
        self._tell(_BEGUN)

    def reloaded(self, generation: int, problem: str | None) -> None:  # noqa: ARG002
        self._tell(_OVER, problem)

    def _tell(self, event: str, problem: str | None = None) -> None:
        with contextlib.suppress(OSError):  # it is full of what nobody has asked for; who asks empties it first
            self._news.send(pickle.dumps((event, problem)), socket.MSG_DONTWAIT)


def _be_master(make_master: MakeMaster, link: socket.socket, news: socket.socket) -> None:
    """In the child: run the master, and never return."""
    status = 1
    try:
        # A handler of the parent's program is not ours.
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                with contextlib.suppress(ValueError):
                    signal.signal(number, signal.SIG_DFL)
        reporter = _Reporter(link, news)
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
