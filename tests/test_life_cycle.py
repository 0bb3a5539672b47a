"""The life of a server and of its workers: signals, deaths, reloads, and what is left behind: nothing."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from prefork_socketmap import Config, ListenError, Server
from tests.integration.servers.process import free_port
from tests.processes import await_end, children, descriptors, is_alive, kill, process_title
from tests.serving import DEADLINE, Client, Fork, Gate, Serve, abrupt, exit_code, kept, say_ok, serving, who
from tests.waiting import eventually


@pytest.fixture
def address(endpoint: str) -> str:
    """Return an endpoint that is known before the server runs."""
    if endpoint.startswith("unix:"):
        return endpoint
    return f"inet:127.0.0.1:{free_port()}"


Foreground = Callable[..., ForkProcess]


@pytest.fixture
def foreground(fork: Fork, gate: Gate, address: str) -> Foreground:
    """Serve in the foreground of a new process, at the address: "slow" stands at the gate, "ok" says so."""

    def start(config: Config | None = None) -> ForkProcess:
        server = Server(config)
        server.register_map("slow", gate.lookup)
        server.register_map("ok", say_ok)
        server.listen(address)
        process = fork(server.serve_forever)
        with serving(address) as client:
            assert client.ask(b"ok key") == b"OK ok"
        return process

    return start


def pid_of(process: ForkProcess) -> int:
    assert process.pid
    return process.pid


# Stopping.


def test_term_lets_a_lookup_finish_and_answers_it_and_then_the_server_is_gone(
    foreground: Foreground, gate: Gate, address: str
) -> None:
    process = foreground()
    workers = children(pid_of(process))
    client = Client(address)
    client.request(b"slow key")
    gate.await_arrival()
    kill(pid_of(process), signal.SIGTERM)
    await_refusal(address)
    assert process.is_alive()
    gate.open()
    assert client.reply() == b"OK done"
    client.end()
    assert exit_code(process) == 0
    await_end(*workers)


def await_refusal(address: str) -> None:
    """Wait until nobody listens at *address*."""

    def nobody_listens() -> bool:
        try:
            Client(address).close()
        except OSError:
            return True
        return False

    eventually(nobody_listens, DEADLINE)


def test_half_a_request_does_not_hold_up_a_stop(foreground: Foreground, address: str) -> None:
    process = foreground(Config(stop_timeout=0, read_timeout=0))
    with Client(address) as client:
        assert client.ask(b"ok key") == b"OK ok"
        client.send(b"6:ok")
        eventually(lambda: kept(pid_of(process)), DEADLINE, "the half that waits")
        kill(pid_of(process), signal.SIGTERM)
        client.end()
    assert exit_code(process) == 0


def test_term_closes_idle_connections_by_reset(foreground: Foreground, address: str) -> None:
    process = foreground()
    with Client(address) as fresh, Client(address) as served:
        assert served.ask(b"ok key") == b"OK ok"
        kill(pid_of(process), signal.SIGTERM)
        expected = abrupt(address)
        assert served.end() is expected
        assert fresh.end() is expected
    assert exit_code(process) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_int_and_quit_stop_at_once(foreground: Foreground, gate: Gate, address: str, number: int) -> None:
    process = foreground()
    with Client(address) as client:
        client.request(b"slow key")
        gate.await_arrival()
        workers = children(pid_of(process))
        kill(pid_of(process), number)
        assert exit_code(process) == 0
        client.end()
    assert not any(map(is_alive, workers))


def test_a_lookup_that_does_not_end_is_killed_after_stop_timeout(
    foreground: Foreground, gate: Gate, address: str
) -> None:
    process = foreground(Config(stop_timeout=0.5))
    with Client(address) as client:
        client.request(b"slow key")
        gate.await_arrival()
        began = time.monotonic()
        kill(pid_of(process), signal.SIGTERM)
        client.end()
        assert time.monotonic() - began >= 0.5
    assert exit_code(process) == 0


def test_quit_ends_a_stop_that_takes_its_time(foreground: Foreground, gate: Gate, address: str) -> None:
    process = foreground()
    with Client(address) as client:
        client.request(b"slow key")
        gate.await_arrival()
        kill(pid_of(process), signal.SIGTERM)
        await_refusal(address)
        kill(pid_of(process), signal.SIGTERM)
        assert client.is_open
        kill(pid_of(process), signal.SIGQUIT)
        assert exit_code(process) == 0


def test_a_signal_from_the_terminal_to_all_processes_leaves_the_rest_to_the_master(
    foreground: Foreground, address: str
) -> None:
    process = foreground()
    worker = children(pid_of(process))[0]
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        kill(worker, number)
    with Client(address) as client:
        for _ in range(20):
            assert client.ask(b"ok key") == b"OK ok"
    assert is_alive(worker)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_the_socket_file_is_removed_by_a_stop(fork: Fork, directory: Path, number: int) -> None:
    path = directory / "socket"
    server = Server()
    server.register_map("ok", say_ok)
    process = fork(lambda: server.listen_and_serve_unix(str(path)))
    with serving(f"unix:{path}") as client:
        assert client.ask(b"ok key") == b"OK ok"
    kill(pid_of(process), number)
    assert exit_code(process) == 0
    assert not path.exists()


def test_a_worker_that_ends_leaves_the_socket_file(serve: Serve, directory: Path) -> None:
    path = directory / "socket"
    site = serve({"ok": say_ok}, Config(process_limit=1), f"unix:{path}")
    for pid, number in ((site.pid, signal.SIGHUP), (0, signal.SIGKILL)):
        [worker] = site.await_workers(1)
        kill(pid or worker, number)
        await_end(worker)
        with site.connect() as client:
            assert client.ask(b"ok key") == b"OK ok"


def test_a_file_that_somebody_put_in_the_place_of_the_socket_stays(serve: Serve, directory: Path) -> None:
    path = directory / "socket"
    site = serve({"ok": say_ok}, endpoint=f"unix:{path}")
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        site.server.shutdown()
        assert path.exists()


def test_a_live_socket_is_refused_and_goes_on(serve: Serve, directory: Path) -> None:
    site = serve({"ok": say_ok}, endpoint=f"unix:{directory}/socket")
    with pytest.raises(ListenError, match="another process listens on it"):
        serve({"ok": say_ok}, endpoint=site.endpoint)
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"


def test_a_socket_that_a_killed_server_left_is_replaced(serve: Serve, directory: Path) -> None:
    site = serve({"ok": say_ok}, endpoint=f"unix:{directory}/socket")
    workers = site.await_workers(5)
    kill(site.pid)
    await_end(site.pid, *workers)
    again = serve({"ok": say_ok}, endpoint=f"unix:{directory}/socket")
    with again.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"


# Deaths.


def test_a_killed_master_leaves_no_worker(serve: Serve, endpoint: str) -> None:
    site = serve({"ok": say_ok}, endpoint=endpoint)
    with site.connect() as silent, site.connect() as fresh:
        assert silent.ask(b"ok key") == b"OK ok"
        workers = site.workers
        assert workers
        kill(site.pid)
        await_end(site.pid, *workers)
        silent.end()
        fresh.end()


def test_a_lookup_under_way_is_answered_although_the_master_was_killed(
    serve: Serve, endpoint: str, gate: Gate
) -> None:
    site = serve({"slow": gate.lookup}, endpoint=endpoint)
    with site.connect() as client:
        client.request(b"slow key")
        gate.await_arrival()
        workers = site.workers
        kill(site.pid)
        await_end(site.pid)
        gate.open()
        assert client.reply() == b"OK done"
        client.end()
    await_end(*workers)


def test_clients_that_send_half_a_request_keep_no_worker_when_the_master_was_killed(
    serve: Serve, endpoint: str
) -> None:
    site = serve({"ok": say_ok}, Config(read_timeout=0, keepalive_timeout=0), endpoint)
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"
        client.send(b"6:ok")
        eventually(lambda: kept(site.pid), DEADLINE, "the half that waits")
        workers = site.workers
        kill(site.pid)
        await_end(site.pid, *workers)
        client.end()


def test_a_killed_worker_is_replaced_and_costs_one_connection(serve: Serve, endpoint: str) -> None:
    site = serve({"who": who, "ok": say_ok}, Config(process_limit=2), endpoint)
    with site.connect() as bystander, site.connect() as victim:
        assert bystander.ask(b"ok key") == b"OK ok"
        for _ in range(3):
            worker = int(victim.ask(b"who key").removeprefix(b"OK "))
            kill(worker)
            await_end(worker)
            site.await_workers(2)
            if not victim.is_open:
                victim = site.connect()
        assert bystander.ask(b"ok key") == b"OK ok"


def fork_and_live_on(key: str) -> str:
    """Fork a child that does nothing, write its pid to the file *key*, and wait as long as it does."""
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    Path(key).write_text(str(child))
    os.waitpid(child, 0)
    return "done"


@pytest.mark.parametrize("served_before", [False, True], ids=["newcomer", "in the table"])
def test_a_killed_workers_connection_ends_whatever_children_of_it_live_on(
    serve: Serve, endpoint: str, directory: Path, *, served_before: bool
) -> None:
    site = serve({"fork": fork_and_live_on, "ok": say_ok}, endpoint=endpoint)
    pid_file = directory / "child"
    with site.connect() as bystander:
        assert bystander.ask(b"ok key") == b"OK ok"
        client = site.connect()
        if served_before:
            assert client.ask(b"ok key") == b"OK ok"
            site.await_idle()
        client.request(f"fork {pid_file}".encode())
        eventually(lambda: pid_file.exists() and pid_file.read_text(), DEADLINE, "a child")
        child = int(pid_file.read_text())
        try:
            (worker,) = [pid for pid in site.workers if child in children(pid)]
            kill(worker)
            assert client.end() is abrupt(endpoint)
            assert is_alive(child)
            assert bystander.ask(b"ok key") == b"OK ok"
        finally:
            kill(child)


def crash() -> None:
    faulthandler.disable()  # pytest's, which would report this one
    kill(os.getpid(), signal.SIGSEGV)


DEATHS: dict[str, Callable[[], object]] = {
    "a segmentation fault": crash,
    "SIGKILL": lambda: kill(os.getpid()),
    "os._exit(0)": lambda: os._exit(0),
    "os._exit(1)": lambda: os._exit(1),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_lookup_that_ends_its_process_loses_itself_alone(serve: Serve, endpoint: str, death: str) -> None:
    site = serve({"fatal": lambda key: DEATHS[key]() and None, "ok": say_ok}, Config(process_limit=2), endpoint)
    site.await_workers(2)
    fresh = descriptors(site.pid)
    with site.connect() as bystander:
        assert bystander.ask(b"ok key") == b"OK ok"
        with site.connect() as client:
            client.request(b"fatal " + death.encode())
            assert client.end() is abrupt(endpoint)
        site.await_count("workers", "died", 1)
        assert bystander.ask(b"ok key") == b"OK ok"
        site.await_workers(2)
        with site.connect() as client:
            assert client.ask(b"ok key") == b"OK ok"
    eventually(lambda: descriptors(site.pid) == fresh, DEADLINE)


def test_a_lookup_that_raises_what_would_end_a_program_does_not_end_its_worker(serve: Serve) -> None:
    def give_up(key: str) -> str:
        raise SystemExit(key)

    site = serve({"fatal": give_up, "who": who}, Config(process_limit=1))
    [worker] = site.await_workers(1)
    with site.connect() as client:
        assert client.ask(b"fatal key") == b"TEMP lookup failed"
        assert client.ask(b"who key") == f"OK {worker}".encode()


# Starting workers.


class Starts:
    """What happens when workers start: told by the test, counted in all processes."""

    def __init__(self) -> None:
        self._fail = multiprocessing.RawValue("b", 0)
        self._times = multiprocessing.RawArray("d", 1000)
        self._count = multiprocessing.get_context("fork").Value("i", 0)

    def __call__(self) -> None:
        with self._count.get_lock():
            self._times[self._count.value] = time.monotonic()
            self._count.value += 1
        if self._fail.value:
            raise ValueError("the database is away")

    def fail(self, yes: bool) -> None:
        self._fail.value = yes

    @property
    def times(self) -> list[float]:
        return list(self._times[: self._count.value])


def test_a_worker_that_cannot_start_is_tried_again_after_a_growing_pause(serve: Serve) -> None:
    starts = Starts()
    site = serve({"ok": say_ok}, Config(process_limit=1), on_worker_start=starts)
    [worker] = site.await_workers(1)
    starts.fail(True)
    before = len(starts.times)
    kill(worker)
    eventually(lambda: len(starts.times) >= before + 3, DEADLINE, "three attempts")
    first, second, third = starts.times[before : before + 3]
    assert second - first >= 0.9
    assert third - second >= 1.9


class Moods:
    """How workers start: ``mood`` is 0: well; 1: not in this life; 2: with SIGKILL."""

    def __init__(self) -> None:
        self._mood = multiprocessing.RawValue("b", 0)

    def __call__(self) -> None:
        if self._mood.value == 1:
            time.sleep(60)
        elif self._mood.value == 2:
            kill(os.getpid())

    def set(self, mood: int) -> None:
        self._mood.value = mood


def test_workers_that_somebody_kills_while_they_start_are_replaced_without_a_pause(serve: Serve) -> None:
    moods = Moods()
    site = serve({"ok": say_ok}, Config(process_limit=5, min_spare=3), on_worker_start=moods)
    site.await_workers(3)
    moods.set(1)
    for _ in range(10):
        before = site.workers
        for worker in before:
            kill(worker)
        eventually(lambda: len(set(site.workers) - set(before)) == 3, DEADLINE, "three new workers")  # noqa: B023
    moods.set(0)
    for worker in site.workers:
        kill(worker)
    site.await_workers(3)
    assert site.counted("workers", "throttled") == 0
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"


def test_workers_that_are_killed_on_and_on_while_they_start_make_a_pause(serve: Serve) -> None:
    moods = Moods()
    site = serve({"ok": say_ok}, Config(process_limit=1), on_worker_start=moods)
    [worker] = site.await_workers(1)
    moods.set(2)
    kill(worker)
    eventually(lambda: site.counted("workers", "throttled") >= 1, DEADLINE, "a pause")
    assert site.counted("workers", "spawned") < 200
    moods.set(0)
    site.await_workers(1)


def test_workers_that_fail_together_make_one_pause(serve: Serve) -> None:
    """Were each failure to double the pause, five workers together would keep the server waiting for long."""
    starts = Starts()
    site = serve({"ok": say_ok}, Config(process_limit=5, min_spare=5), on_worker_start=starts)
    workers = site.await_workers(5)
    starts.fail(True)
    before = len(starts.times)
    for worker in workers:
        kill(worker)
    eventually(lambda: len(starts.times) >= before + 5, DEADLINE, "the first attempts")
    starts.fail(False)
    eventually(lambda: len(site.workers) == 5, 10)
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"


# Reload.


def test_hup_replaces_the_workers_and_what_they_opened(serve: Serve, endpoint: str) -> None:
    starts = Starts()
    site = serve({"ok": say_ok}, Config(process_limit=2), endpoint, on_worker_start=starts)
    workers = site.await_workers(2)
    with site.connect() as silent, site.connect() as fresh:
        assert silent.ask(b"ok key") == b"OK ok"
        kill(site.pid, signal.SIGHUP)
        await_end(*workers)
        site.await_workers(2)
        assert len(starts.times) == 4
        assert silent.ask(b"ok key") == b"OK ok"
        assert fresh.ask(b"ok key") == b"OK ok"
    with site.connect() as newcomer:  # at the same port, though the kernel chose it
        assert newcomer.ask(b"ok key") == b"OK ok"


def test_hup_lets_a_lookup_under_way_finish(serve: Serve, endpoint: str, gate: Gate) -> None:
    site = serve({"slow": gate.lookup, "ok": say_ok}, Config(process_limit=2), endpoint)
    with site.connect() as client:
        client.request(b"slow key")
        gate.await_arrival()
        kill(site.pid, signal.SIGHUP)
        eventually(lambda: any("generation 2" in process_title(pid) for pid in site.workers), DEADLINE)
        gate.open()
        assert client.reply() == b"OK done"
        eventually(lambda: all("generation 2" in process_title(pid) for pid in site.workers), DEADLINE)
        assert client.ask(b"ok key") == b"OK ok"


def test_a_reload_that_fails_changes_nothing(serve: Serve, endpoint: str) -> None:
    starts = Starts()
    site = serve({"ok": say_ok}, Config(process_limit=2), endpoint, on_worker_start=starts)
    workers = site.await_workers(2)
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"
        starts.fail(True)
        before = len(starts.times)
        kill(site.pid, signal.SIGHUP)
        eventually(lambda: len(starts.times) > before, DEADLINE, "the new worker's attempt")
        eventually(lambda: sorted(site.workers) == sorted(workers), DEADLINE)
        assert client.ask(b"ok key") == b"OK ok"
    with site.connect() as client:
        assert client.ask(b"ok key") == b"OK ok"


def take_all_signals() -> None:
    """What a library that a map imports may do."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)


def test_no_code_of_a_map_keeps_workers_from_leaving(serve: Serve, endpoint: str) -> None:
    site = serve({"who": who}, Config(process_limit=3, min_spare=3), endpoint, on_worker_start=take_all_signals)
    with site.connect() as client:
        for _ in range(3):
            workers = site.await_workers(3)
            kill(site.pid, signal.SIGHUP)
            await_end(*workers)
            assert int(client.ask(b"who key").removeprefix(b"OK ")) not in workers
    workers = site.await_workers(3)
    site.server.shutdown()
    assert not any(map(is_alive, workers))


def test_a_stop_does_not_wait_for_a_worker_that_is_still_starting(serve: Serve, gate: Gate) -> None:
    starts = multiprocessing.RawValue("b", 0)

    def start() -> None:
        if starts.value:
            gate.lookup("")

    site = serve({"ok": say_ok}, Config(process_limit=2, stop_timeout=0), on_worker_start=start)
    site.await_workers(2)
    starts.value = 1
    kill(site.pid, signal.SIGHUP)
    gate.await_arrival()
    site.server.shutdown()
    await_end(site.pid)


def test_reloads_in_quick_succession_end_with_a_whole_pool(serve: Serve, endpoint: str) -> None:
    site = serve({"ok": say_ok}, Config(process_limit=2), endpoint)
    with site.connect() as client:
        for _ in range(20):
            kill(site.pid, signal.SIGHUP)
            assert client.ask(b"ok key") == b"OK ok"
        site.await_workers(2)
        assert client.ask(b"ok key") == b"OK ok"


def test_hup_during_a_stop_does_not_start_anything(foreground: Foreground, gate: Gate, address: str) -> None:
    process = foreground()
    with Client(address) as client:
        client.request(b"slow key")
        gate.await_arrival()
        kill(pid_of(process), signal.SIGTERM)
        await_refusal(address)
        kill(pid_of(process), signal.SIGHUP)
        gate.open()
        assert client.reply() == b"OK done"
    assert exit_code(process) == 0


# What is left behind.


def test_fifty_starts_and_stops_leave_no_process_no_file_and_no_descriptor(directory: Path) -> None:
    path = directory / "socket"
    server = Server(Config(min_spare=2))
    server.register_map("ok", say_ok)
    server.listen(f"unix:{path}")
    server.listen(f"inet:127.0.0.1:{free_port()}")
    before = descriptors(os.getpid()), children(os.getpid())
    for _ in range(50):
        with server.start() as running, Client(running.endpoints[1]) as client:
            assert client.ask(b"ok key") == b"OK ok"
        assert not path.exists()
    assert (descriptors(os.getpid()), children(os.getpid())) == before


@pytest.mark.parametrize("stop", ["shutdown", "close"])
def test_a_server_in_the_foreground_leaves_no_descriptor(fork: Fork, directory: Path, stop: str) -> None:
    path = directory / "socket"

    def stop_when_it_serves(server: Server) -> None:
        with serving(f"unix:{path}") as client:
            assert client.ask(b"ok key") == b"OK ok"
        getattr(server, stop)()

    def serve_often() -> None:
        before = descriptors(os.getpid())
        for _ in range(5):
            server = Server(Config(min_spare=2))
            server.register_map("ok", say_ok)
            stopping = threading.Thread(target=stop_when_it_serves, args=[server])
            stopping.start()
            server.listen_and_serve_unix(str(path))
            stopping.join()
            assert children(os.getpid()) == []
        assert descriptors(os.getpid()) == before

    assert exit_code(fork(serve_often)) == 0


@pytest.mark.parametrize("failing", ["bind", "start"])
def test_a_server_that_does_not_start_leaves_nothing(directory: Path, failing: str) -> None:
    path = directory / "socket"

    def refuse() -> None:
        raise ValueError("no")

    before = descriptors(os.getpid()), children(os.getpid())
    for serve_ in ("start", "serve_forever"):
        server = Server()
        server.register_map("ok", say_ok)
        server.listen(f"unix:{path}")
        if failing == "bind":
            server.listen("inet:192.0.2.1:1")
        else:
            server.on_worker_start(refuse)
        with contextlib.suppress(Exception):
            getattr(server, serve_)()
    assert (descriptors(os.getpid()), children(os.getpid())) == before
    assert not path.exists()
