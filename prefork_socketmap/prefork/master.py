"""The master: binds, forks, watches, reloads, stops. It never reads a byte that a client sent.

Single-threaded and event-driven: one loop waits for signals, for the workers' messages and their bell, and for the
next time that something is due. Whatever can fail is tried on a new generation of workers first; the old one goes on
until the new one has shown that it can serve.
"""

from __future__ import annotations

import logging
import os
import resource
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

from setproctitle import getproctitle, setproctitle

from prefork_socketmap.prefork import channel, watchdog
from prefork_socketmap.prefork.channel import BadMessageError, Given, InboxClosedError, Kind, Message
from prefork_socketmap.prefork.connections import Connections
from prefork_socketmap.prefork.generation import Generation
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.prefork.plan import Limits, Observer, Plan, tell
from prefork_socketmap.prefork.policy import LOOK, ProcessPolicy
from prefork_socketmap.prefork.pool import Child, Pool
from prefork_socketmap.prefork.reload import Reload, StartError
from prefork_socketmap.prefork.scoreboard import Scoreboard, State
from prefork_socketmap.prefork.shared import Bell, Lifeline, Shared, freeze, let_go, unfreeze
from prefork_socketmap.prefork.signals import Signals
from prefork_socketmap.prefork.table import ConnectionTable
from prefork_socketmap.prefork.upgrade import MasterState, Upgrade

log = logging.getLogger("prefork_socketmap.master")

_ACTIONS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
# By default they would kill the master without a word.
_OTHERS = (signal.SIGUSR1, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR)
_NEVER = float("inf")
_LONGEST_WAIT = 1e6  # seconds: the kernel counts milliseconds in 32 bits
_POLL_CHILDREN = 0.1  # where no signal tells of their end
_TURN = 0.02  # how long messages are read, in seconds, before the rest of the loop has its turn
_LAST_WORDS = 0.5  # the same, after the end of workers: what they have sent is among the first in the queue
_BEFORE_READY = (Kind.READY, Kind.FAILED)
_DEADLINE_LOOK = 1.0  # how late a deadline that a worker has set may be noticed, in seconds

# Connections have the numbers from here on, unless the program has more files open, or may not have so many.
_FIRST_NUMBER = 1024
_OWN_DESCRIPTORS = 64  # for what the master and a worker open later: files, channels, databases
_FEWEST_CONNECTIONS = 48


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
        state: MasterState | None = None,
        board: Scoreboard | None = None,
    ) -> None:
        self._plan = plan
        self._observer = observer or Observer()
        self._parents_lifeline = lifeline
        self._state = state
        self._stopping = False
        self._kill_at = _NEVER
        limit = _raise_descriptor_limit()
        self._shared = _resume(state, board) if state else _share(board, limit)
        self.board = self._shared.board
        self._signals = Signals(_ACTIONS, _OTHERS)
        self._connections = Connections(self._shared.table, self.board)
        self._pool = Pool(self._shared, self._connections, self._signals, self._leave_to_child)
        self._policy = ProcessPolicy(self.board, self._pool, self._shared.table)
        self._reload = Reload(
            load=load or (lambda: plan),
            observer=self._observer,
            upgrade=upgrade,
            inherited=inherited,
            shared=self._shared,
            connections=self._connections,
            pool=self._pool,
            policy=self._policy,
            signals=self._signals,
            changed=lambda: self._timers.set_all(),
        )
        self._timers = Timers(
            self._watch_jobs,
            self._policy.replenish,
            self._policy.shrink,
            self._policy.watch,
            self._expire,
            self._connections.clear_suspects,
            self._kill_stragglers,
            self._reload.finish_check,
            self._reload.finish_retirement,
            self._observer.due,
        )
        self.board.connection_limit = self._connection_limit
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._signals, selectors.EVENT_READ, self._on_signals)
        self._selector.register(self._shared.inbox, selectors.EVENT_READ, self._on_messages)
        self._selector.register(self._shared.bell, selectors.EVENT_READ, self._on_bell)
        if lifeline:
            self._selector.register(lifeline, selectors.EVENT_READ, self._on_end_of_parent)

    @property
    def endpoints(self) -> list[Endpoint]:
        """Where the server listens, with the ports that the kernel chose."""
        current = self._reload.current
        return [listener.endpoint for listener in current.listeners] if current else []

    def run(self) -> None:
        """Serve until TERM (graceful), INT or QUIT (at once) arrives. Raises StartError, or ListenError.

        In the main thread it handles these signals and HUP; elsewhere only ``stop`` and ``kill`` end it.
        """
        self._has_signals = threading.current_thread() is threading.main_thread()
        title = getproctitle()
        try:
            if self._has_signals:
                self._signals.install()
            self._plan.set_master_title()
            freeze()  # workers share the pages of what exists now for as long as nobody's collector touches them
            self._begin()
            self._loop()
        finally:
            unfreeze()
            self._close()
            setproctitle(title)

    def stop(self) -> None:
        """Stop gracefully. May be called from any thread and from a signal handler."""
        self._signals.send(signal.SIGTERM)

    def kill(self) -> None:
        """Stop at once. May be called from any thread and from a signal handler."""
        self._signals.send(signal.SIGQUIT)

    def reload(self) -> None:
        """Reload. May be called from any thread and from a signal handler; the observer is told what came of it."""
        self._signals.send(signal.SIGHUP)

    # The loop.

    def _begin(self) -> None:
        if self._state:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the program before this one has blocked them
            self._reload.resume(self._state, self._plan)
            self._reap()  # nobody was there to be told of a worker's end
        else:
            self._reload.start(self._plan)

    def _loop(self) -> None:
        while not (self._stopping and not self._pool.children):
            longest = _LONGEST_WAIT if self._has_signals else _POLL_CHILDREN
            left = min(max(self._timers.next() - monotonic(), 0.0), longest)
            events = self._selector.select(left)
            self.board.restore()
            for key, _ in events:
                key.data()
            if not self._has_signals:
                self._reap()
            self._timers.run(monotonic())

    @property
    def _limits(self) -> Limits:
        current = self._reload.current
        return (current.plan if current else self._plan).limits

    def _watch_jobs(self, now: float) -> float:
        return watchdog.check(self._pool.children.values(), self.board, self._limits.lookup_timeout, now)

    def _expire(self, now: float) -> float:
        self.board.connection_limit = self._connection_limit
        return self._connections.expire(self._limits.keepalive_timeout, now)

    @property
    def _connection_limit(self) -> int:
        return self._connections.limit(self._limits.max_connections)

    # What happens.

    def _on_signals(self) -> None:
        actions: dict[int, Callable[[], None]] = {
            signal.SIGCHLD: self._reap,
            signal.SIGHUP: self._reload.reload,
            signal.SIGUSR2: self._reload.upgrade,
            signal.SIGTERM: self._begin_stop,
            signal.SIGINT: self._stop_at_once,
            signal.SIGQUIT: self._stop_at_once,
        }
        for number in self._signals.take():
            if self._stopping and number in (signal.SIGHUP, signal.SIGUSR2):
                continue  # too late for a change
            if action := actions.get(number):
                action()
            elif number in _OTHERS:
                log.warning("signal %s ignored: it means nothing here", signal.Signals(number).name)
        self._timers.set_all()

    def _on_bell(self) -> None:
        """See to what workers need: somebody on duty, more workers, what is astray put back, deadlines kept."""
        self._shared.bell.silence()
        self._connections.bring_back()
        now = monotonic()
        self._timers.set(self._policy.watch, now + LOOK)
        self._timers.set(self._expire, now + _DEADLINE_LOOK)

    def _on_messages(self, seconds: float = _TURN) -> None:
        actions = {
            Kind.READY: self._on_ready,
            Kind.FAILED: self._on_failed,
            Kind.KEEP: self._on_keep,
            Kind.OFFER: self._on_keep,
            Kind.FETCH: self._on_fetch,
            Kind.GONE: self._on_gone,
            Kind.ENDED: self._on_ended,
        }
        end = monotonic() + seconds
        while True:
            try:
                message = self._shared.inbox.receive()
                if message is None:
                    return
                child = self._pool.children.get(message.pid)
                if child and not child.punished:
                    if child.ready is (message.kind in _BEFORE_READY):
                        raise BadMessageError(child.pid, f"{message.kind.name} at the wrong time", message.enclosed)
                    actions[message.kind](child, message)
                else:
                    _discard(message.enclosed)  # of one that has ended, or a child of a worker's
            except BadMessageError as error:
                self._punish(error)
            except InboxClosedError:
                self._start_over("shut down the way to the master")
                return
            if monotonic() > end:
                return  # somebody sends and sends; there is more to do

    def _punish(self, error: BadMessageError) -> None:
        _discard(error.enclosed)
        child = self._pool.children.get(error.pid)
        if child and not child.punished:
            log.error("worker %d is killed: it has sent %s", child.pid, error)
            self.board.increment("workers", "killed")
            child.punished = True
            child.kill()

    def _start_over(self, crime: str) -> None:
        """Replace what workers are told by, and tell by, and all of them: nobody can say who of them has done it."""
        log.error("a worker has %s: all workers are killed and replaced", crime)
        self._policy.renew_duty(self._shared.lifeline.fd)
        self._selector.unregister(self._shared.inbox)
        self._shared.inbox.close()
        self._shared.to_master.close()
        self._shared.inbox, self._shared.to_master = channel.make_inbox()
        self._selector.register(self._shared.inbox, selectors.EVENT_READ, self._on_messages)
        self._pool.kill()
        self._pool.renew()

    def _on_ready(self, child: Child, _message: Message) -> None:
        child.ready = True
        self._policy.end_pause()
        self._reload.hear_ready(child)

    def _on_failed(self, child: Child, message: Message) -> None:
        child.failed = True
        child.leaves_by = monotonic() + watchdog.GRACE
        self._reload.hear_failure(child, message.text, is_setting=bool(message.number))

    def _on_keep(self, child: Child, message: Message) -> None:
        (fd,) = message.enclosed
        if not self._connections.has_reserved(child.row, message.number, message.serial):
            problem = f"{message.kind.name} for a place that is not reserved for it"
            raise BadMessageError(message.pid, problem, [fd])
        limits = self._limits
        self._connections.keep(
            child.row,
            Given(message.number, message.serial, 0, message.family, fd, child.pid),
            0 if self._stopping else self._connection_limit,
            limits.idle_timeout,
            is_armed=message.kind is Kind.KEEP,
        )
        self._timers.set(self._expire, monotonic() + (limits.keepalive_timeout or _NEVER))

    def _on_fetch(self, child: Child, message: Message) -> None:
        (answers,) = message.enclosed
        if not child.inherited <= message.serial <= self._connections.newest:
            raise BadMessageError(child.pid, "FETCH for what it has, or for what nobody has", [answers])
        child.horizon = self._connections.newest
        channel.answer(answers, self._connections.younger_than(message.serial))

    def _require_acquaintance(self, child: Child, message: Message) -> None:
        if not self._connections.may_have_met(child.pid, child.horizon, message.number, message.serial):
            raise BadMessageError(child.pid, f"{message.kind.name} for a connection that it never had")

    def _on_gone(self, child: Child, message: Message) -> None:
        self._require_acquaintance(child, message)
        if self._connections.has(message.number, message.serial):
            self._connections.close(message.number)

    def _on_ended(self, child: Child, message: Message) -> None:
        self._require_acquaintance(child, message)
        if self._connections.has(message.number, message.serial):
            self._connections.drop(message.number)

    # Workers that end.

    def _reap(self) -> None:
        ended = self._pool.reap(spare=self._reload.check_pid)
        self._on_messages(_LAST_WORDS)  # theirs among them
        for child, status in ended:
            if not (status == 0 and child.row.state is State.LEAVING):
                self._connections.lose_worker(child.row)
                self.board.count_death(child.row)
                self._policy.lose_worker()
                if not (child.killed or child.failed or self._stopping):
                    self._tell_of_death(child, status)
            self._connections.release_reservations(child.row)
            self._pool.forget(child)
        if self._policy.is_meddled_with(monotonic()):
            self._start_over("told all workers to leave")
        self._reload.hear_end()
        self._policy.fill_places(monotonic())
        self._timers.set_all()  # the check of a new program is a child, too

    def _tell_of_death(self, child: Child, status: int) -> None:
        self.board.increment("workers", "died")
        ending = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        if not child.ready:
            # Who is to blame for a start that fails would hardly choose this way.
            hear = self._reload.hear_kill if status == -signal.SIGKILL else self._reload.hear_failure
            hear(child, f"worker {child.pid} {ending} before it was ready")
            return
        work = f" in a lookup in [{self.board.name(child.row.job_name)}]" if child.row.job_started else ""
        log.warning("worker %d %s%s; it is replaced", child.pid, ending, work)

    # The end.

    def _begin_stop(self) -> None:
        if self._stopping:
            return
        log.info("stopping")
        self._stopping = True
        self.board.stopping = True
        tell(self._observer.stopping)
        self._kill_at = monotonic() + (self._limits.stop_timeout or _NEVER)
        self._reload.end()
        self._connections.close_silent()
        for child in self._pool.children.values():
            if not child.ready:
                child.kill()

    def _on_end_of_parent(self) -> None:
        self._selector.unregister(self._parents_lifeline)  # type: ignore[arg-type]
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
        self._reload.end()
        self._pool.kill()
        for child in self._pool.children.values():
            child.wait()
        self._pool.children.clear()
        self._reload.finish_retirement(_NEVER)
        self._connections.close_all()
        self._shared.close()
        self._selector.close()
        self._signals.close()

    def _leave_to_child(self, generation: Generation) -> None:
        """In a new worker of *generation*: close what is the master's alone, or another generation's."""
        # An epoll set. To take apart what is registered there would be to write on memory that is shared.
        os.close(self._selector.fileno())
        self._shared.leave_to_child()
        self._reload.leave_to_child(generation)


Action = Callable[[float], float]
"""Does what is due at a time, and returns when it wants to be called again; infinity: when somebody sets it."""


class Timers:
    """What the master does when its time has come, and not because something happened. All are due at once."""

    def __init__(self, *actions: Action) -> None:
        self._due = dict.fromkeys(actions, 0.0)

    def set(self, action: Action, when: float) -> None:
        """Have *action* done at *when*, or earlier if it is due earlier."""
        self._due[action] = min(self._due[action], when)

    def set_all(self) -> None:
        """Have all of them done next: something has happened that may matter to any."""
        self._due = dict.fromkeys(self._due, 0.0)

    def next(self) -> float:
        """Return when the next one is due."""
        return min(self._due.values())

    def run(self, now: float) -> None:
        """Do what is due."""
        for action, due in self._due.items():
            if now >= due:
                self._due[action] = action(now)


def _share(board: Scoreboard | None, limit: int) -> Shared:
    """Make all that is shared, for processes of at most *limit* descriptors. Raises StartError."""
    first = _first_number(limit)
    lifeline = Lifeline.new()
    table = ConnectionTable(first, limit)
    table.add(lifeline.fd, selectors.EVENT_READ)  # for good: it wakes everybody
    inbox, to_master = channel.make_inbox()
    return Shared(board or Scoreboard(), table, Bell(), inbox, to_master, lifeline)


def _resume(state: MasterState, board: Scoreboard | None) -> Shared:
    """Go on with what the program that was here before has made."""
    inbox, to_master = channel.resume_inbox(state.inbox)
    lifeline = Lifeline(*state.lifeline)
    table = ConnectionTable.resume(state.table)
    return Shared(board or Scoreboard.resume(state.board), table, Bell(state.bell), inbox, to_master, lifeline)


def _first_number(limit: int) -> int:
    """Return the first number for connections: above all that is open, or will be. Raises StartError."""
    highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    first = max(min(_FIRST_NUMBER, limit // 4), highest + _OWN_DESCRIPTORS)
    if limit < first + _FEWEST_CONNECTIONS:
        raise StartError(
            f"the limit of open files (RLIMIT_NOFILE, ulimit -n) is {limit}; "
            f"at least {first + _FEWEST_CONNECTIONS} are needed here, and one for each connection"
        )
    return first


def _raise_descriptor_limit() -> int:
    """Raise this process's limit of descriptors as far as it goes, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft
    return hard


def _discard(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        let_go(fd)
