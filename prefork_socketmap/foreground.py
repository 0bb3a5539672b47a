"""The master and the workers of a ``Server``: what they do with what is registered, and with changes of it."""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prefork_socketmap.background import LOOK, MakeMaster, has_stopped
from prefork_socketmap.config import Config
from prefork_socketmap.prefork.counters import SlotCounters
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.prefork.master import Master
from prefork_socketmap.prefork.plan import Observer, Plan
from prefork_socketmap.prefork.reload import StartError
from prefork_socketmap.registered import Function, Registered
from prefork_socketmap.service import Answer, Service, counter_names

if TYPE_CHECKING:
    from prefork_socketmap.asynchronous import EventLoop

log = logging.getLogger("prefork_socketmap.worker")


def master_maker(
    registered: Callable[[], Registered],
    config: Config,
    endpoints: Sequence[Endpoint],
    sockets: Sequence[socket.socket],
    begins: Callable[[], None],
    *,
    is_all: bool,
) -> MakeMaster:
    """Return what makes a master: of what is *registered* when it begins or reloads, on *endpoints* and *sockets*.

    With *is_all* it listens there and nowhere else. *begins* is called in each worker first.
    """

    def plan() -> Plan:
        found = registered()
        names = counter_names(found.maps, has_default=found.default is not None)
        worker = Worker(found, config, begins)
        also = Registered() if is_all else found
        where = (*also.endpoints, *endpoints)
        return Plan(where, config, worker.start, names, stop=worker.stop, sockets=(*also.sockets, *sockets))

    def make(observer: Observer, lifeline: socket.socket | None) -> Master:
        return Master(plan(), load=plan, observer=observer, lifeline=lifeline)

    return make


class Worker:
    """What a worker of one generation does before its first lookup and after its last one."""

    def __init__(self, registered: Registered, config: Config, begins: Callable[[], None]) -> None:
        self._begins = begins
        self._registered = registered
        self._config = config
        self._loop: EventLoop | None = None

    def start(self, counters: SlotCounters) -> Service:
        """Get ready; return what answers lookups."""
        self._begins()
        found = self._registered
        if found.is_async:
            from prefork_socketmap.asynchronous import EventLoop

            self._loop = EventLoop(self._config.lookup_timeout)
        for each in found.starts:
            self._run(each)
        maps = {name: self._lookup(each) for name, each in found.maps.items()}
        return Service(maps, self._lookup(found.default) if found.default else None, self._config, counters)

    def _lookup(self, registered: Function) -> Callable[..., Answer]:
        if registered.is_async and self._loop:
            return self._loop.lookup(registered.function)
        return registered.function

    def _run(self, registered: Function) -> None:
        if registered.is_async and self._loop:
            self._loop.run(registered.function())
        else:
            registered.function()

    def stop(self) -> None:
        """Clean up."""
        for each in self._registered.stops:
            try:
                self._run(each)
            except BaseException:
                log.exception("a function of on_worker_stop has failed")
        if self._loop:
            self._loop.close()


Outcome = queue.SimpleQueue[Exception | None]
"""Of one reload: what it raises. There is no lock in it that a signal handler could stand before."""


def _await(outcome: Outcome) -> Exception | None:
    while True:
        with contextlib.suppress(queue.Empty):
            return outcome.get(timeout=LOOK)


class Foreground(Observer):
    """A master that runs in a thread of this process, and what comes of the reloads that other threads ask it for."""

    def __init__(self, make_master: MakeMaster) -> None:
        self.master = make_master(self, None)
        self._over = threading.Event()
        self._thread = threading.get_ident()
        self._awaited: Outcome | None = None
        self._begun: Outcome | None = None

    def stop(self, number: signal.Signals, timeout: float | None) -> bool:
        """Stop the master; return whether it has ended, or will without our waiting."""
        if number == signal.SIGTERM:
            self.master.stop()
        else:
            self.master.kill()
        # A signal handler interrupts the very loop that would have to end: to wait for it would be for ever.
        return threading.get_ident() == self._thread or self._over.wait(timeout)

    def check_may_wait(self) -> None:
        """Raise RuntimeError in the thread that serves."""
        if threading.get_ident() == self._thread:
            raise RuntimeError("the thread that serves cannot wait for new workers: call this in another thread")

    def reload(self) -> None:
        """Have the master reload, wait, and raise StartError when it was refused."""
        outcome = self._awaited = Outcome()
        if self._over.is_set():  # now: whoever sets it looks for us then
            raise has_stopped()
        self.master.reload()
        if error := _await(outcome):
            raise error

    def end(self) -> None:
        """Tell everybody who waits that the master has ended."""
        self._over.set()
        if self._awaited:
            self._awaited.put(has_stopped())

    def reloading(self) -> None:
        """Note who waits for the outcome: whoever asks from now on waits for that of the next one."""
        self._begun = self._awaited

    def reloaded(self, generation: int, problem: str | None) -> None:  # noqa: ARG002
        """Tell whoever waits for it."""
        if self._begun:
            self._begun.put(None if problem is None else StartError(problem))
            self._begun = None
