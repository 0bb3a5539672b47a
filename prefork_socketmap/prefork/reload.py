"""Reload: how one generation of workers, or one program, follows another.

Whatever can fail is tried before anything is given up. A new generation binds its listeners and starts one worker;
only when that worker is ready is the old generation retired. A new program is run in a child first, to check that it
would start. What fails leaves everything as it was, and the reason is told.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Sequence
from time import monotonic

from prefork_socketmap.prefork.connections import Connections
from prefork_socketmap.prefork.duty import Duty
from prefork_socketmap.prefork.generation import Generation
from prefork_socketmap.prefork.listener import Listener
from prefork_socketmap.prefork.plan import Limits, Observer, Plan, tell
from prefork_socketmap.prefork.policy import ProcessPolicy
from prefork_socketmap.prefork.pool import Child, Pool
from prefork_socketmap.prefork.scoreboard import State
from prefork_socketmap.prefork.shared import Shared
from prefork_socketmap.prefork.signals import Signals
from prefork_socketmap.prefork.upgrade import Check, MasterState, Upgrade, UpgradeError
from prefork_socketmap.prefork.watchdog import GRACE

log = logging.getLogger("prefork_socketmap.master")

_NEVER = float("inf")
_HANDOVER_LOOK = 0.002
_REPLACEMENT_TIME = 30  # seconds: by then a new program listens to the workers, however busy the machine is


class StartError(Exception):
    """The server cannot start; the text is the reason. ``is_setting``: a setting is wrong, so it never will."""

    def __init__(self, reason: str, *, is_setting: bool = False) -> None:
        super().__init__(reason)
        self.is_setting = is_setting


class Reload:
    """The generation that serves, ``current``, and the change to the next one that may be under way.

    *load* returns the plan of the next generation; *changed* is called when a change has come to its end.
    """

    def __init__(
        self,
        *,
        load: Callable[[], Plan],
        observer: Observer,
        upgrade: Upgrade | None,
        inherited: Sequence[socket.socket],
        shared: Shared,
        connections: Connections,
        pool: Pool,
        policy: ProcessPolicy,
        signals: Signals,
        changed: Callable[[], None],
    ) -> None:
        self.current: Generation | None = None
        self._load = load
        self._observer = observer
        self._upgrade = upgrade
        self._inherited = [Listener(sock) for sock in inherited]
        self._shared = shared
        self._board = shared.board
        self._connections = connections
        self._pool = pool
        self._policy = policy
        self._signals = signals
        self._changed = changed
        self._candidate: Generation | None = None
        self._retiring: list[Generation] = []
        self._handover = 0.0
        self._is_over = False
        self._check: Check | None = None
        self._attempt = "start"
        self._deferred: set[int] = set()

    # Generations.

    def start(self, plan: Plan) -> None:
        """Try the first plan. Raises ListenError; what else fails becomes a StartError, now or later."""
        self._try(plan)

    def reload(self) -> None:
        """Try the plan that is loaded now, on HUP."""
        if self._has_to_wait(signal.SIGHUP):
            return
        log.info("reloading")
        self._attempt = "reload"
        tell(self._observer.reloading)
        self._try_or_refuse(self._load)

    def _has_to_wait(self, number: int) -> bool:
        """Return whether a signal that wants a change has to wait for the end of one that is under way.

        It is not dropped: what it is about may have changed after the change under way has read it.
        """
        if self._candidate or self._check or self._retiring:
            self._deferred.add(number)
            return True
        return False

    def _try_or_refuse(self, load: Callable[[], Plan]) -> None:
        try:
            self._try(load())
        except Exception as error:  # noqa: BLE001 - whatever it is, the old generation goes on
            self._refuse(str(error))

    def _try(self, plan: Plan) -> None:
        """Bind what *plan* needs and start one worker, which has to prove that it can serve."""
        current = self.current
        number = current.number + 1 if current else 1
        existing = current.listeners if current else self._inherited
        duty = Duty(self._board, self._shared.lifeline.fd)
        try:
            candidate = Generation(number, plan, duty, existing, self._inherited)
        except OSError:
            duty.close_at(self._shared.table)
            raise
        duty.open_at(self._shared.table)
        self._board.learn(plan.names)
        try:
            if self._policy.room(candidate) <= 0:
                raise OSError("so many workers of former generations have not left yet; try again when they have")
            self._pool.fork(candidate)
        except OSError:
            self._abandon(candidate)
            raise
        self._candidate = candidate

    def hear_ready(self, child: Child) -> None:
        """Hear that a worker is ready."""
        if self._candidate and child.generation is self._candidate:
            self._commit(self._candidate)

    def hear_failure(self, child: Child, reason: str, *, is_setting: bool = False) -> None:
        """Hear that a worker cannot start."""
        if self._candidate and child.generation is self._candidate:
            self._refuse(reason, is_setting=is_setting)
        else:
            log.error("worker %d cannot start: %s", child.pid, reason)
            self._policy.pause()

    def hear_kill(self, child: Child, reason: str) -> None:
        """Hear that somebody has killed a worker before it was ready."""
        if self._candidate and child.generation is self._candidate:
            self._refuse(reason)
        else:
            log.warning("%s; it is replaced", reason)
            self._policy.excuse_kill()

    def hear_end(self) -> None:
        """Hear that workers have ended: perhaps the one that had to prove itself."""
        if self._candidate and not self._pool.of(self._candidate):
            self._refuse("the new worker did not become ready")

    def _commit(self, candidate: Generation) -> None:
        """The new generation can serve: let it, and retire the old one."""
        previous, self.current, self._candidate = self.current, candidate, None
        candidate.commit()
        candidate.plan.set_master_title()
        self._board.generation = candidate.number
        self._policy.generation = candidate
        if previous:
            self._retire(previous)
        self._policy.replenish(monotonic())
        self._connections.watch([listener.sock for listener in candidate.listeners])
        for listener in previous.listeners if previous else ():
            if listener not in candidate.listeners:
                listener.close(unlink=True)
        if not previous:
            self._tell_of_start(candidate)
        self._end_change()

    def _retire(self, generation: Generation) -> None:
        """Let the workers of a generation leave, each after its job."""
        self._pool.retire(generation, generation.number, _leaving_time(generation.plan.limits))
        self._retiring.append(generation)
        self._handover = monotonic() + _HANDOVER_LOOK  # not at once: one may be about to wait

    def finish_retirement(self, now: float) -> float:
        """Hand the places on duty over, when former generations have left them. Return when to look again."""
        if not self._retiring:
            return _NEVER
        if now < self._handover:
            return self._handover
        waiting = {id(child.generation) for child in self._pool.children.values() if child.row.state is State.IDLE}
        for generation in [each for each in self._retiring if id(each) not in waiting]:
            generation.duty.close_at(self._shared.table)
            self._retiring.remove(generation)
        self._policy.fill_places(now)
        if self._retiring:
            return now + _HANDOVER_LOOK
        if self.current and not self._is_over:
            self._tell_of_reload(self.current)  # now that nobody is answered by what was before any more
        self._end_change()
        return _NEVER

    def leave_to_child(self, generation: Generation) -> None:
        """In a new worker of *generation*: let go of the duty of others, which are on their way in or out."""
        for other in {self.current, self._candidate, *self._retiring}:
            if other and other is not generation:
                other.duty.leave()

    def _tell_of_start(self, generation: Generation) -> None:
        log.info("serving %s", _where(generation))
        tell(lambda: self._observer.ready(generation.number))

    def _tell_of_reload(self, generation: Generation) -> None:
        self._board.increment("reloads", "good")
        log.info("reloaded: generation %d serves %s", generation.number, _where(generation))
        tell(lambda: self._observer.reloaded(generation.number, None))

    def _refuse(self, reason: str, *, is_setting: bool = False) -> None:
        """The change is not possible: leave everything as it was."""
        candidate, self._candidate = self._candidate, None
        if candidate:
            self._abandon(candidate)
        if self.current is None:
            raise StartError(reason, is_setting=is_setting)
        number = self.current.number
        self._board.increment("reloads", "refused")
        log.error("%s refused, generation %d goes on: %s", self._attempt, number, reason)
        tell(lambda: self._observer.reloaded(number, reason))
        self._end_change()

    def _abandon(self, candidate: Generation) -> None:
        candidate.close_listeners()
        self._pool.retire(candidate, 0, _leaving_time(candidate.plan.limits))
        candidate.duty.close_at(self._shared.table)

    def _end_change(self) -> None:
        self._changed()
        while self._deferred and not self._retiring:
            self._signals.send(self._deferred.pop())

    # Programs.

    def upgrade(self) -> None:
        """Check the program that is installed by now, to replace this one by it, on USR2."""
        if not self._upgrade:
            log.warning("USR2 ignored: this program cannot be replaced while it runs")
            return
        if self._has_to_wait(signal.SIGUSR2):
            return
        log.info("checking the new program")
        self._attempt = "upgrade"
        tell(self._observer.reloading)
        try:
            self._check = self._upgrade.begin()
        except OSError as error:
            self._refuse(f"the new program cannot be run: {error}")
        else:
            self._changed()

    @property
    def check_pid(self) -> int:
        """The pid of the check under way, 0 when there is none."""
        return self._check.pid if self._check else 0

    def finish_check(self, _now: float) -> float:
        """Replace the program, if its check is over and went well. Return when the check has to be over."""
        if not self._check:
            return _NEVER
        if not self._check.is_over():
            return self._check.deadline
        problem = self._check.problem()
        self._check = None
        if problem:
            self._refuse(problem)
        else:
            self._execute()
        return _NEVER

    def _execute(self) -> None:
        if not (self._upgrade and self.current):
            return
        log.info("replacing the program")
        self._end_change()
        self._board.back_by = int(monotonic()) + _REPLACEMENT_TIME
        try:
            with self._signals.left_to_successor():
                self._state(self.current, self._upgrade).execute(self._upgrade.execute)
        except (OSError, UpgradeError) as error:
            self._board.back_by = 0
            self._refuse(f"the program cannot be replaced: {error}")

    def _state(self, current: Generation, upgrade: Upgrade) -> MasterState:
        """Return all that the next program needs to go on."""
        shared = self._shared
        return MasterState(
            generation=current.number,
            listeners=[each.state() for each in current.listeners],
            inherited=[each.sock.fileno() for each in self._inherited],
            children=self._pool.state(),
            connections=self._connections.state(),
            inbox=(shared.inbox.fileno(), shared.to_master.fileno()),
            bell=shared.bell.fileno(),
            lifeline=(shared.lifeline.fd, shared.lifeline.held),
            table=shared.table.state(),
            duty=current.duty.state(),
            board=self._board.fileno(),
            others=upgrade.others,
        )

    def resume(self, state: MasterState, plan: Plan) -> None:
        """Go on where the program before this one has left off, and replace its workers by ones of *plan*."""
        self._attempt = "upgrade"
        state.take_descriptors()
        listeners = [Listener.resume(each) for each in state.listeners]
        self._inherited = [each for each in listeners if each.sock.fileno() in state.inherited]
        duty = Duty.resume(self._board, state.duty)
        self.current = Generation.resume(state.generation, plan, duty, listeners, self._inherited)
        self._connections.resume(state.connections, [each.sock for each in listeners])
        self._pool.resume(state.children, self.current)
        self._policy.generation = self.current
        self._try_or_refuse(lambda: plan)

    # The end.

    def end(self) -> None:
        """Close all listeners, let all workers leave, and care no more about a change under way."""
        if self._is_over:
            return
        self._is_over = True
        self._connections.watch([])
        generations = [each for each in (self.current, self._candidate) if each]
        for generation in generations:
            self._pool.retire(generation, generation.number, _NEVER)
        self._retiring += generations
        for listener in {each for generation in generations for each in generation.listeners} | {*self._inherited}:
            listener.close(unlink=True)
        self._candidate = None
        self._policy.generation = None
        if self._check:
            self._check.cancel()
            self._check = None


def _where(generation: Generation) -> str:
    return ", ".join(str(listener.endpoint) for listener in generation.listeners)


def _leaving_time(limits: Limits) -> float:
    """Return how long a worker may take to leave: as long as its job may take, and a little."""
    return limits.lookup_timeout + 2 * GRACE if limits.lookup_timeout else _NEVER
