"""The master: binds, forks, watches, reloads, stops. It never reads a byte that a client sent.

Single-threaded and event-driven: one loop waits for signals, for messages of the workers, for parked connections
and for the next time that something is due. Whatever can fail is tried on a new generation of workers first; the old
one goes on until the new one has shown that it can serve.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from time import monotonic

from setproctitle import getproctitle, setproctitle

from prefork_socketmap.prefork import watchdog
from prefork_socketmap.prefork.channel import Kind, Message
from prefork_socketmap.prefork.generation import Generation, Plan
from prefork_socketmap.prefork.limits import Limits
from prefork_socketmap.prefork.listener import Endpoint, Listener
from prefork_socketmap.prefork.parking import Keeper
from prefork_socketmap.prefork.pool import Child, Pool
from prefork_socketmap.prefork.scoreboard import Scoreboard
from prefork_socketmap.prefork.shared import Shared
from prefork_socketmap.prefork.signals import Signals
from prefork_socketmap.prefork.staff import Staff
from prefork_socketmap.prefork.takeover import Check, State, TakeoverError, Upgrade
from prefork_socketmap.prefork.waiting import LONGEST_WAIT

log = logging.getLogger("prefork_socketmap.master")

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
_NEVER = float("inf")
_POLL_CHILDREN = 0.1  # where no signal tells of their end
_RESERVED_DESCRIPTORS = 128  # of the limit: for listeners, channels, logs, and what the embedding program has open


Duty = Callable[[float], float]
"""Does what is due at a time, and returns when it wants to be done again."""


class StartError(Exception):
    """The server cannot start; the text is the reason. ``is_setting``: a setting is wrong, so it never will."""

    def __init__(self, reason: str, *, is_setting: bool = False) -> None:
        super().__init__(reason)
        self.is_setting = is_setting


class Observer:
    """What the embedding program wants to know of the master's life. Called in the master's process."""

    def ready(self, generation: int) -> None:
        """The first generation serves."""

    def reloading(self) -> None:
        """A reload begins."""

    def reloaded(self, generation: int, problem: str | None) -> None:
        """A reload is over: *generation* serves now; *problem* is the reason when the reload was refused."""

    def stopping(self) -> None:
        """The server stops serving."""

    def due(self, now: float) -> float:  # noqa: ARG002
        """Do what is to be done regularly, at *now* on the monotonic clock; return when to be called again."""
        return _NEVER


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
        self._inherited = [Listener(sock) for sock in inherited]
        self._lifeline = lifeline
        self._upgrade = upgrade
        self._check: Check | None = None
        self._state = state
        self._current: Generation | None = None
        self._candidate: Generation | None = None
        self._attempt = "start"
        self._deferred: set[int] = set()
        self._stopping = False
        self._kill_at = _NEVER
        self.board = board or (Scoreboard.resume(state.board) if state else Scoreboard())
        self._signals = Signals()

    @property
    def endpoints(self) -> list[Endpoint]:
        """Where the server listens, with the ports that the kernel chose."""
        return [listener.endpoint for listener in self._current.listeners] if self._current else []

    def run(self) -> None:
        """Serve until TERM (graceful), INT or QUIT (at once) arrives. Raises StartError, or ListenError.

        In the main thread it handles these signals and HUP; elsewhere only ``stop`` and ``kill`` end it.
        """
        self._has_signals = threading.current_thread() is threading.main_thread()
        if self._has_signals:
            self._signals.install(dict.fromkeys(_HANDLED))
        if self._state:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the program before this one has blocked them
        limit = _raise_descriptor_limit()
        self._room_to_park = limit - _RESERVED_DESCRIPTORS
        self._shared = Shared.resume(self._state, self.board) if self._state else Shared.new(limit, self.board)
        self._keeper = Keeper(self._shared.lot, self.board)
        self._pool = Pool(self._shared, self._keeper, self._leave_to_child)
        self._staff = Staff(self.board, self._pool, self._shared.lot)
        self._duties: dict[Duty, float] = dict.fromkeys(
            (
                self._watch_jobs,
                self._staff.replenish,
                self._staff.shrink,
                self._staff.look,
                self._expire_parked,
                self._kill_stragglers,
                self._finish_check,
                self._observer.due,
            ),
            0.0,
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
                self._resume(self._state)
            else:
                self._try_plan(self._plan)
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

    def reload(self) -> None:
        """Replace the workers by a new generation. May be called from any thread and from a signal handler."""
        self._signals.send(signal.SIGHUP)

    # The loop.

    def _loop(self) -> None:
        while not (self._stopping and not self._pool.children):
            longest = LONGEST_WAIT if self._has_signals else _POLL_CHILDREN
            left = min(max(min(self._duties.values()) - monotonic(), 0.0), longest)
            for key, _ in self._selector.select(left):
                key.data()
            if not self._has_signals:
                self._reap()
            self._do_duties(monotonic())

    def _do_duties(self, now: float) -> None:
        """Do what is due; each duty says when it wants to be done again."""
        for duty, due in self._duties.items():
            if now >= due:
                self._duties[duty] = duty(now)

    def _make_due(self, duty: Duty, when: float = 0.0) -> None:
        """Have *duty* done at *when*, or earlier if it is due earlier."""
        self._duties[duty] = min(self._duties[duty], when)

    def _make_all_due(self) -> None:
        self._duties = dict.fromkeys(self._duties, 0.0)

    def _watch_jobs(self, now: float) -> float:
        return watchdog.check(self._pool.children.values(), self.board, self._limits.lookup_timeout, now)

    def _expire_parked(self, now: float) -> float:
        timeout = self._limits.park_timeout
        return self._keeper.expire(timeout, now) if timeout and len(self._keeper) else _NEVER

    @property
    def _limits(self) -> Limits:
        return (self._current.plan if self._current else self._plan).limits

    def _on_signals(self) -> None:
        actions: dict[int, Callable[[], None]] = {
            signal.SIGCHLD: self._reap,
            signal.SIGHUP: self._begin_reload,
            signal.SIGUSR2: self._begin_upgrade,
            signal.SIGTERM: self._begin_stop,
            signal.SIGINT: self._stop_at_once,
            signal.SIGQUIT: self._stop_at_once,
        }
        for number in self._signals.take():
            if action := actions.get(number):  # another one is the embedding program's, and its handler has run
                action()
        self._make_all_due()

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

    # Starting, and reloading.

    def _begin_reload(self) -> None:
        if self._cannot_obey(signal.SIGHUP):
            return
        log.info("reloading")
        self._attempt = "reload"
        self._tell(self._observer.reloading)
        try:
            self._try_plan(self._load())
        except Exception as error:  # noqa: BLE001 - whatever it is, the old generation goes on
            self._refuse(str(error))

    def _cannot_obey(self, number: int) -> bool:
        """Return whether a signal that wants a change has to wait for one under way, or comes too late for any.

        It is not dropped: what it is about may have changed after the change under way has read it.
        """
        if self._candidate or self._check:
            self._deferred.add(number)
            return True
        return self._stopping

    def _send_deferred(self) -> None:
        while self._deferred:
            self._signals.send(self._deferred.pop())

    def _try_plan(self, plan: Plan) -> None:
        """Bind what *plan* needs and start one worker, which has to prove that it can serve."""
        current = self._current
        number = current.number + 1 if current else 1
        existing = current.listeners if current else self._inherited
        candidate = Generation(number, plan, existing, self._inherited)
        self.board.learn(plan.names)
        try:
            self._pool.fork(candidate)
        except OSError:
            candidate.abandon()
            raise
        self._candidate = candidate

    def _on_ready(self, message: Message) -> None:
        child = self._pool.children.get(message.pid)
        if child:
            child.ready = True
            self._staff.end_pause()
            if child.generation is self._candidate:
                self._commit(self._candidate)

    def _on_failed(self, message: Message) -> None:
        child = self._pool.children.get(message.pid)
        if child:
            child.killed = True  # its end is explained
            self._on_failure(child, message.text, is_setting=bool(message.number))

    def _on_failure(self, child: Child, reason: str, *, is_setting: bool = False) -> None:
        """Hear that a worker cannot start."""
        if child.generation is self._candidate:
            self._refuse(reason, is_setting=is_setting)
        else:
            log.error("worker %d cannot start: %s", child.pid, reason)
            self._staff.pause()

    def _commit(self, candidate: Generation) -> None:
        """The new generation can serve: let it, and retire the old one."""
        previous, self._current, self._candidate = self._current, candidate, None
        candidate.commit()
        self.board.generation = candidate.number
        candidate.plan.set_master_title()
        self._staff.generation = candidate
        self._staff.replenish(monotonic())
        self._make_all_due()  # to other limits than before
        if previous is None:
            self._keeper.watch([listener.sock for listener in candidate.listeners])
            log.info("serving %s", ", ".join(map(str, self.endpoints)))
            self._tell(lambda: self._observer.ready(candidate.number))
            self._send_deferred()
            return
        self.board.reloads_good += 1
        for child in self._pool.of(previous):
            child.retire()
        self._keeper.watch([listener.sock for listener in candidate.listeners])
        for listener in previous.listeners:
            if listener not in candidate.listeners:
                listener.close(unlink=True)
        log.info("reloaded: generation %d serves %s", candidate.number, ", ".join(map(str, self.endpoints)))
        self._tell(lambda: self._observer.reloaded(candidate.number, None))
        self._send_deferred()

    def _refuse(self, reason: str, *, is_setting: bool = False) -> None:
        """The new generation cannot serve: leave everything as it was."""
        candidate, self._candidate = self._candidate, None
        if candidate:
            candidate.abandon()
            for child in self._pool.of(candidate):
                child.retire()
        if self._current is None:
            raise StartError(reason, is_setting=is_setting)
        self.board.reloads_refused += 1
        log.error("%s refused, generation %d goes on: %s", self._attempt, self._current.number, reason)
        number = self._current.number
        self._tell(lambda: self._observer.reloaded(number, reason))
        self._send_deferred()

    # Replacing the program.

    def _begin_upgrade(self) -> None:
        if not self._upgrade:
            log.warning("USR2 ignored: this program cannot be replaced while it runs")
            return
        if self._cannot_obey(signal.SIGUSR2):
            return
        log.info("checking the new program")
        self._attempt = "upgrade"
        self._tell(self._observer.reloading)
        try:
            self._check = self._upgrade.begin()
        except OSError as error:
            self._refuse(f"the new program cannot be run: {error}")
            return
        self._make_due(self._finish_check)

    def _finish_check(self, _now: float) -> float:
        """Replace the program, if its check is over and went well. Return when the check has to be over."""
        if not self._check:
            return _NEVER
        if not self._check.is_over():
            return self._check.deadline
        problem = self._check.problem()
        self._check = None
        self._refuse(problem) if problem else self._execute()
        return _NEVER

    def _execute(self) -> None:
        assert self._upgrade  # noqa: S101 - for the type checker: it was checked
        log.info("replacing the program")
        self._send_deferred()
        try:
            with self._signals.left_to_successor():
                self._save().execute(self._upgrade.execute)
        except (OSError, TakeoverError) as error:
            self._refuse(f"the program cannot be replaced: {error}")

    def _save(self) -> State:
        """Return all that the next program needs to go on."""
        assert self._current  # noqa: S101 - for the type checker: it serves
        listeners = self._current.listeners
        return State(
            generation=self._current.number,
            listeners=[each.state() for each in listeners],
            inherited=[each.sock.fileno() for each in self._inherited],
            children=self._pool.state(),
            parked=self._keeper.state(),
            inbox=(self._shared.inbox.fileno(), self._shared.workers_inbox.fileno()),
            lifeline=(self._shared.lifeline, self._shared.held),
            lot=self._shared.lot.state(),
            board=self.board.fileno(),
            others=self._upgrade.others if self._upgrade else {},
        )

    def _resume(self, state: State) -> None:
        """Go on where the program before this one has left off, and replace its workers."""
        self._attempt = "upgrade"
        state.take_descriptors()
        listeners = [Listener.resume(each) for each in state.listeners]
        self._inherited = [each for each in listeners if each.sock.fileno() in state.inherited]
        self._current = Generation.resume(state.generation, self._plan, listeners, self._inherited)
        self._keeper.resume(state.parked, [each.sock for each in listeners])
        self._pool.resume(state.children, self._current)
        self._staff.generation = self._current
        self._reap()
        try:
            self._try_plan(self._plan)
        except Exception as error:  # noqa: BLE001 - whatever it is, the old workers go on
            self._refuse(str(error))

    # The workers.

    def _on_shortage(self, _message: Message) -> None:
        self._make_due(self._staff.replenish, self._staff.hear_of_shortage())

    def _on_empty_front(self, _message: Message) -> None:
        self._make_due(self._staff.look, self._staff.hear_of_empty_front())

    def _reap(self) -> None:
        self._on_messages()  # the last words of those that have ended
        for child, status in self._pool.reap(spare=self._check.pid if self._check else 0):
            self._keeper.lose_worker(child.row.slot)
            if status == 0 or child.killed or self._stopping:
                continue
            self.board.workers_died += 1
            ending = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
            if child.ready:
                log.warning("worker %d %s; it is replaced", child.pid, ending)
            else:
                self._on_failure(child, f"worker {child.pid} {ending} before it was ready")
        if self._candidate and not self._stopping and not self._pool.of(self._candidate):
            self._refuse("the new worker did not become ready")
        self._make_all_due()  # the check of a new program is a child, too
        # One that was called to the front may have ended on its way there.
        self._make_due(self._staff.look, self._staff.hear_of_empty_front())

    # The lot.

    def _on_park(self, message: Message) -> None:
        if not message.connection:
            return
        if self._stopping or not self._limits.park_timeout:
            message.connection.close()
        else:
            self._keeper.park(message.connection, self._limits.max_parked or self._room_to_park)
            self._make_due(self._expire_parked, monotonic() + self._limits.park_timeout)

    def _on_fetch(self, message: Message) -> None:
        child = self._pool.children.get(message.pid)
        if child:
            with contextlib.suppress(OSError):  # it has died meanwhile
                child.answers.send(Kind.FETCHED, number=message.number, connection=self._keeper.get(message.number))

    def _on_gone(self, message: Message) -> None:
        if self._shared.lot.serial(message.number) == message.serial:
            self._keeper.close(message.number)

    # The end.

    def _begin_stop(self) -> None:
        if self._stopping:
            return
        log.info("stopping")
        self._stopping = True
        self._staff.generation = None
        self.board.stopping = True
        self._tell(self._observer.stopping)
        self._kill_at = monotonic() + (self._limits.stop_timeout or _NEVER)
        self._close_listeners()
        self._candidate = None  # whether it could serve does not matter any more
        if self._check:
            self._check.cancel()
            self._check = None
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

    def _close_listeners(self) -> None:
        self._keeper.watch([])
        for generation in (self._current, self._candidate):
            for listener in generation.listeners if generation else ():
                listener.close(unlink=True)

    def _close(self) -> None:
        """Leave nothing behind: no process, no socket file, no descriptor."""
        self._close_listeners()
        for listener in self._inherited:
            listener.close()
        self._pool.kill()
        for child in self._pool.children.values():
            child.wait()
        self._keeper.close_all()
        self._shared.close()
        self._selector.close()
        self._signals.close()

    def _leave_to_child(self) -> None:
        """In a new worker: close what is the master's alone."""
        self._signals.close()
        self._selector.close()
        self._shared.leave_to_child()

    def _tell(self, event: Callable[[], None]) -> None:
        """Tell the observer. What goes wrong there is no reason to stop serving."""
        try:
            event()
        except Exception:
            log.exception("after-effects of a change of state are incomplete")


def _raise_descriptor_limit() -> int:
    """Raise this process's limit of descriptors as far as it goes, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            return hard
    return soft
