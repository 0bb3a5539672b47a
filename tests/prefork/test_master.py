"""The master as the daemon uses it: plans that change at a reload, inherited sockets, access, and its observer."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from prefork_socketmap.config import Config
from prefork_socketmap.prefork.counters import SlotCounters
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.prefork.master import Master
from prefork_socketmap.prefork.plan import Observer, Plan
from prefork_socketmap.service import Service
from prefork_socketmap.settings import SettingError
from tests.integration.servers.process import free_port
from tests.processes import children, kill, process_title
from tests.serving import DEADLINE, Client, End, Fork, end_of_newcomer, exit_code, serving
from tests.waiting import eventually

Event = tuple[str, object, object]


class Reporter(Observer):
    """Tells the test, in another process, what the master tells it."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def ready(self, generation: int) -> None:
        self._pipe.send(("ready", generation, None))

    def reloading(self) -> None:
        self._pipe.send(("reloading", None, None))

    def reloaded(self, generation: int, problem: str | None) -> None:
        self._pipe.send(("reloaded", generation, problem))

    def stopping(self) -> None:
        self._pipe.send(("stopping", None, None))


def plan(name: str, *endpoints: Endpoint, limits: Config | None = None, **rest: object) -> Plan:
    """Return a plan whose workers answer with *name*."""
    config = limits or Config(process_limit=2)

    def start(counters: SlotCounters) -> Service:
        return Service({"plan": lambda key: name}, None, config, counters)

    return dataclasses.replace(Plan(endpoints, config, start), **rest)  # type: ignore[arg-type]


def cannot_start(_counters: SlotCounters) -> Service:
    raise SettingError("maps.users.type", "no such type")


class Running:
    """A master in a process of its own. It takes up ``plans``, one after the other; an exception refuses a reload."""

    def __init__(self, fork: Fork, plans: Sequence[Plan | Exception], inherited: Sequence[socket.socket]) -> None:
        self._events, reporting = multiprocessing.Pipe(duplex=False)
        loads = iter(plans[1:])

        def load() -> Plan:
            following = next(loads)
            if isinstance(following, Exception):
                raise following
            return following

        def run() -> None:
            first = plans[0]
            assert isinstance(first, Plan)
            Master(first, load=load, observer=Reporter(reporting), inherited=inherited).run()

        self.process: ForkProcess = fork(run)
        assert self.event() == ("ready", 1, None)

    def event(self) -> Event:
        """Return what the observer was told next."""
        assert self._events.poll(DEADLINE), "nothing happens"
        event: Event = self._events.recv()
        return event

    def send(self, number: int) -> None:
        assert self.process.pid
        kill(self.process.pid, number)

    def reload(self) -> Event:
        """Reload; return how that ended."""
        self.send(signal.SIGHUP)
        assert self.event() == ("reloading", None, None)
        return self.event()


Run = Callable[..., Running]


@pytest.fixture
def run(fork: Fork) -> Run:
    """Run a master: ``run(plan, plan_after_reload, ..., inherited=[...])``."""

    def start(*plans: Plan | Exception, inherited: Sequence[socket.socket] = ()) -> Running:
        return Running(fork, plans, inherited)

    return start


@pytest.fixture
def unix(directory: Path) -> Callable[[str], Endpoint]:
    """Return an endpoint for a Unix socket by name."""
    return lambda name: Endpoint("unix", path=str(directory / name))


def asked(endpoint: Endpoint) -> bytes:
    """Return the answer of a server that listens already."""
    with Client(str(endpoint)) as client:
        return client.ask(b"plan key")


Unix = Callable[[str], Endpoint]


# Reload.


def test_a_reload_takes_up_the_new_plan(run: Run, unix: Unix) -> None:
    master = run(plan("first", unix("a")), plan("second", unix("a")))
    assert asked(unix("a")) == b"OK first"
    assert master.reload() == ("reloaded", 2, None)
    eventually(lambda: asked(unix("a")) == b"OK second", DEADLINE)


def test_a_reload_opens_new_endpoints_and_closes_those_that_are_gone(run: Run, unix: Unix) -> None:
    master = run(plan("first", unix("a"), unix("b")), plan("second", unix("b"), unix("c")))
    kept = Path(unix("b").path).stat().st_ino
    assert master.reload() == ("reloaded", 2, None)
    eventually(lambda: asked(unix("b")) == asked(unix("c")) == b"OK second", DEADLINE)
    assert not Path(unix("a").path).exists()
    assert Path(unix("b").path).stat().st_ino == kept


def test_a_reload_changes_the_permissions_of_a_socket_that_stays(run: Run, unix: Unix) -> None:
    master = run(plan("first", unix("a")), plan("second", dataclasses.replace(unix("a"), mode=0o600)))
    assert master.reload() == ("reloaded", 2, None)
    assert Path(unix("a").path).stat().st_mode & 0o777 == 0o600


def test_a_reload_changes_the_limits(run: Run, unix: Unix) -> None:
    limits = Config(process_limit=4, min_spare=4)
    master = run(plan("first", unix("a")), plan("second", unix("a"), limits=limits))
    assert master.reload() == ("reloaded", 2, None)
    assert master.process.pid
    pid = master.process.pid
    eventually(lambda: [process_title(worker) for worker in children(pid)] == [SECOND] * 4, DEADLINE)


SECOND = "prefork-socketmap: worker, generation 2, idle"


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (SettingError("idle_timeout", "wrong"), "idle_timeout: wrong"),
        (OSError(2, "No such file or directory", "config.toml"), "config.toml"),
        (RuntimeError("not foreseen"), "not foreseen"),
    ],
)
def test_a_plan_that_cannot_be_loaded_changes_nothing(run: Run, unix: Unix, second: Exception, problem: str) -> None:
    master = run(plan("first", unix("a")), second, plan("third", unix("a")))
    event, generation, reason = master.reload()
    assert (event, generation) == ("reloaded", 1)
    assert problem in str(reason)
    assert asked(unix("a")) == b"OK first"
    assert master.reload() == ("reloaded", 2, None)
    eventually(lambda: asked(unix("a")) == b"OK third", DEADLINE)


def test_an_endpoint_that_cannot_be_opened_changes_nothing(run: Run, unix: Unix) -> None:
    Path(unix("busy").path).write_text("no socket")
    master = run(plan("first", unix("a")), plan("second", unix("b"), unix("busy")))
    event, generation, reason = master.reload()
    assert (event, generation) == ("reloaded", 1)
    assert f"cannot listen on {unix('busy')}" in str(reason)
    assert asked(unix("a")) == b"OK first"
    assert not Path(unix("b").path).exists()


def test_workers_that_cannot_start_change_nothing(run: Run, unix: Unix) -> None:
    broken = plan("second", unix("a"), unix("b"), start=cannot_start)
    master = run(plan("first", unix("a")), broken, plan("third", unix("a")))
    assert master.reload() == ("reloaded", 1, "maps.users.type: no such type")
    assert asked(unix("a")) == b"OK first"
    assert not Path(unix("b").path).exists()
    assert master.reload() == ("reloaded", 2, None)
    eventually(lambda: asked(unix("a")) == b"OK third", DEADLINE)


def test_workers_that_die_while_they_start_change_nothing(run: Run, unix: Unix) -> None:
    def die(_counters: SlotCounters) -> Service:
        os._exit(3)

    master = run(plan("first", unix("a")), plan("second", unix("a"), start=die))
    event, generation, reason = master.reload()
    assert (event, generation) == ("reloaded", 1)
    assert "exited with status 3 before it was ready" in str(reason)
    assert asked(unix("a")) == b"OK first"


def test_a_reload_that_is_asked_for_during_another_is_made_up_for(run: Run, unix: Unix) -> None:
    master = run(plan("first", unix("a")), plan("second", unix("a")), plan("third", unix("a")))
    master.send(signal.SIGHUP)
    assert master.event() == ("reloading", None, None)
    master.send(signal.SIGHUP)
    assert master.event() == ("reloaded", 2, None)
    assert master.event() == ("reloading", None, None)
    assert master.event() == ("reloaded", 3, None)
    eventually(lambda: asked(unix("a")) == b"OK third", DEADLINE)


def test_the_observer_hears_of_the_stop(run: Run, unix: Unix) -> None:
    master = run(plan("first", unix("a")))
    master.send(signal.SIGTERM)
    assert master.event() == ("stopping", None, None)
    assert exit_code(master.process) == 0


def test_an_observer_that_fails_does_not_stop_the_server(fork: Fork, unix: Unix) -> None:
    class Failing(Observer):
        def ready(self, generation: int) -> None:
            raise OSError("the disk is full")

    fork(lambda: Master(plan("first", unix("a")), observer=Failing()).run())
    with serving(str(unix("a"))) as client:
        assert client.ask(b"plan key") == b"OK first"


# Sockets of somebody else.


def test_inherited_sockets_are_served_beside_the_plan_and_spared(run: Run, unix: Unix) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as theirs:
        theirs.bind(unix("theirs").path)
        theirs.listen()
        master = run(plan("first", unix("a")), plan("second", unix("b")), inherited=[theirs])
        assert asked(unix("theirs")) == asked(unix("a")) == b"OK first"
        assert master.reload() == ("reloaded", 2, None)
        eventually(lambda: asked(unix("theirs")) == asked(unix("b")) == b"OK second", DEADLINE)
        master.send(signal.SIGTERM)
        assert exit_code(master.process) == 0
        Client(str(unix("theirs"))).close()  # it goes on listening: somebody else will accept


def test_an_inherited_socket_may_stand_in_the_plan_too(run: Run, unix: Unix) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as theirs:
        theirs.bind(unix("theirs").path)
        theirs.listen()
        run(plan("first", unix("theirs")), inherited=[theirs])
        assert asked(unix("theirs")) == b"OK first"


# Access.


def test_a_client_whose_address_is_not_allowed_is_refused_by_reset(run: Run, unix: Unix) -> None:
    inet = Endpoint("inet", "127.0.0.1", free_port())
    run(plan("first", inet, unix("a"), allow=lambda address: address == "127.0.0.2"))
    for _ in range(3):
        assert end_of_newcomer(str(inet)) is End.RESET
    assert asked(unix("a")) == b"OK first"  # it has no address; its file's mode says who may connect
    with socket.create_connection((inet.host, inet.port), DEADLINE, source_address=("127.0.0.2", 0)) as allowed:
        allowed.sendall(b"8:plan key,")
        assert allowed.recv(100) == b"8:OK first,"
