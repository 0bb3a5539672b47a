"""The client, against a server that follows a script, byte for byte."""

from __future__ import annotations

import contextlib
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefork_socketmap.client import LookupFailed, LookupTimeout, PermFail, SocketmapClient, TempFail
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap import netstring
from tests.integration.servers.process import free_port

# What the server does with one connection; the connection is closed when it returns.
Script = Callable[["Peer"], None]


class Peer:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket, requests: list[bytes]) -> None:
        self.sock = sock
        self._requests = requests
        self._decoder = netstring.Decoder(1_000_000)

    def read_request(self) -> bool:
        """Read one request; return False when the client has hung up."""
        while (payload := self._decoder.next()) is None:
            received = self._receive()
            if not received:
                return False
            self._decoder.feed(received)
        self._requests.append(payload)
        return True

    def _receive(self) -> bytes:
        try:
            return self.sock.recv(65536)
        except ConnectionResetError:
            return b""  # it hung up without having read everything


class ScriptedServer:
    """Plays one script per connection, in order; then it accepts no more. ``requests`` are what it was asked."""

    def __init__(self, listener: socket.socket, scripts: tuple[Script, ...]) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._listener = listener
        self._scripts = scripts
        self._thread = threading.Thread(target=self._play)
        self._thread.start()

    def _play(self) -> None:
        for script in self._scripts:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # the test is over
            self.connections += 1
            with sock:
                sock.settimeout(30)
                script(Peer(sock, self.requests))
        self._listener.close()

    def finish(self) -> None:
        # Closing alone would not wake a thread that waits in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


def answers(*replies: bytes) -> Script:
    """Read a request for each of *replies* and send it, as it is; then wait for the client to hang up."""

    def play(peer: Peer) -> None:
        for reply in replies:
            assert peer.read_request()
            peer.sock.sendall(reply)
        peer.read_request()

    return play


def hangs_up(peer: Peer) -> None:
    peer.read_request()


def resets(peer: Peer) -> None:
    peer.read_request()
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))


def hangs_up_in_mid_reply(peer: Peer) -> None:
    peer.read_request()
    peer.sock.sendall(b"8:OK va")


def stays_silent(peer: Peer) -> None:
    peer.read_request()
    peer.read_request()


Serve = Callable[..., tuple[ScriptedServer, SocketmapClient]]


@pytest.fixture(params=["inet", "inet6", "unix"])
def endpoint(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, Endpoint]]:
    """A listening socket, and the endpoint that a client asks."""
    # tmp_path can be longer than a Unix socket's address may be.
    with tempfile.TemporaryDirectory() as directory:
        if request.param == "unix":
            path = str(Path(directory) / "socket")
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            found = Endpoint("unix", path=path)
        else:
            family, host = (socket.AF_INET6, "::1") if request.param == "inet6" else (socket.AF_INET, "127.0.0.1")
            listener = socket.socket(family)
            try:
                listener.bind((host, free_port()))
            except OSError:
                listener.close()
                pytest.skip("this machine has no IPv6 loopback")
            found = Endpoint("inet", host=host, port=listener.getsockname()[1])
        with listener:
            listener.listen()
            yield listener, found


@pytest.fixture
def serve(endpoint: tuple[socket.socket, Endpoint]) -> Iterator[Serve]:
    """Start a scripted server; return it and a client that asks it."""
    with contextlib.ExitStack() as stack:

        def start(
            *scripts: Script, timeout: float = 30, max_reply_size: int = 100000
        ) -> tuple[ScriptedServer, SocketmapClient]:
            listener, found = endpoint
            server = ScriptedServer(listener, scripts)
            stack.callback(server.finish)
            client = SocketmapClient(found, timeout=timeout, max_reply_size=max_reply_size)
            stack.callback(client.close)
            return server, client

        yield start


def test_every_status_has_its_outcome(serve: Serve) -> None:
    server, client = serve(
        answers(
            b"8:OK value,", b"9:NOTFOUND ,", b"13:TEMP database,", b"9:PERM typo,", b"12:TIMEOUT slow,", b"5:OK 2 ,"
        )
    )

    assert client.lookup("virtual", "key") == "value"
    assert client.lookup("virtual", "unknown") is None
    with pytest.raises(TempFail, match=r"^database$"):
        client.lookup("virtual", "a")
    with pytest.raises(PermFail, match=r"^typo$"):
        client.lookup("virtual", "b")
    with pytest.raises(LookupTimeout, match=r"^slow$"):
        client.lookup("virtual", "c")
    assert client.lookup("virtual", "d") == "2 "
    assert server.connections == 1


def test_every_failure_is_a_lookup_failure(serve: Serve) -> None:
    _, client = serve(answers(b"6:TEMP x,"))

    with pytest.raises(LookupFailed):
        client.lookup("virtual", "key")


def test_the_request_holds_name_and_key_byte_for_byte(serve: Serve) -> None:
    server, client = serve(answers(*[b"9:NOTFOUND ,"] * 3))

    for key in ("", "two words", "\udcff@ümlaut"):
        client.lookup("virtual", key)

    assert server.requests == [b"virtual ", b"virtual two words", b"virtual \xff@\xc3\xbcmlaut"]


def test_a_value_may_be_any_bytes(serve: Serve) -> None:
    _, client = serve(answers(b"7:OK \xff\xc3\xbc\n,"))

    assert client.lookup("virtual", "key") == "\udcffü\n"


def test_a_map_name_with_a_space_is_refused(serve: Serve) -> None:
    server, client = serve()

    with pytest.raises(ValueError, match="no space"):
        client.lookup("two words", "key")
    assert server.connections == 0


@pytest.mark.parametrize("end", [hangs_up, resets, hangs_up_in_mid_reply])
def test_a_server_that_hangs_up_is_asked_once_more(serve: Serve, end: Script) -> None:
    server, client = serve(end, answers(b"8:OK value,"))

    assert client.lookup("virtual", "key") == "value"
    assert server.requests == [b"virtual key"] * 2


def test_a_connection_that_was_closed_while_idle_is_opened_anew(serve: Serve) -> None:
    closing = threading.Event()

    def closes_after_the_reply(peer: Peer) -> None:
        peer.read_request()
        peer.sock.sendall(b"8:OK value,")
        closing.set()

    server, client = serve(closes_after_the_reply, answers(b"8:OK again,"))

    assert client.lookup("virtual", "key") == "value"
    assert closing.wait(10)
    assert client.lookup("virtual", "key") == "again"
    assert server.connections == 2


def test_a_server_that_hangs_up_twice_is_not_asked_a_third_time(serve: Serve) -> None:
    server, client = serve(hangs_up, hangs_up, answers(b"8:OK value,"))

    with pytest.raises(TempFail, match="hung up twice"):
        client.lookup("virtual", "key")
    assert server.connections == 2
    assert client.lookup("virtual", "key") == "value"


def test_a_refused_connection_is_a_temporary_failure_that_names_the_endpoint(
    endpoint: tuple[socket.socket, Endpoint],
) -> None:
    listener, found = endpoint
    listener.close()

    with SocketmapClient(found) as client, pytest.raises(TempFail) as failure:
        client.lookup("virtual", "key")
    assert str(failure.value) == f"{found}: Connection refused"


def test_an_unknown_host_is_a_temporary_failure() -> None:
    with SocketmapClient("inet:host.invalid:1") as client, pytest.raises(TempFail, match=r"^inet:host.invalid:1: "):
        client.lookup("virtual", "key")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"hello\n", "not a length"),
        (b"08:OK value,", "not a length"),
        (b"8:OK value;", "comma"),
        (b"0:,", "not a valid Status"),
        (b"8:ok value,", "not a valid Status"),
        (b"100001:", "100000 are accepted"),
        (b"1000000:", "6 digits"),
        (b"8:OK value,\r\n", "bytes after the reply"),
    ],
)
def test_a_protocol_error_fails_one_lookup_and_ends_the_connection(serve: Serve, reply: bytes, reason: str) -> None:
    server, client = serve(answers(reply), answers(b"8:OK value,"))

    with pytest.raises(TempFail, match=f"protocol error: .*{reason}"):
        client.lookup("virtual", "first")
    assert client.lookup("virtual", "second") == "value"
    assert server.requests == [b"virtual first", b"virtual second"]


def test_bytes_that_come_after_the_reply_never_answer_the_next_request(serve: Serve) -> None:
    asked, spoken = threading.Event(), threading.Event()

    def speaks_again(peer: Peer) -> None:
        peer.read_request()
        peer.sock.sendall(b"8:OK value,")
        asked.wait(30)
        peer.sock.sendall(b"8:OK wrong,")
        spoken.set()
        peer.read_request()

    _, client = serve(speaks_again, answers(b"8:OK right,"))

    assert client.lookup("virtual", "first") == "value"
    asked.set()
    assert spoken.wait(30)
    with pytest.raises(TempFail, match="bytes that answer no request"):
        client.lookup("virtual", "second")
    assert client.lookup("virtual", "third") == "right"


def test_a_reply_of_exactly_the_limit_is_accepted(serve: Serve) -> None:
    value = b"x" * 99_997
    _, client = serve(answers(b"100000:OK " + value + b","))

    assert client.lookup("virtual", "key") == value.decode()


def test_the_limit_of_a_reply_can_be_set(serve: Serve) -> None:
    _, client = serve(answers(b"11:OK 12345678,"), max_reply_size=10)

    with pytest.raises(TempFail, match="at most 10 are accepted"):
        client.lookup("virtual", "key")


def test_a_server_that_stays_silent_is_a_timeout_and_its_late_answer_is_not_awaited(serve: Serve) -> None:
    server, client = serve(stays_silent, answers(b"8:OK value,"), timeout=0.2)

    with pytest.raises(LookupTimeout, match=r"no reply within 0\.2 s"):
        client.lookup("virtual", "first")
    assert client.lookup("virtual", "second") == "value"
    assert server.requests == [b"virtual first", b"virtual second"]


def test_a_client_can_be_used_again_after_it_was_closed(serve: Serve) -> None:
    server, client = serve(answers(b"8:OK value,"), answers(b"8:OK again,"))

    with client:
        assert client.lookup("virtual", "key") == "value"
    assert client.lookup("virtual", "key") == "again"
    assert server.connections == 2


def test_an_endpoint_is_written_as_in_main_cf(serve: Serve, endpoint: tuple[socket.socket, Endpoint]) -> None:
    _, _ = serve(answers(b"8:OK value,"))

    with SocketmapClient(str(endpoint[1])) as client:
        assert client.lookup("virtual", "key") == "value"


@pytest.mark.parametrize("wrong", [{"timeout": -1}, {"max_reply_size": 0}])
def test_a_wrong_setting_is_an_error_that_names_it(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        SocketmapClient("inet:127.0.0.1:1", **wrong)


def test_the_defaults_are_those_of_postfix() -> None:
    client = SocketmapClient("inet:127.0.0.1:1")

    assert (client._timeout, client._max_reply_size) == (100.0, 100_000)
