"""The master: binds, forks, watches, reloads, stops. It never reads a byte that a client sent.

Single-threaded and event-driven: one loop waits for signals, for messages of the workers, for parked connections
and for the next time that something is due. Whatever can fail is tried on a new generation of workers first; the old
one goes on until the new one has shown that it can serve.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from time import monotonic

from setproctitle import getproctitle, setproctitle

from prefork_socketmap.prefork import watchdog
from prefork_socketmap.prefork.channel import Channel, Kind, Message
from prefork_socketmap.prefork.duties import Duties
from prefork_socketmap.prefork.generation import Plan
from prefork_socketmap.prefork.limits import Limits
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.prefork.observer import Observer, tell
from prefork_socketmap.prefork.parking import Keeper
from prefork_socketmap.prefork.pool import Pool
from prefork_socketmap.prefork.scoreboard import Scoreboard
from prefork_socketmap.prefork.shared import Shared
from prefork_socketmap.prefork.signals import Signals
from prefork_socketmap.prefork.staff import Staff
from prefork_socketmap.prefork.succession import Succession
from prefork_socketmap.prefork.takeover import State, Upgrade
from prefork_socketmap.prefork.waiting import LONGEST_WAIT

log = logging.getLogger("prefork_socketmap.master")

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
_NEVER = float("inf")
_POLL_CHILDREN = 0.1  # where no signal tells of their end
_RESERVED_DESCRIPTORS = 128  # of the limit: for listeners, channels, logs, and what the embedding program has open


class Master:
    """A server: listeners and the workers that accept from them.

    *load* returns the plan of the next generation when HUP arrives; whatever it raises refuses the reload (None: the
    same plan again, with new workers). *inherited* are listening sockets of somebody else, served beside the plan's.
    *lifeline*: a socket whose end, when whoever holds the other side of it is gone, stops the server gracefully.
    *upgrade*: how to replace the program when USR2 arrives (None: it is not). *state* is what such a predecessor has
    left: then its workers go on until one of this program's can serve. *board* is a scoreboard that was made, or
    resumed, where others can read it.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        load: Callable[[], Plan] | None = None,
        observer: Observer | None = None,
        inherited: Sequence[socket.socket] = (),
        lifeline: socket.socket | None = None,
        upgrade: Upgrade | None = None,
        state: State | None = None,
        board: Scoreboard | None = None,
    ) -> None:
        self._plan = plan
        self._load = load or (lambda: plan)
        self._observer = observer or Observer()
        self._inherited = inherited
        self._lifeline = lifeline
        self._upgrade = upgrade
        self._state = state
        self._stopping = False
        self._kill_at = _NEVER
        self.board = board or (Scoreboard.resume(state.board) if state else Scoreboard())
        self._signals = Signals(_HANDLED)

    @property
    def endpoints(self) -> list[Endpoint]:
        """Where the server listens, with the ports that the kernel chose."""
        current = self._succession.current
        return [listener.endpoint for listener in current.listeners] if current else []

    def run(self) -> None:
        """Serve until TERM (graceful), INT or QUIT (at once) arrives. Raises StartError, or ListenError.

        In the main thread it handles these signals and HUP; elsewhere only ``stop`` and ``kill`` end it.
        """
        self._has_signals = threading.current_thread() is threading.main_thread()
        if self._has_signals:
            self._signals.install()
        if self._state:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the program before this one has blocked them
        limit = _raise_descriptor_limit()
        self._room_to_park = limit - _RESERVED_DESCRIPTORS
        self._shared = Shared.resume(self._state, self.board) if self._state else Shared.new(limit, self.board)
        self._keeper = Keeper(self._shared.lot, self.board)
        self._pool = Pool(self._shared, self._keeper, self._signals, self._leave_to_child)
        self._staff = Staff(self.board, self._pool, self._shared.lot)
        self._succession = Succession(
            load=self._load,
            observer=self._observer,
            upgrade=self._upgrade,
            inherited=self._inherited,
            shared=self._shared,
            keeper=self._keeper,
            pool=self._pool,
            staff=self._staff,
            signals=self._signals,
            changed=lambda: self._duties.make_all_due(),
        )
        self._duties = Duties(
            self._watch_jobs,
            self._staff.replenish,
            self._staff.shrink,
            self._staff.look,
            self._expire_parked,
            self._kill_stragglers,
            self._succession.finish_check,
            self._observer.due,
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._signals, selectors.EVENT_READ, self._on_signals)
        self._selector.register(self._shared.inbox, selectors.EVENT_READ, self._on_messages)
        if self._lifeline:
            self._selector.register(self._lifeline, selectors.EVENT_READ, self._on_end_of_lifeline)
        title = getproctitle()
        self._plan.set_master_title()
        gc.freeze()  # workers share the pages of what exists now for as long as nobody's collector touches them
        try:
            if self._state:
                self._succession.resume(self._state, self._plan)
                self._reap()  # nobody was there to be told of a worker's end
            else:
                self._succession.start(self._plan)
            self._loop()
        finally:
            gc.unfreeze()
            self._close()
            setproctitle(title)

    def stop(self) -> None:
        """Stop gracefully. May be called from any thread and from a signal handler."""
        self._signals.send(signal.SIGTERM)

    def kill(self) -> None:
        """Stop at once. May be called from any thread and from a signal handler."""
        self._signals.send(signal.SIGQUIT)

    # The loop.

    def _loop(self) -> None:
        while not (self._stopping and not self._pool.children):
            longest = LONGEST_WAIT if self._has_signals else _POLL_CHILDREN
            left = min(max(self._duties.next() - monotonic(), 0.0), longest)
            for key, _ in self._selector.select(left):
                key.data()
            if not self._has_signals:
                self._reap()
            self._duties.do(monotonic())

    def _watch_jobs(self, now: float) -> float:
        return watchdog.check(self._pool.children.values(), self.board, self._limits.lookup_timeout, now)

    def _expire_parked(self, now: float) -> float:
        timeout = self._limits.park_timeout
        return self._keeper.expire(timeout, now) if timeout and len(self._keeper) else _NEVER

    @property
    def _limits(self) -> Limits:
        current = self._succession.current
        return (current.plan if current else self._plan).limits

    def _on_signals(self) -> None:
        actions: dict[int, Callable[[], None]] = {
            signal.SIGCHLD: self._reap,
            signal.SIGHUP: self._succession.reload,
            signal.SIGUSR2: self._succession.upgrade,
            signal.SIGTERM: self._begin_stop,
            signal.SIGINT: self._stop_at_once,
            signal.SIGQUIT: self._stop_at_once,
        }
        for number in self._signals.take():
            if self._stopping and number in (signal.SIGHUP, signal.SIGUSR2):
                continue  # too late for a change
            if action := actions.get(number):  # another one is the embedding program's, and its handler has run
                action()
        self._duties.make_all_due()

    def _on_messages(self) -> None:
        actions = {
            Kind.READY: self._on_ready,
            Kind.FAILED: self._on_failed,
            Kind.SHORTAGE: self._on_shortage,
            Kind.EMPTY_FRONT: self._on_empty_front,
            Kind.PARK: self._on_park,
            Kind.FETCH: self._on_fetch,
            Kind.GONE: self._on_gone,
        }
        while message := self._shared.inbox.receive():
            actions[message.kind](message)

    def _on_ready(self, message: Message) -> None:
        child = self._pool.children.get(message.pid)
        if child:
            child.ready = True
            self._staff.end_pause()
            self._succession.hear_ready(child)

    def _on_failed(self, message: Message) -> None:
        child = self._pool.children.get(message.pid)
        if child:
            child.killed = True  # its end is explained
            self._succession.hear_failure(child, message.text, is_setting=bool(message.number))

    # The workers.

    def _on_shortage(self, _message: Message) -> None:
        self._duties.make_due(self._staff.replenish, self._staff.hear_of_shortage())

    def _on_empty_front(self, _message: Message) -> None:
        self._duties.make_due(self._staff.look, self._staff.hear_of_empty_front())

    def _reap(self) -> None:
        self._on_messages()  # the last words of those that have ended
        for child, status in self._pool.reap(spare=self._succession.check_pid):
            self._keeper.lose_worker(child.row.slot)
            if status == 0 or child.killed or self._stopping:
                continue
            self.board.workers_died += 1
            ending = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
            if child.ready:
                log.warning("worker %d %s; it is replaced", child.pid, ending)
            else:
                self._succession.hear_failure(child, f"worker {child.pid} {ending} before it was ready")
        self._succession.hear_end()
        self._duties.make_all_due()  # the check of a new program is a child, too
        # One that was called to the front may have ended on its way there.
        self._duties.make_due(self._staff.look, self._staff.hear_of_empty_front())

    # The lot.

    def _on_park(self, message: Message) -> None:
        if not message.connection:
            return
        if self._stopping or not self._limits.park_timeout:
            message.connection.close()
        else:
            self._keeper.park(message.connection, self._limits.max_parked or self._room_to_park)
            self._duties.make_due(self._expire_parked, monotonic() + self._limits.park_timeout)

    def _on_fetch(self, message: Message) -> None:
        if not message.connection:
            return
        answers = Channel(message.connection)
        with contextlib.suppress(OSError):  # it has died meanwhile
            answers.send(Kind.FETCHED, number=message.number, connection=self._keeper.get(message.number))
        answers.close()

    def _on_gone(self, message: Message) -> None:
        if self._shared.lot.serial(message.number) == message.serial:
            self._keeper.close(message.number)

    # The end.

    def _begin_stop(self) -> None:
        if self._stopping:
            return
        log.info("stopping")
        self._stopping = True
        self.board.stopping = True
        tell(self._observer.stopping)
        self._kill_at = monotonic() + (self._limits.stop_timeout or _NEVER)
        self._succession.end()
        self._keeper.close_silent()
        for child in self._pool.children.values():
            child.retire()

    def _on_end_of_lifeline(self) -> None:
        self._selector.unregister(self._lifeline)  # type: ignore[arg-type]
        self._begin_stop()

    def _stop_at_once(self) -> None:
        self._begin_stop()
        self._pool.kill()

    def _kill_stragglers(self, now: float) -> float:
        if now < self._kill_at:
            return self._kill_at
        log.error("%d workers have not finished within stop_timeout and are killed", len(self._pool.children))
        self._pool.kill()
        self._kill_at = _NEVER
        return _NEVER

    def _close(self) -> None:
        """Leave nothing behind: no process, no socket file, no descriptor."""
        self._succession.end()
        self._pool.kill()
        for child in self._pool.children.values():
            child.wait()
        self._pool.children.clear()
        self._keeper.close_all()
        self._shared.close()
        self._selector.close()
        self._signals.close()

    def _leave_to_child(self) -> None:
        """In a new worker: close what is the master's alone."""
        if self._shared.lot.can_park:
            # An epoll set, too. To take apart what is registered there would be to write on memory that is shared.
            os.close(self._selector.fileno())
        else:
            self._selector.close()
        self._shared.leave_to_child()


def _raise_descriptor_limit() -> int:
    """Raise this process's limit of descriptors as far as it goes, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            return hard
    return soft
