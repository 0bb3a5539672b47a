"""Messages from workers to the master: what is none by the letter is told with its sender, and costs nobody else."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from prefork_socketmap.prefork.channel import (
    BadMessageError,
    Given,
    Inbox,
    Kind,
    Sender,
    answer,
    make_inbox,
    read_answer,
)
from tests.processes import descriptors

Way = tuple[Inbox, Sender]
HEADER = struct.Struct("=BQQ")


@pytest.fixture
def way() -> Iterator[Way]:
    inbox, sender = make_inbox()
    yield inbox, sender
    inbox.close()
    sender.close()


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def in_child(action: Callable[[], object]) -> int:
    """Run *action* in another process, which has ended then; return its process id."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    return pid


# Messages.


def test_a_message_arrives_as_it_was_sent_and_the_kernel_says_by_whom(way: Way) -> None:
    inbox, sender = way
    text = "the database is away: \u00e9"
    pid = in_child(lambda: sender.send(Kind.FAILED, number=1, serial=(1 << 64) - 1, text=text))
    message = inbox.receive()
    assert message
    assert (message.kind, message.pid, message.number, message.serial) == (Kind.FAILED, pid, 1, (1 << 64) - 1)
    assert (message.text, list(message.enclosed)) == (text, [])
    assert inbox.receive() is None


@pytest.mark.parametrize("kind", [Kind.KEEP, Kind.OFFER])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_a_connection_arrives_with_its_family_and_belongs_to_the_receiver(
    way: Way, kind: Kind, family: socket.AddressFamily
) -> None:
    inbox, sender = way
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        before = descriptors(os.getpid())
        sender.send(kind, 5000, 7, enclosed=(connection,))
        message = inbox.receive()
        assert message
        (fd,) = message.enclosed
        assert (message.kind, message.number, message.serial, message.family) == (kind, 5000, 7, family)
        assert os.path.sameopenfile(fd, connection.fileno())
        assert not os.get_inheritable(fd)
        os.close(fd)
        assert descriptors(os.getpid()) == before


def test_a_text_that_is_too_long_is_cut_and_still_a_message(way: Way) -> None:
    inbox, sender = way
    sender.send(Kind.FAILED, text="\u00e9" * 100_000)
    message = inbox.receive()
    assert message
    assert 1000 < len(message.text) < 100_000
    assert set(message.text) <= {"\u00e9", "\ufffd"}


def test_messages_keep_their_order_and_boundaries(way: Way) -> None:
    inbox, sender = way
    for number in range(20):
        sender.send(Kind.GONE, number, number + 1)
    received = [inbox.receive() for _ in range(20)]
    assert [(each.number, each.serial) for each in received if each] == [(n, n + 1) for n in range(20)]


def test_a_sender_never_waits_for_a_master_that_does_not_read(way: Way) -> None:
    _, sender = way

    def send_on_and_on() -> None:
        while True:
            sender.send(Kind.GONE, 1, 1)

    with pytest.raises(BlockingIOError):
        send_on_and_on()


# What is no message.


def a_pipe() -> list[int]:
    reader, writer = os.pipe()
    os.close(writer)
    return [reader]


def stream_sockets(number: int) -> list[int]:
    return [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach() for _ in range(number)]


def a_socket(family: socket.AddressFamily, kind: socket.SocketKind) -> list[int]:
    return [socket.socket(family, kind).detach()]


def message(kind: int, text: bytes = b"") -> bytes:
    return HEADER.pack(kind, 1, 1) + text


@pytest.mark.parametrize(
    ("data", "enclose", "problem"),
    [
        (b"", list, "a packet of 0 bytes with 0 descriptors"),
        (b"x", list, "a packet of 1 bytes with 0 descriptors"),
        (message(Kind.GONE)[:-1], list, "a packet of 16 bytes with 0 descriptors"),
        (b"", lambda: stream_sockets(1), "a packet of 0 bytes with 1 descriptors"),
        (message(Kind.FAILED, b"x" * 10_000), list, "a packet of 4017 bytes"),
        (message(Kind.KEEP, b"x" * 10_000), lambda: stream_sockets(1), "a packet of 4017 bytes with 1 descriptors"),
        (message(0), list, "a message of the unknown kind 0"),
        (message(255), lambda: stream_sockets(1), "a message of the unknown kind 255"),
        (message(Kind.READY), lambda: stream_sockets(1), "READY with 1 descriptors"),
        (message(Kind.GONE), lambda: stream_sockets(1), "GONE with 1 descriptors"),
        (message(Kind.KEEP), list, "KEEP with 0 descriptors"),
        (message(Kind.OFFER), list, "OFFER with 0 descriptors"),
        (message(Kind.FETCH), list, "FETCH with 0 descriptors"),
        (message(Kind.KEEP), lambda: stream_sockets(2), "KEEP with 2 descriptors"),
        (message(Kind.KEEP), lambda: stream_sockets(253), "a packet of 17 bytes with 2 descriptors"),
        (message(Kind.KEEP), a_pipe, "a connection that is no socket"),
        (message(Kind.OFFER), a_pipe, "a connection that is no socket"),
        (message(Kind.KEEP), lambda: a_socket(socket.AF_INET, socket.SOCK_DGRAM), "a connection of family 2, type 2"),
        (
            message(Kind.KEEP),
            lambda: a_socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
            "a connection of family 1, type 5",
        ),
        (
            message(Kind.OFFER),
            lambda: a_socket(socket.AF_NETLINK, socket.SOCK_RAW),
            "a connection of family 16, type 3",
        ),
    ],
)
def test_what_is_no_message_is_told_with_its_sender_and_leaves_no_descriptor(
    data: bytes, enclose: Callable[[], list[int]], problem: str
) -> None:
    receiver, raw = pair()
    inbox = Inbox(receiver)
    before = descriptors(os.getpid())
    pid = in_child(lambda: socket.send_fds(raw, [data], enclose()))
    with pytest.raises(BadMessageError, match=problem) as caught:
        inbox.receive()
    assert caught.value.pid == pid
    assert descriptors(os.getpid()) == before
    Sender(raw).send(Kind.READY)  # and who sends messages is heard
    following = inbox.receive()
    assert following
    assert (following.kind, following.pid) == (Kind.READY, os.getpid())
    inbox.close()
    raw.close()


# Answers.


class Connections:
    """Sockets, as the master has them."""

    def __init__(self, number: int) -> None:
        families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
        self._socks = [socket.socket(families[n % 3], socket.SOCK_STREAM) for n in range(number)]
        self.given = [Given(5000 + n, 2 * n, n + 1, sock.family, sock.fileno()) for n, sock in enumerate(self._socks)]

    def close(self) -> None:
        for sock in self._socks:
            sock.close()


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, int]]:
    """The end of who asks, and the descriptor of the end that ``answer`` closes."""
    asking, enclosed = pair()
    yield asking, enclosed.detach()
    asking.close()


Channel = tuple[socket.socket, int]


@pytest.mark.parametrize("number", [0, 1, 100, 101, 250])
def test_an_answer_gives_all_connections_in_batches_and_then_ends(channel: Channel, number: int) -> None:
    asking, fd = channel
    connections = Connections(number)
    assert answer(fd, connections.given)
    received: list[Given] = []
    while batch := read_answer(asking):
        received += batch
    assert [each[:4] for each in received] == [each[:4] for each in connections.given]
    for duplicate, original in zip(received, connections.given, strict=True):
        assert os.path.sameopenfile(duplicate.fd, original.fd)
        assert not os.get_inheritable(duplicate.fd)
        os.close(duplicate.fd)
    connections.close()


def test_an_answer_never_waits_for_a_worker_that_does_not_read(channel: Channel) -> None:
    _, fd = channel
    connections = Connections(1)
    assert not answer(fd, connections.given * 200_000)
    assert not is_open(fd)
    connections.close()


def test_an_answer_to_a_worker_that_has_gone_is_no_error(channel: Channel) -> None:
    asking, fd = channel
    asking.close()
    connections = Connections(1)
    assert not answer(fd, connections.given)
    assert not is_open(fd)
    connections.close()


@pytest.mark.parametrize("enclose", [a_pipe, lambda: a_socket(socket.AF_INET, socket.SOCK_STREAM)])
def test_a_channel_that_is_none_gets_no_answer(enclose: Callable[[], list[int]]) -> None:
    """What a worker encloses may be anything."""
    (fd,) = enclose()
    connections = Connections(1)
    assert not answer(fd, connections.given)
    assert not is_open(fd)
    connections.close()


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
