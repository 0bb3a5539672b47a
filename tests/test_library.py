"""The library in the hands of a program's author: wrong usage, sockets, changes while it serves, coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import os
import pydoc
import signal
import socket
import threading
import tomllib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefork_socketmap
from prefork_socketmap import Config, Endpoint, ListenError, Reply, Server, SettingError, StartError, asynchronous
from prefork_socketmap.client import LookupTimeout, SocketmapClient, TempFail
from prefork_socketmap.socketmap.netstring import Decoder
from prefork_socketmap.testing import serve_socketmap, serving
from tests.integration.servers.process import free_port
from tests.processes import await_end, children, descriptors, kill
from tests.serving import DEADLINE, Client, Fork, Gate, exit_code, say_ok
from tests.waiting import eventually

__all__ = ["serve_socketmap"]  # a fixture

ROOT = Path(__file__).parent.parent


@pytest.fixture
def server() -> Iterator[Server]:
    """A server with one map; closed in the end."""
    made = Server(Config(min_spare=1))
    made.register_map("map", say_ok)
    yield made
    made.close()


InThread = Callable[..., threading.Thread]


@pytest.fixture
def in_thread(server: Server) -> Iterator[InThread]:
    """Serve the server in a thread; stopped in the end."""
    threads = []

    def start(serve: Callable[[], None] = server.serve_forever) -> threading.Thread:
        thread = threading.Thread(target=serve)
        thread.start()
        threads.append(thread)
        return thread

    yield start
    server.shutdown(DEADLINE)
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    """A socket that is bound to a free port, and does not listen."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", free_port()))
        yield sock


def where(sock: socket.socket) -> str:
    return f"inet:127.0.0.1:{sock.getsockname()[1]}"


def own_descriptors() -> Counter[str]:
    """Return what this process has open besides connections, of which a master in it has duplicates."""
    return descriptors(os.getpid(), 1024)


def answers(endpoint: str, request: bytes = b"map key", answer: bytes = b"OK ok") -> Client:
    """Return a client, as soon as it gets this answer at *endpoint*."""

    def ask() -> Client:
        try:
            client = Client(endpoint)
        except OSError as error:
            raise AssertionError from error
        assert client.ask(request) == answer
        return client

    return eventually(ask, DEADLINE)


# Wrong usage.


def yields(key: str) -> Iterator[str]:
    yield key


WRONG: list[tuple[Callable[[Server], object], type[Exception], str]] = [
    (lambda server: server.map(say_ok), TypeError, r"name: the function say_ok .*@server\.map\(\"name\"\)"),  # type: ignore[arg-type]
    (lambda server: server.map(""), ValueError, "cannot be a map's name"),
    (lambda server: server.map("\ud800"), ValueError, "cannot be a map's name"),
    (lambda server: server.register_map(b"a", say_ok), TypeError, "name: a bytes is not accepted"),  # type: ignore[arg-type]
    (lambda server: server.register_map("a", {"x": "y"}), TypeError, r"function: a table .*function\(key\)"),  # type: ignore[arg-type]
    (
        lambda server: server.register_map("a", lambda: "x"),  # type: ignore[arg-type]
        TypeError,
        r"function: .*<lambda> .*function\(key\); \(\)",
    ),
    (lambda server: server.register_map("a", yields), TypeError, "this one yields"),  # type: ignore[arg-type]
    (lambda server: server.default_map(say_ok), TypeError, r"function\(name, key\)"),  # type: ignore[type-var]
    (lambda server: server.on_worker_start(say_ok), TypeError, r"function\(\)"),  # type: ignore[type-var]
    (lambda server: server.on_worker_stop(3), TypeError, r"function: 3 .*function\(\)"),  # type: ignore[type-var]
    (lambda server: server.listen(1.5), TypeError, "endpoint: 1.5 .*expected an Endpoint"),  # type: ignore[arg-type]
    (lambda server: server.listen(("h", 1)), TypeError, "endpoint: .*expected an Endpoint"),  # type: ignore[arg-type]
    (lambda server: server.listen(True), TypeError, "endpoint: True"),
    (lambda server: server.listen(4096), ValueError, "sock: 4096 is no open socket .*expected a bound"),
    (lambda server: server.listen(-1), ValueError, "sock: -1 is no open socket"),
    (lambda server: server.listen(2**40), ValueError, "sock: 1099511627776 is no open socket"),
    (lambda server: server.listen("nonsense"), SettingError, "inet:host:port"),
    (lambda server: server.listen_and_serve(25), TypeError, "address: 25"),  # type: ignore[arg-type]
    (lambda server: server.listen_and_serve_unix(25), TypeError, "path: 25"),  # type: ignore[arg-type]
    (lambda server: server.listen_and_serve_unix(""), ValueError, "path: an empty path"),
    (lambda server: server.serve("inet:h:1"), TypeError, "sock: 'inet:h:1' .*expected a socket"),  # type: ignore[arg-type]
    (lambda server: server.shutdown("soon"), TypeError, "timeout: 'soon'"),  # type: ignore[arg-type]
    (lambda server: server.shutdown(-1), ValueError, "timeout: -1"),
    (lambda server: server.shutdown(float("nan")), ValueError, "timeout: nan"),
    (lambda server: Server({"port": 1}), TypeError, "config: a table .*expected a Config"),  # type: ignore[arg-type]
    (lambda server: Server("x"), TypeError, "config: 'x' .*expected a Config"),  # type: ignore[arg-type]
    (lambda server: SocketmapClient(25), TypeError, "endpoint: 25"),  # type: ignore[arg-type]
    (lambda server: SocketmapClient("inet:h:1").lookup("a b", ""), ValueError, "a map name has no space: 'a b'"),
    (lambda server: SocketmapClient("inet:h:1").lookup(5, ""), TypeError, "name: type int"),  # type: ignore[arg-type]
    (lambda server: serving("x").__enter__(), TypeError, "server: 'x' .*expected a Server"),  # type: ignore[arg-type]
    (lambda server: Config(lookup_timeout="1x"), SettingError, "lookup_timeout: '1x'"),
]


@pytest.mark.parametrize(("use", "error", "text"), WRONG, ids=[text for *_, text in WRONG])
def test_wrong_usage_is_an_error_at_the_call_that_says_what_is_accepted(
    server: Server, use: Callable[[Server], object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        use(server)


def test_a_function_that_can_be_called_with_a_key_is_accepted_whatever_it_is(server: Server) -> None:
    class Table:
        def __call__(self, key: str, limit: int = 3) -> str:
            return key

    functions: list[Callable[[str], str | None]] = [
        str,
        {"a": "b"}.get,
        Table(),
        Table().__call__,
        lambda *keys: keys[0],
    ]
    for number, function in enumerate(functions):
        server.register_map(f"map{number}", function)
    with serving(server) as client:
        assert client.lookup("map0", "a") == client.lookup("map2", "a") == client.lookup("map4", "a") == "a"
        assert client.lookup("map1", "a") == "b"


def test_a_socket_that_cannot_be_served_is_an_error_that_says_why(server: Server) -> None:
    with socket.socket() as unbound, pytest.raises(ValueError, match="not bound"):
        server.listen(unbound)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, pytest.raises(ValueError, match="SOCK_DGRAM"):
        server.listen(datagrams)
    one, other = socket.socketpair()
    with one, other, pytest.raises(ValueError, match=r"not bound|connected"):
        server.listen(one)
    reader, writer = os.pipe()
    with pytest.raises(ValueError, match=f"{reader} is no open socket"):
        server.listen(reader)
    os.close(reader)
    os.close(writer)


# Sockets of the program.


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("give", [lambda sock: sock, lambda sock: sock.fileno()], ids=["socket", "descriptor"])
def test_a_socket_that_the_program_has_bound_is_served(
    server: Server, bound: socket.socket, give: Callable[[socket.socket], Any], listens: bool
) -> None:
    if listens:
        bound.listen()
    server.listen(give(bound))
    for _ in range(2):
        with server.start() as running, Client(where(bound)) as client:
            assert running.endpoints == [where(bound)]
            assert client.ask(b"map key") == b"OK ok"
    assert bound.fileno() >= 0


def test_serve_serves_a_socket_until_it_is_stopped_and_forgets_it(
    server: Server, bound: socket.socket, in_thread: InThread
) -> None:
    thread = in_thread(lambda: server.serve(bound))
    answers(where(bound)).close()
    server.shutdown(DEADLINE)
    thread.join(DEADLINE)
    with pytest.raises(RuntimeError, match="no endpoint is named"):
        server.start()


def test_a_server_keeps_no_descriptor_of_what_it_has_served(server: Server, bound: socket.socket) -> None:
    def opened() -> int:
        return len([*Path("/proc/self/fd").iterdir()])

    server.listen(bound)
    with server.start():
        pass
    before = opened()
    with server.start():
        server.reload()
    assert opened() == before
    server.close()
    assert opened() == before - 1


def test_an_address_that_could_not_be_bound_is_forgotten(
    server: Server, in_thread: InThread, directory: Path
) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        for _ in range(2):
            with pytest.raises(ListenError, match=address):
                server.listen_and_serve(address)
        with pytest.raises(ListenError, match="no/such"):
            server.listen_and_serve_unix("/no/such/directory")
        thread = in_thread(lambda: server.listen_and_serve_unix(directory / "socket"))
        answers(f"unix:{directory}/socket").close()
        server.shutdown(DEADLINE)
        thread.join(DEADLINE)
    in_thread(lambda: server.listen_and_serve(address))
    answers(f"inet:{address}").close()


# Changes while it serves.


@pytest.fixture
def endpoint(server: Server, directory: Path) -> str:
    found = f"unix:{directory}/socket"
    server.listen(found)
    return found


def test_a_map_that_is_registered_while_the_server_serves_is_known_to_all_workers_at_once(
    server: Server, endpoint: str, in_thread: InThread, directory: Path
) -> None:
    in_thread()
    client = answers(endpoint)
    for number in range(3):
        server.register_map(f"new{number}", lambda key: "new")
        assert {client.ask(b"new%d key" % number) for _ in range(5)} == {b"OK new"}  # over the same connection
    server.register_default_map(lambda name, key: name)
    assert client.ask(b"other key") == b"OK other"
    server.listen(f"unix:{directory}/other")
    with Client(f"unix:{directory}/other") as other:
        assert other.ask(b"map key") == b"OK ok"
    assert client.is_open


def test_a_socket_that_is_added_while_the_server_serves_is_served(
    server: Server, endpoint: str, in_thread: InThread, bound: socket.socket
) -> None:
    in_thread()
    client = answers(endpoint)
    server.listen(bound)
    server.listen(bound.fileno())  # it is the same one
    with Client(where(bound)) as other:
        assert other.ask(b"map key") == b"OK ok"
        before = own_descriptors()
        server.reload()
        eventually(lambda: own_descriptors() <= before, DEADLINE, "no more descriptors than before")
        assert other.ask(b"map key") == b"OK ok"
    assert client.ask(b"map key") == b"OK ok"


def test_a_socket_that_cannot_listen_is_an_error_that_changes_nothing(
    server: Server, endpoint: str, in_thread: InThread
) -> None:
    in_thread()
    client = answers(endpoint)
    with socket.socket() as one, socket.socket() as other:
        for sock in (one, other):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", free_port()))
        other.bind(one.getsockname())
        one.listen()
        before = own_descriptors()
        with pytest.raises(StartError, match=f"cannot listen on {where(one)}: Address already in use"):
            server.listen(other)
        eventually(lambda: own_descriptors() <= before, DEADLINE, "no more descriptors than before")
    assert client.ask(b"map key") == b"OK ok"
    server.reload()


def test_a_change_with_which_no_worker_can_start_is_refused_and_undone(
    server: Server, endpoint: str, in_thread: InThread
) -> None:
    in_thread()
    client = answers(endpoint)

    def fail() -> None:
        raise LookupError("no such database")

    with pytest.raises(StartError, match="no such database"):
        server.on_worker_start(fail)
    with pytest.raises(StartError, match="cannot listen on unix:/no/such"):
        server.listen("unix:/no/such/directory")
    assert client.ask(b"map key") == b"OK ok"
    server.register_map("new", lambda key: "new")
    assert client.ask(b"new key") == b"OK new"


def test_changes_from_many_threads_all_take_effect(server: Server, endpoint: str, in_thread: InThread) -> None:
    in_thread()
    client = answers(endpoint)
    threads = [
        threading.Thread(target=server.register_map, args=(f"map{number}", lambda key: "new")) for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert [client.ask(b"map%d key" % number) for number in range(4)] == [b"OK new"] * 4


@pytest.mark.parametrize("how", ["start", "serve_forever"])
def test_reload_returns_when_new_workers_serve(
    server: Server, endpoint: str, in_thread: InThread, how: str, tmp_path: Path
) -> None:
    switch = tmp_path / "off"
    server.register_map("who", lambda key: str(os.getpid()))

    @server.on_worker_start
    def check() -> None:
        if switch.exists():
            raise OSError("switched off")

    server.start() if how == "start" else in_thread()
    client = answers(endpoint)
    before = client.ask(b"who key")
    for _ in range(2):
        server.reload()
        after = client.ask(b"who key")
        assert after != before
        before = after
    switch.touch()
    with pytest.raises(StartError, match="switched off"):
        server.reload()
    assert client.ask(b"map key") == b"OK ok"
    switch.unlink()
    server.reload()


def test_a_reload_of_a_server_that_does_not_serve_is_an_error(server: Server, endpoint: str) -> None:
    with pytest.raises(RuntimeError, match="does not serve"):
        server.reload()
    with server.start():
        pass
    with pytest.raises(RuntimeError, match="does not serve"):
        server.reload()


def test_what_another_process_cannot_be_told_is_an_error(server: Server, endpoint: str, bound: socket.socket) -> None:
    with server.start():
        for change in (
            lambda: server.register_map("new", say_ok),
            lambda: server.register_default_map(lambda name, key: None),
            lambda: server.on_worker_start(lambda: None),
            lambda: server.listen("inet:127.0.0.1:0"),
        ):
            with pytest.raises(RuntimeError, match=r"after start\(\) another process serves"):
                change()
        before = descriptors(os.getpid())
        with pytest.raises(RuntimeError, match=r"after start\(\) another process serves"):
            server.listen(bound)
        assert descriptors(os.getpid()) == before
    server.register_map("new", say_ok)


def test_a_worker_cannot_change_the_server(server: Server) -> None:
    def register(key: str) -> str:
        try:
            server.register_map(key, say_ok)
        except RuntimeError as error:
            return str(error)
        return "registered"

    server.register_map("registering", register)
    with serving(server) as client:
        assert "this is a worker" in str(client.lookup("registering", "new"))


def test_a_server_that_is_stopped_leaves_nobody_waiting_for_new_workers(
    server: Server, endpoint: str, in_thread: InThread
) -> None:
    gate = Gate()
    has_begun = False

    @server.on_worker_start
    def wait() -> None:
        if has_begun:
            gate.lookup("")

    in_thread()
    answers(endpoint).close()
    has_begun = True
    errors: list[Exception] = []

    def reload() -> None:
        try:
            server.reload()
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=reload)
    thread.start()
    gate.await_arrival()
    server.shutdown(DEADLINE)
    thread.join(DEADLINE)
    assert "stopped before it had new workers" in str(errors[0])


@pytest.mark.parametrize("how", ["start", "serve_forever"])
def test_reloads_that_are_asked_for_at_the_same_time_all_take_place(
    server: Server, endpoint: str, in_thread: InThread, how: str
) -> None:
    server.register_map("who", lambda key: str(os.getpid()))
    server.start() if how == "start" else in_thread()
    client = answers(endpoint)
    before = client.ask(b"who key")
    seen: list[bytes] = []

    def reload() -> None:
        server.reload()
        with Client(endpoint) as other:
            seen.append(other.ask(b"who key"))

    threads = [threading.Thread(target=reload) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(seen) == 3
    assert before not in seen
    assert client.ask(b"map key") == b"OK ok"


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], object]], list[Exception]]]:
    """Call a function when SIGUSR1 comes; return a list of the errors that it raises.

    To be named before the server, so that this one ends first: its workers send the signal, which would kill us.
    """
    previous = signal.getsignal(signal.SIGUSR1)

    def handle(function: Callable[[], object]) -> list[Exception]:
        errors: list[Exception] = []

        def call(_number: int, _frame: object) -> None:
            try:
                function()
            except Exception as error:  # noqa: BLE001
                errors.append(error)

        signal.signal(signal.SIGUSR1, call)
        return errors

    yield handle
    signal.signal(signal.SIGUSR1, previous)


@pytest.mark.parametrize("how", ["start", "serve_forever"])
@pytest.mark.parametrize(
    "change",
    [lambda server: server.reload(), lambda server: server.register_map("other", say_ok)],
    ids=["reload", "register_map"],
)
def test_a_signal_handler_cannot_wait_for_a_change_in_the_middle_of_another(
    on_signal: Callable[..., list[Exception]],
    server: Server,
    endpoint: str,
    in_thread: InThread,
    how: str,
    change: Callable[[Server], None],
    tmp_path: Path,
) -> None:
    program, switch = os.getpid(), tmp_path / "on"

    @server.on_worker_start
    def disturb() -> None:
        if switch.exists():
            kill(program, signal.SIGUSR1)

    server.start() if how == "start" else in_thread()
    client = answers(endpoint)
    errors = on_signal(lambda: change(server))
    switch.touch()
    server.reload()
    assert "waits for another change" in str(eventually(lambda: errors, DEADLINE)[0])
    assert client.ask(b"map key") == b"OK ok"


@pytest.mark.parametrize("how", ["start", "serve_forever"])
def test_a_signal_handler_stops_the_server_in_the_middle_of_a_reload(
    on_signal: Callable[..., list[Exception]],
    server: Server,
    endpoint: str,
    in_thread: InThread,
    how: str,
    tmp_path: Path,
) -> None:
    gate, program, switch = Gate(), os.getpid(), tmp_path / "on"

    @server.on_worker_start
    def disturb() -> None:
        if switch.exists():
            kill(program, signal.SIGUSR1)
            gate.lookup("")  # never

    server.start() if how == "start" else in_thread()
    answers(endpoint).close()
    errors = on_signal(lambda: server.shutdown(DEADLINE))
    switch.touch()
    with pytest.raises(RuntimeError, match="stopped before it had new workers"):
        server.reload()
    assert errors == []
    assert "not serving" in repr(server)


def test_a_signal_handler_of_the_thread_that_serves_cannot_wait_for_new_workers(
    server: Server, endpoint: str, fork: Fork
) -> None:
    gate = Gate()

    def change(_number: int, _frame: object) -> None:
        for call in (server.reload, lambda: server.register_map("new", say_ok)):
            with pytest.raises(RuntimeError, match="the thread that serves cannot wait"):
                call()
        gate.arrive()

    def serve() -> None:
        signal.signal(signal.SIGUSR1, change)
        server.serve_forever()

    process = fork(serve)
    client = answers(endpoint)
    kill(process.pid or 0, signal.SIGUSR1)
    gate.await_arrival()
    assert client.ask(b"map key") == b"OK ok"
    kill(process.pid or 0, signal.SIGTERM)
    assert exit_code(process) == 0


def test_what_is_registered_when_a_worker_starts_keeps_it_from_starting(server: Server, endpoint: str) -> None:
    server.on_worker_start(lambda: server.register_map("new", say_ok))
    with pytest.raises(StartError, match="this is a worker"):
        server.start()


@pytest.mark.parametrize("how", ["start", "serve_forever"])
def test_a_worker_can_neither_stop_nor_start_the_server(
    server: Server, endpoint: str, in_thread: InThread, how: str
) -> None:
    calls: dict[str, Callable[[], object]] = {
        "shutdown": server.shutdown,
        "close": server.close,
        "reload": server.reload,
        "start": server.start,
        "serve_forever": server.serve_forever,
        "listen": lambda: server.listen("inet:127.0.0.1:0"),
    }

    @server.map("call")
    def call(key: str) -> str:
        try:
            calls[key]()
        except RuntimeError as error:
            return str(error)
        return "done"

    server.start() if how == "start" else in_thread()
    client = answers(endpoint)
    for key in calls:
        assert client.ask(f"call {key}".encode()).startswith(b"OK this is a worker")


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 2**40, threading.TIMEOUT_MAX])
@pytest.mark.parametrize("how", ["start", "serve_forever"])
def test_a_timeout_may_be_as_long_as_one_likes(
    server: Server, endpoint: str, in_thread: InThread, how: str, timeout: float
) -> None:
    server.start() if how == "start" else in_thread()
    answers(endpoint).close()
    server.shutdown(timeout)
    assert "not serving" in repr(server)


def test_a_worker_starts_whatever_its_code_has_done_to_signals(server: Server) -> None:
    server.on_worker_start(lambda: signal.signal(signal.SIGUSR2, signal.SIG_DFL))
    with serving(server) as client:
        assert client.lookup("map", "key") == "ok"


# The end of workers.


def test_on_worker_stop_runs_in_each_worker_that_leaves_the_last_first(server: Server, tmp_path: Path) -> None:
    def note(word: str) -> None:
        with (tmp_path / str(os.getpid())).open("a") as file:
            file.write(f"{word} ")

    server.register_map("who", lambda key: str(os.getpid()))
    server.on_worker_stop(lambda: note("first"))

    @server.on_worker_stop
    def fail() -> None:
        raise SystemExit("its error is in the log, and no reason to stop there")

    server.on_worker_stop(lambda: note("last"))
    with serving(server) as client:
        one = client.lookup("who", "")
        server.reload()
        await_end(int(str(one)))
        other = client.lookup("who", "")
    assert [(tmp_path / str(pid)).read_text() for pid in (one, other)] == ["last first "] * 2


# Coroutines.


def test_maps_may_be_coroutine_functions() -> None:
    server = Server()

    @server.map("map")
    async def answer(key: str) -> Reply:
        await asyncio.sleep(0)
        return Reply.ok(f"value of {key}")

    @server.default_map
    async def anything(name: str, key: str) -> str | None:
        await asyncio.sleep(0)
        return name if key else None

    with serving(server) as client:
        assert client.lookup("map", "key") == "value of key"
        assert client.lookup("other", "key") == "other"
        assert client.lookup("other", "") is None


def test_a_worker_has_one_loop_from_its_start_to_its_end(tmp_path: Path) -> None:
    server = Server(Config(min_spare=1, process_limit=1))
    loops: list[object] = []
    background: list[asyncio.Task[None]] = []

    @server.on_worker_start
    async def start() -> None:
        loops.append(asyncio.get_running_loop())
        background.append(asyncio.create_task(asyncio.sleep(1000)))

    @server.map("map")
    async def same(key: str) -> str:
        return str(loops == [asyncio.get_running_loop()] and not background[0].done())

    @server.on_worker_stop
    async def stop() -> None:
        (tmp_path / "stopped").write_text(str(loops == [asyncio.get_running_loop()]))

    with serving(server) as client:
        assert client.lookup("map", "key") == "True"
    assert (tmp_path / "stopped").read_text() == "True"


def test_lookup_timeout_cancels_the_task_and_frees_the_loop(tmp_path: Path) -> None:
    server = Server(Config(min_spare=1, process_limit=1, lookup_timeout=1))
    cancelled: list[str] = []
    server.register_map("who", lambda key: f"{os.getpid()} {cancelled}")

    @server.map("slow")
    async def slow(key: str) -> str:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.append(key)
            raise
        return "done"

    with serving(server) as client:
        before = client.lookup("who", "")
        for key in ("a", "b"):
            with pytest.raises(LookupTimeout):
                client.lookup("slow", key)
        assert client.lookup("who", "") == str(before).replace("[]", "['a', 'b']")  # the same worker


def test_a_coroutine_that_blocks_its_loop_is_interrupted() -> None:
    server = Server(Config(min_spare=1, process_limit=1, lookup_timeout=1))

    @server.map("spin")
    async def spin(key: str) -> str:
        while True:
            pass

    @server.map("quick")
    async def quick(key: str) -> str:
        return str(os.getpid())

    with serving(server) as client:
        before = client.lookup("quick", "")
        with pytest.raises(LookupTimeout):
            client.lookup("spin", "")
        assert client.lookup("quick", "") == before


@pytest.mark.parametrize("how", ["swallow", "thread", "generator"])
def test_what_goes_on_though_its_time_is_over_holds_up_neither_lookups_nor_the_end(how: str) -> None:
    server = Server(Config(min_spare=1, process_limit=1, lookup_timeout=1, stop_timeout=0))  # nobody is killed then
    server.register_map("map", say_ok)

    async def swallow() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)

    async def generator() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await swallow()

    @server.map("stuck")
    async def stuck(key: str) -> str:
        if how == "swallow":
            await swallow()
        elif how == "thread":
            await asyncio.to_thread(threading.Event().wait)
        else:
            async for _ in generator():
                await swallow()
        return "unstuck"

    with serving(server) as client:
        with pytest.raises(LookupTimeout):
            client.lookup("stuck", "")
        assert client.lookup("map", "") == "ok"
        try:
            server.shutdown(DEADLINE)
        finally:
            server.close()


def test_a_coroutine_that_answers_when_it_is_cancelled_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    # It is cancelled long before the watchdog would interrupt it on a machine that is slow.
    monkeypatch.setattr(asynchronous, "_PART", 0.5)
    monkeypatch.setattr(asynchronous, "_MOST", 10)
    server = Server(Config(lookup_timeout=4))

    @server.map("late")
    async def late(key: str) -> str:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            return "late"
        return "never"

    with serving(server) as client:
        assert client.lookup("late", "") == "late"


def test_a_coroutine_that_fails_is_a_lookup_that_fails() -> None:
    server = Server()

    @server.map("fails")
    async def fails(key: str) -> str:
        raise LookupError(key)

    @server.map("cancelled")
    async def cancelled(key: str) -> str:
        raise asyncio.CancelledError

    with serving(server) as client:
        for name in ("fails", "cancelled"):
            with pytest.raises(TempFail, match="lookup failed"):
                client.lookup(name, "")


def test_a_coroutine_of_on_worker_start_that_fails_keeps_the_server_from_starting(server: Server) -> None:
    @server.on_worker_start
    async def connect() -> None:
        raise LookupError("no such database")

    with pytest.raises(StartError, match="no such database"), serving(server):
        pass


# The helper for tests.


def test_a_server_is_served_on_a_free_port_for_a_test(
    server: Server, serve_socketmap: Callable[[Server], SocketmapClient]
) -> None:
    server.listen("unix:/no/such/directory/socket")  # what it does otherwise
    client = serve_socketmap(server)
    assert client.lookup("map", "key") == "ok"
    assert client.endpoint.kind == "inet"


def test_nothing_of_a_server_is_left_after_a_test(server: Server) -> None:
    before = children(os.getpid())  # of other tests, in a run of all
    with serving(server):
        [master] = set(children(os.getpid())) - {*before}
        workers = children(master)
        assert workers
    await_end(master, *workers)


# What it tells of itself.


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert prefork_socketmap.__version__ == project["version"]


def test_public_objects_say_what_they_are(server: Server) -> None:
    server.listen("inet:127.0.0.1:0")
    assert repr(server) == "<Server: maps ['map'], endpoints ['inet:127.0.0.1:0'], not serving>"
    with server.start() as running:
        assert repr(running) == f"<RunningServer: pid {running.pid}, endpoints {running.endpoints}>"
        assert "endpoints ['inet:127.0.0.1:0'], serving>" in repr(server)
    assert repr(running) == "<RunningServer: stopped>"
    server.close()
    assert repr(server).endswith("closed>")
    with SocketmapClient("inet:127.0.0.1:1") as client:
        assert repr(client) == "<SocketmapClient: inet:127.0.0.1:1, not connected>"
    decoder = Decoder(10)
    decoder.feed(b"3:a")
    assert repr(decoder) == "<Decoder: 3 bytes pending>"


def test_help_shows_what_every_field_of_the_config_means() -> None:
    shown = io.StringIO()
    pydoc.Helper(output=shown)(Config)
    text = " ".join(pydoc.plain(shown.getvalue()).replace("|", " ").split())
    for name in inspect.signature(Config).parameters:
        assert f"{name} (default {getattr(Config(), name)}): " in text
    assert "lookup_timeout (default 30.0): How long one lookup may take; then it is interrupted" in text


def test_a_death_of_a_worker_costs_the_master_no_descriptor(server: Server, endpoint: str) -> None:
    with server.start() as running:

        def opened() -> int:
            return len([*Path(f"/proc/{running.pid}/fd").iterdir()])

        [worker] = eventually(lambda: children(running.pid), DEADLINE)
        before = opened()
        for _ in range(3):
            kill(worker)
            await_end(worker)
            answers(endpoint).close()
            [worker] = eventually(lambda: children(running.pid), DEADLINE)
        eventually(lambda: opened() <= before, DEADLINE, "no descriptor more than before")


def test_a_decorator_leaves_the_type_of_what_it_decorates(server: Server) -> None:
    """mypy, which checks this file, knows the types of these only if the decorators keep them."""

    @server.on_worker_start
    def start(number: int = 1) -> int:
        return number

    @server.on_worker_stop
    def stop(word: str = "x") -> str:
        return word

    number: int = start(2)
    word: str = stop("y")
    assert (number, word) == (2, "y")
    assert Config(lookup_timeout="1m").lookup_timeout + 1 == 61
    assert Endpoint.parse("unix:/path").path == "/path"
