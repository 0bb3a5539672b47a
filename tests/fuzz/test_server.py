"""A live server and clients that send anything, in any way: a good client beside them gets right answers throughout.

What the others get is held to be right, too: netstrings, each with a status word, in the order of what they asked.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefork_socketmap import Config
from prefork_socketmap.prefork.counters import SERVER_COUNTERS
from prefork_socketmap.socketmap import netstring
from tests.crowd import GoodClient, echo
from tests.fuzz import repeat, unlimited
from tests.processes import is_alive
from tests.serving import DEADLINE, Client, Serve, Site
from tests.waiting import eventually

_RESET = struct.pack("@ii", 1, 0)
_REPLY = re.compile(rb"(OK .*|NOTFOUND .*|NOTFOUND|TEMP .*|PERM .*|TIMEOUT .*)", re.DOTALL)


@dataclass(frozen=True)
class Behaviour:
    """What one client does: what it sends, in which pieces, and how it leaves."""

    pieces: list[bytes]
    ending: str
    reads: bool


keys = st.text(max_size=40) | st.sampled_from(["", " ", "\0", "a" * 5000, "." * 300])
requests = st.builds(
    lambda name, key: netstring.encode(f"{name} {key}".encode("utf-8", "replace")),
    st.sampled_from(["echo", "none", "fails", "ECHO", ""]),
    keys,
)
raw = st.binary(max_size=60)
lies = st.builds(lambda length, rest: b"%d:" % length + rest, st.sampled_from([0, 3, 10**5, 10**9, 10**30]), raw)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A request of which a byte or two are changed, lost, or more."""
    stream = bytearray(draw(requests))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(stream)))
        stream[place : place + draw(st.integers(0, 1))] = draw(st.binary(max_size=2))
    return bytes(stream)


@st.composite
def behaviours(draw: st.DrawFn) -> Behaviour:
    stream = b"".join(draw(st.lists(requests | requests | requests | mutated() | raw | lies, max_size=12)))
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    if draw(st.integers(0, 9)) == 0:  # dripped
        cuts = list(range(min(len(stream), 50)))
    places = [0, *cuts, len(stream)]
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(places) if begin < end]
    return Behaviour(pieces, draw(st.sampled_from(["close", "reset", "half close", "stay"])), draw(st.booleans()))


def fails(key: str) -> str:
    raise RuntimeError(key)


@pytest.fixture
def site(serve: Serve, endpoint: str) -> Iterator[Site]:
    site = serve({"echo": echo, "fails": fails}, Config(process_limit=6, min_spare=2, read_timeout=2), endpoint)
    yield site
    # What pytest shows of a test that failed.
    print({f"{each.group} {each.name}": site.counted(each.group, each.name) for each in SERVER_COUNTERS})


def behave(client: Client, behaviour: Behaviour) -> None:
    """Do all that *behaviour* says but leave. The server may have ended the connection at any point."""
    for piece in behaviour.pieces:
        with contextlib.suppress(ConnectionError):
            client.send(piece)
        if behaviour.reads:
            throw_away(client)
    if behaviour.ending == "half close":
        with contextlib.suppress(OSError):
            client.sock.shutdown(socket.SHUT_WR)


def throw_away(client: Client) -> None:
    """Read what has arrived."""
    with contextlib.suppress(ConnectionError):
        if select.select([client.sock], [], [], 0)[0]:
            client.sock.recv(65536)


def leave(client: Client, behaviour: Behaviour) -> None:
    if behaviour.ending == "reset":
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    client.close()


@unlimited
def test_a_good_client_is_answered_beside_clients_that_do_anything(site: Site) -> None:
    good = GoodClient(site)
    workers = set(site.await_workers(2))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(behaviours(), min_size=1, max_size=8))
    def check(crowd: list[Behaviour]) -> None:
        clients = [(Client(site.endpoint), behaviour) for behaviour in crowd]
        for client, behaviour in clients:
            behave(client, behaviour)
            good.ask()
        good.ask_anew()
        for client, behaviour in clients:
            leave(client, behaviour)
        good.ask()

    repeat(check)
    assert is_alive(site.pid)
    assert workers <= set(site.workers), "a worker has died of what a client sent"
    assert site.counted("workers", "died") == 0
    eventually(lambda: all(not row.held for row in site.rows()), DEADLINE, "nobody is held by clients that are gone")


@unlimited
def test_what_anybody_gets_are_replies_in_the_order_of_the_requests(site: Site) -> None:
    """However the stream is cut; then the end: in order after a refusal, or when the client has said that it ends."""
    good = GoodClient(site)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(keys.filter(str.strip), max_size=20), st.lists(st.integers(0, 10_000), max_size=10), raw)
    def check(asked: list[str], cuts: list[int], rubbish: bytes) -> None:
        texts = [re.sub(r"[\0-\x1f\x7f-\x9f\s]", "x", key).encode("utf-8", "replace") for key in asked]
        stream = b"".join(netstring.encode(b"echo " + text) for text in texts) + b"x" + rubbish
        with Client(site.endpoint) as client:
            places = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
            for begin, end in itertools.pairwise(places):
                with contextlib.suppress(ConnectionError):
                    client.send(stream[begin:end])
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_WR)
            received = [client.reply() for _ in texts]
            assert received == [b"OK " + text for text in texts]
            last = client.reply()
            assert last.startswith(b"PERM "), last
            assert client.sock.recv(1000) == b""
        good.ask()

    repeat(check)
