"""The library: registering, serving, stopping, from whichever thread or handler, and the errors on the way."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefork_socketmap import Config, Endpoint, ListenError, RunningServer, Server, SettingError, StartError
from prefork_socketmap.client import SocketmapClient, TempFail
from tests.integration.servers.process import free_port
from tests.processes import await_end, children, is_alive, kill
from tests.serving import DEADLINE, Client, Fork, Gate, Serve, exit_code, is_free, rows_of, say_ok, serving
from tests.waiting import eventually


@pytest.fixture
def server() -> Iterator[Server]:
    """A server with one map; closed in the end."""
    made = Server()
    made.register_map("map", say_ok)
    yield made
    made.close()


@pytest.fixture
def unix(directory: Path) -> str:
    return f"unix:{directory}/socket"


# Registering.


def test_the_decorators_register_a_function_and_leave_it_as_it_is(unix: str) -> None:
    server = Server()

    @server.map("map")
    def answer(key: str) -> str:
        return f"map {key}"

    @server.default_map
    def anything(name: str, key: str) -> str:
        return f"default {name} {key}"

    assert answer("key") == "map key"
    assert anything("name", "key") == "default name key"
    server.listen(unix)
    with server.start(), Client(unix) as client:
        assert client.ask(b"map key") == b"OK map key"
        assert client.ask(b"other key") == b"OK default other key"


def test_a_map_cannot_be_registered_twice(server: Server) -> None:
    with pytest.raises(ValueError, match="'map' is registered already"):
        server.register_map("map", say_ok)


def test_a_default_map_cannot_be_registered_twice(server: Server) -> None:
    server.register_default_map(lambda name, key: None)
    with pytest.raises(ValueError, match="default map is registered already"):
        server.default_map(lambda name, key: None)


@pytest.mark.parametrize("name", ["two words", " ", ""])
def test_a_name_that_no_request_can_carry_is_an_error(server: Server, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a map's name"):
        server.register_map(name, say_ok)


def test_serving_without_a_map_is_an_error(unix: str) -> None:
    server = Server()
    server.listen(unix)
    with pytest.raises(RuntimeError, match="no map is registered"):
        server.start()
    with pytest.raises(RuntimeError, match="no map is registered"):
        server.serve_forever()


def test_a_default_map_is_enough_to_serve(unix: str) -> None:
    server = Server()
    server.default_map(lambda name, key: name)
    server.listen(unix)
    with server.start(), Client(unix) as client:
        assert client.ask(b"any key") == b"OK any"


def test_serving_without_an_endpoint_is_an_error(server: Server) -> None:
    with pytest.raises(RuntimeError, match=r"call listen\(\) first"):
        server.start()


@pytest.mark.parametrize("text", ["127.0.0.1:27823", "inet:host:port", "unix:", "tcp:host:1", "inet:[::1:1", ""])
def test_an_endpoint_that_is_not_one_is_an_error_that_says_what_is(server: Server, text: str) -> None:
    with pytest.raises(SettingError, match=r"inet:host:port"):
        server.listen(text)


# Addresses.


def test_an_address_that_is_in_use_is_an_error_that_names_it(server: Server) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as other:
        endpoint = f"inet:127.0.0.1:{other.getsockname()[1]}"
        server.listen(endpoint)
        with pytest.raises(ListenError, match=f"cannot listen on {endpoint}: .*in use"):
            server.start()
        with pytest.raises(ListenError, match="in use"):
            server.serve_forever()


def test_an_address_that_is_not_ours_is_an_error_that_names_it(server: Server) -> None:
    server.listen("inet:192.0.2.1:27823")
    with pytest.raises(ListenError, match=r"inet:192\.0\.2\.1:27823"):
        server.start()


def test_a_host_without_an_address_is_an_error_that_names_it(server: Server) -> None:
    server.listen("inet:host.invalid:27823")
    with pytest.raises(ListenError, match=r"inet:host\.invalid:27823"):
        server.start()


def test_an_address_that_cannot_be_bound_leaves_nothing_of_the_others(server: Server, directory: Path) -> None:
    path = directory / "socket"
    server.listen(f"unix:{path}")
    server.listen("inet:192.0.2.1:27823")
    with pytest.raises(ListenError):
        server.start()
    assert not path.exists()


def test_several_endpoints_are_served_at_once(server: Server, unix: str) -> None:
    server.listen("inet:127.0.0.1:0")
    server.listen("inet:[::1]:0")
    server.listen(unix)
    with server.start() as running:
        assert len(running.endpoints) == 3
        assert not any(endpoint.endswith(":0") for endpoint in running.endpoints)
        for endpoint in running.endpoints:
            with Client(endpoint) as client:
                assert client.ask(b"map key") == b"OK ok"


def test_an_address_may_leave_the_port_to_the_config_and_the_host_to_us(fork: Fork) -> None:
    port = free_port()
    server = Server(Config(port=port))
    server.register_map("map", say_ok)
    fork(lambda: server.listen_and_serve(""))
    with serving(f"inet:127.0.0.1:{port}") as client:
        assert client.ask(b"map key") == b"OK ok"


def test_listen_and_serve_takes_host_and_port(server: Server, fork: Fork) -> None:
    port = free_port()
    fork(lambda: server.listen_and_serve(f"127.0.0.1:{port}"))
    with serving(f"inet:127.0.0.1:{port}") as client:
        assert client.ask(b"map key") == b"OK ok"


def test_listen_and_serve_unix_takes_a_path(server: Server, fork: Fork, directory: Path) -> None:
    path = directory / "socket"
    fork(lambda: server.listen_and_serve_unix(str(path)))
    with serving(f"unix:{path}") as client:
        assert client.ask(b"map key") == b"OK ok"


def test_an_endpoint_may_say_more_than_its_text(server: Server, directory: Path) -> None:
    path = directory / "socket"
    server.listen(Endpoint("unix", path=str(path), mode=0o600))
    with server.start():
        assert path.stat().st_mode & 0o777 == 0o600


# Workers.


def test_on_worker_start_runs_in_each_worker_before_it_serves(unix: str) -> None:
    server = Server(Config(min_spare=3))
    opened: list[int] = []
    server.default_map(lambda name, key: f"{opened} {os.getpid()}")

    @server.on_worker_start
    def open_it() -> None:
        opened.append(os.getpid())

    server.listen(unix)
    with server.start() as running:
        for _ in range(3):
            with Client(unix) as client:
                found = client.ask(b"who key").decode()
            [opener, worker] = found.removeprefix("OK ").split()
            assert opener == f"[{worker}]"
            assert int(worker) in children(running.pid)
    assert opened == []


def test_a_worker_that_cannot_start_keeps_the_server_from_starting(server: Server, unix: str) -> None:
    @server.on_worker_start
    def open_it() -> None:
        raise LookupError("no such database")

    server.listen(unix)
    with pytest.raises(StartError, match="LookupError: no such database"):
        server.start()
    with pytest.raises(StartError, match="no such database"):
        server.serve_forever()


def test_a_worker_that_exits_or_dies_while_it_starts_is_an_error_that_says_so(server: Server, unix: str) -> None:
    server.on_worker_start(lambda: kill(os.getpid()))
    server.listen(unix)
    with pytest.raises(StartError, match="was killed by signal 9 before it was ready"):
        server.start()


# Starting and stopping.


def test_a_started_server_stops_when_its_block_is_left(server: Server, directory: Path) -> None:
    path = directory / "socket"
    server.listen(f"unix:{path}")
    with server.start() as running:
        master, workers = running.pid, children(running.pid)
        assert workers
    assert running.pid == 0
    assert not any(map(is_alive, [master, *workers]))
    assert not path.exists()


def test_a_server_cannot_serve_twice_at_a_time(server: Server, unix: str) -> None:
    server.listen(unix)
    with server.start():
        with pytest.raises(RuntimeError, match="serving already"):
            server.start()
        with pytest.raises(RuntimeError, match="serving already"):
            server.serve_forever()


def test_a_server_may_serve_again_after_a_shutdown(server: Server, unix: str) -> None:
    server.listen(unix)
    for _ in range(2):
        with server.start(), Client(unix) as client:
            assert client.ask(b"map key") == b"OK ok"


def test_a_closed_server_cannot_serve_again(server: Server, unix: str) -> None:
    server.listen(unix)
    with server.start():
        server.close()
    with pytest.raises(RuntimeError, match="closed"):
        server.start()
    with pytest.raises(RuntimeError, match="closed"):
        server.serve_forever()


def test_stopping_a_server_that_does_not_serve_does_nothing(server: Server) -> None:
    server.shutdown()
    server.shutdown(0)
    server.close()
    server.close()


def test_shutdown_waits_for_the_lookups_under_way(serve: Serve) -> None:
    gate = Gate()
    site = serve({"slow": gate.lookup})
    client = site.connect()
    client.request(b"slow key")
    gate.await_arrival()
    stopping = threading.Thread(target=site.server.shutdown)
    stopping.start()
    gate.open()
    assert client.reply() == b"OK done"
    stopping.join(DEADLINE)
    assert not stopping.is_alive()


def test_shutdown_past_its_timeout_raises_and_leaves_the_server_stopping(serve: Serve) -> None:
    gate = Gate()
    site = serve({"slow": gate.lookup})
    client = site.connect()
    client.request(b"slow key")
    gate.await_arrival()
    with pytest.raises(TimeoutError, match="goes on stopping"):
        site.server.shutdown(0.1)
    with pytest.raises(RuntimeError, match="serving already"):
        site.server.start()
    gate.open()
    assert client.reply() == b"OK done"
    site.server.shutdown(DEADLINE)
    assert not is_alive(site.pid)


def test_close_does_not_wait_for_the_lookups_under_way(serve: Serve) -> None:
    gate = Gate()
    site = serve({"slow": gate.lookup})
    client = site.connect()
    client.request(b"slow key")
    gate.await_arrival()
    site.server.close()
    assert not is_alive(site.pid)
    client.end()


@pytest.mark.parametrize("stop", ["shutdown", "close"])
def test_a_server_in_the_foreground_is_stopped_from_another_thread(
    server: Server, unix: str, fork: Fork, stop: str
) -> None:
    def serve_until_asked_to_stop() -> None:
        def ask_it() -> None:
            with serving(unix) as client:
                assert client.ask(b"map key") == b"OK ok"
            getattr(server, stop)()

        thread = threading.Thread(target=ask_it)
        thread.start()
        server.serve_forever()
        thread.join(DEADLINE)
        assert not thread.is_alive()

    server.listen(unix)
    assert exit_code(fork(serve_until_asked_to_stop)) == 0


@pytest.mark.parametrize("stop", ["shutdown", "close"])
def test_a_server_in_the_foreground_is_stopped_from_a_signal_handler(
    server: Server, unix: str, fork: Fork, stop: str
) -> None:
    def serve_with_a_handler() -> None:
        signal.signal(signal.SIGUSR1, lambda number, frame: getattr(server, stop)())
        server.serve_forever()

    server.listen(unix)
    process = fork(serve_with_a_handler)
    with serving(unix) as client:
        assert client.ask(b"map key") == b"OK ok"
    kill(process.pid or 0, signal.SIGUSR1)
    assert exit_code(process) == 0


@pytest.mark.parametrize("stop", ["shutdown", "close"])
def test_a_started_server_is_stopped_from_a_signal_handler(server: Server, unix: str, fork: Fork, stop: str) -> None:
    gate = Gate()

    def start_and_wait() -> None:
        stopped: list[int] = []

        def stop_it(number: int, frame: object) -> None:
            getattr(server, stop)()
            stopped.append(number)

        signal.signal(signal.SIGUSR1, stop_it)
        running = server.start()
        gate.arrive()
        eventually(lambda: stopped, DEADLINE)
        assert running.pid == 0

    server.listen(unix)
    process = fork(start_and_wait)
    gate.await_arrival()
    kill(process.pid or 0, signal.SIGUSR1)
    assert exit_code(process) == 0


def test_a_server_serves_in_a_thread_and_leaves_the_signals_alone(server: Server, unix: str) -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    server.listen(unix)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with serving(unix) as client:
        assert client.ask(b"map key") == b"OK ok"
        assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before
    server.shutdown(DEADLINE)
    thread.join(DEADLINE)
    assert not thread.is_alive()


@pytest.fixture
def in_thread(unix: str, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], None]]:
    """Serve in a thread of this process, with one worker; stopped in the end."""
    caplog.set_level(logging.INFO)
    server = Server(Config(process_limit=1))
    server.register_map("map", say_ok)
    server.listen(unix)
    thread = threading.Thread(target=server.serve_forever)

    def start() -> None:
        thread.start()
        # It answers a moment before the master knows; a worker that dies then is the end of the start.
        eventually(lambda: f"serving {unix}" in caplog.messages, DEADLINE)

    yield start
    server.shutdown(DEADLINE)
    thread.join(DEADLINE)
    assert not thread.is_alive()


def await_children(number: int) -> list[int]:
    """Wait until this process has so many children that are idle workers; return their process ids."""

    def found() -> list[int]:
        workers = [row.pid for row in rows_of(os.getpid()) if is_free(row) and is_alive(row.pid)]
        assert len(workers) == number
        return workers

    return eventually(found, DEADLINE)


def test_a_worker_that_dies_is_replaced_when_the_server_runs_in_a_thread(in_thread: Callable[[], None]) -> None:
    in_thread()
    [victim] = await_children(1)
    kill(victim)
    await_end(victim)
    await_children(1)


def test_the_other_children_of_the_program_are_left_to_it(in_thread: Callable[[], None]) -> None:
    in_thread()
    [worker] = await_children(1)
    child = subprocess.Popen(["false"])
    await_end(child.pid)
    kill(worker)
    await_end(worker)
    await_children(1)
    assert child.wait(DEADLINE) == 1


def test_the_program_gets_its_signal_handlers_back(server: Server, unix: str, fork: Fork) -> None:
    def stop_it() -> None:
        serving(unix).close()
        server.shutdown()

    def serve_and_compare() -> None:
        signal.signal(signal.SIGHUP, say_nothing)
        before = {number: signal.getsignal(number) for number in signal.valid_signals()}
        threading.Thread(target=stop_it).start()
        server.serve_forever()
        assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before

    server.listen(unix)
    assert exit_code(fork(serve_and_compare)) == 0


def say_nothing(number: int, frame: object) -> None:
    pass


def test_a_server_may_be_started_from_another_thread_than_the_main_one(server: Server, unix: str) -> None:
    server.listen(unix)
    running: list[RunningServer] = []
    thread = threading.Thread(target=lambda: running.append(server.start()))
    thread.start()
    thread.join(DEADLINE)
    with Client(unix) as client:
        assert client.ask(b"map key") == b"OK ok"
        kill(running[0].pid, signal.SIGHUP)
        assert client.ask(b"map key") == b"OK ok"
    server.shutdown(DEADLINE)
    assert running[0].pid == 0


def test_two_servers_run_and_stop_independently(server: Server, unix: str, directory: Path) -> None:
    other = Server()
    other.register_map("map", lambda key: "other")
    other.listen(f"unix:{directory}/other")
    server.listen(unix)
    with server.start():
        with other.start(), Client(f"unix:{directory}/other") as client:
            assert client.ask(b"map key") == b"OK other"
        with Client(unix) as client:
            assert client.ask(b"map key") == b"OK ok"


def test_our_client_gets_the_answers_and_asks_again_after_a_restart(unix: str) -> None:
    server = Server()
    server.register_map("map", {"found": "value"}.get)
    server.listen(unix)
    with SocketmapClient(unix) as client:
        for _ in range(2):
            with server.start():
                assert client.lookup("map", "found") == "value"
                assert client.lookup("map", "missing") is None
                with pytest.raises(TempFail, match="the lookup map does not exist"):
                    client.lookup("nowhere", "key")


def test_a_started_server_ends_with_the_process_that_started_it(server: Server, unix: str, fork: Fork) -> None:
    def start_and_wait() -> None:
        server.start()
        signal.pause()

    server.listen(unix)
    starter = fork(start_and_wait)
    serving(unix).close()
    [master] = eventually(lambda: children(starter.pid or 0), DEADLINE)
    workers = eventually(lambda: children(master), DEADLINE)
    starter.kill()
    await_end(master, *workers)
    assert not Path(unix.removeprefix("unix:")).exists()


PRINTING_PROGRAM = """
import sys
from prefork_socketmap import Server
from tests.integration.servers.process import free_port

server = Server()
server.register_map("map", lambda key: "ok")
server.listen(sys.argv[1])
print("once")
with server.start():
    pass
"""


def test_what_the_program_has_printed_is_not_printed_again(unix: str) -> None:
    printed = subprocess.run(
        [sys.executable, "-c", PRINTING_PROGRAM, unix],
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        timeout=DEADLINE,
        check=True,
    )
    assert printed.stdout == b"once\n"


def test_a_timeout_that_the_program_sets_for_its_sockets_is_not_ours(unix: str) -> None:
    """``socket.setdefaulttimeout`` is what many programs call for the sake of the databases they ask."""
    server = Server()
    server.register_map("map", say_ok)
    server.on_worker_start(lambda: socket.setdefaulttimeout(0.1))
    server.listen(unix)
    with server.start() as running, Client(unix) as client:
        assert client.ask(b"map key") == b"OK ok"
        eventually(lambda: all(map(is_free, rows_of(running.pid))), DEADLINE, "idle workers")
        time.sleep(0.3)  # longer than that timeout
        assert client.is_open
        assert client.ask(b"map key") == b"OK ok"
