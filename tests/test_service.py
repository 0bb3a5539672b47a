"""Every reply and every timeout, over real sockets: what a client gets for what it sends and what a lookup does."""

from __future__ import annotations

import array
import contextlib
import fcntl
import logging
import socket
import termios
import time
from pathlib import Path

import pytest

from prefork_socketmap import Config, Reply, Status
from prefork_socketmap.service import Answer
from prefork_socketmap.socketmap import netstring
from tests.serving import DEADLINE, Client, End, Serve, Site, abrupt
from tests.waiting import eventually

OK, TIMED_OUT = b"OK ok", b"TIMEOUT lookup timed out"
BLANK = " \t\r\n"
FITS = "x" * (100_000 - len("OK "))


def table(key: str) -> Answer:
    """Answer as the key says."""
    answers: dict[str, Answer] = {
        "ok": "ok",
        "reply": Reply.ok("some value"),
        "blanks around": "  two  ",
        "newline": "one\ntwo",
        "none": None,
        "not found": Reply.not_found(),
        "temp": Reply.temp_fail("try later"),
        "perm": Reply.perm_fail("broken"),
        "timeout": Reply.timeout("slow"),
        "no reason": Reply.temp_fail(""),
        "empty": "",
        "blank": BLANK,
        "nul": "before\0after",
        "an exception as reason": Reply(Status.TEMP, ValueError("text")),  # type: ignore[arg-type]
        "a word as status": Reply("OK", "value"),  # type: ignore[arg-type]
        "nul in a reason": Reply.temp_fail("before\0after"),
        "not encodable": "\ud800",
        "number": 5,  # type: ignore[dict-item]
        "bytes": b"ok",  # type: ignore[dict-item]
        "fits": FITS,
        "too large": FITS + "x",
        "reason too large": Reply.perm_fail("x" * 100_000),
        # Two bytes each: the limit is for bytes.
        "too large in bytes": "\u00e9" * 60_000,
    }
    return answers[key]


def fail(key: str) -> Answer:
    """Raise what the key names."""
    failures: dict[str, BaseException] = {
        "ValueError": ValueError("the secret of the database"),
        "TimeoutError": TimeoutError("slow"),
        "MemoryError": MemoryError(),
        "SystemExit": SystemExit(0),
        "KeyboardInterrupt": KeyboardInterrupt(),
        "GeneratorExit": GeneratorExit(),
    }
    raise failures[key]


def echo(key: str) -> Answer:
    return f"<{key}>"


@pytest.fixture
def site(serve: Serve, endpoint: str) -> Site:
    return serve({"table": table, "fail": fail, "echo": echo}, endpoint=endpoint)


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (b"table ok", OK),
        (b"table reply", b"OK some value"),
        (b"table blanks around", b"OK   two  "),
        (b"table newline", b"OK one\ntwo"),
        (b"table none", b"NOTFOUND "),
        (b"table not found", b"NOTFOUND "),
        (b"table temp", b"TEMP try later"),
        (b"table perm", b"PERM broken"),
        (b"table timeout", b"TIMEOUT slow"),
        (b"table no reason", b"TEMP "),
        (b"fail ValueError", b"TEMP lookup failed"),
        (b"fail MemoryError", b"TEMP lookup failed"),
        (b"fail SystemExit", b"TEMP lookup failed"),
        (b"fail KeyboardInterrupt", b"TEMP lookup failed"),
        (b"fail GeneratorExit", b"TEMP lookup failed"),
        (b"fail TimeoutError", TIMED_OUT),
        (b"nowhere key", b"TEMP the lookup map does not exist"),
        (b" key", b"TEMP the lookup map does not exist"),
        (b"Table ok", b"TEMP the lookup map does not exist"),
        (b"table fits", b"OK " + FITS.encode()),
        (b"table too large", b"TEMP reply too large"),
        (b"table too large in bytes", b"TEMP reply too large"),
        (b"table reason too large", b"TEMP reply too large"),
        (b"table nul", b"TEMP invalid reply"),
        (b"table nul in a reason", b"TEMP invalid reply"),
        (b"table an exception as reason", b"TEMP invalid reply"),
        (b"table a word as status", b"TEMP invalid reply"),
        (b"table empty", b"TEMP invalid reply"),
        (b"table blank", b"TEMP invalid reply"),
        (b"table not encodable", b"TEMP invalid reply"),
        (b"table number", b"TEMP invalid reply"),
        (b"table bytes", b"TEMP invalid reply"),
        (b"nospace", b"PERM malformed request"),
        (b"", b"PERM malformed request"),
    ],
)
def test_each_row_of_the_reply_table_and_the_connection_stays(site: Site, request_: bytes, reply: bytes) -> None:
    with site.connect() as client:
        assert client.ask(request_) == reply
        assert client.ask(b"table ok") == OK


@pytest.mark.parametrize(
    ("request_", "logged"),
    [
        (
            b"fail ValueError",
            ["map <fail>, key <ValueError>: lookup failed", "Traceback", "the secret of the database"],
        ),
        (b"fail no\nsuch", [r"map <fail>, key <no\nsuch>: lookup failed"]),
        (b"fail TimeoutError", ["map <fail>, key <TimeoutError>: lookup timed out"]),
        (b"table empty", ["OK without a value; return any word"]),
        (b"table nul", ["a NUL byte; return a text without it"]),
        (b"table bytes", ["bytes; return a str, a Reply, or None"]),
        (b"table too large", ["a reply of 100001 bytes where 100000 are allowed"]),
        (b"nospace", ["malformed request: no space"]),
    ],
)
def test_what_went_wrong_is_logged_with_what_to_do_about_it(
    serve: Serve, directory: Path, request_: bytes, logged: list[str]
) -> None:
    log = directory / "log"
    site = serve(
        {"table": table, "fail": fail},
        on_worker_start=lambda: logging.basicConfig(filename=log, force=True),
    )
    with site.connect() as client:
        reply = client.ask(request_)
    text = eventually(log.read_text, DEADLINE)
    assert [part for part in logged if part not in text] == []
    assert b"secret" not in reply


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b" ",
        b"two words",
        b"  a  b ",
        b"\xff\xfe\x80",
        b"\0",
        b"a\r\nb",
        "J\u00fcrgen".encode(),
        bytes(range(256)),
    ],
)
def test_a_key_arrives_as_it_was_sent_whatever_its_bytes_are(site: Site, key: bytes) -> None:
    expected = b"TEMP invalid reply" if b"\0" in key else b"OK <" + key + b">"
    with site.connect() as client:
        assert client.ask(b"echo " + key) == expected


def test_a_key_with_a_nul_arrives_whole(serve: Serve, endpoint: str) -> None:
    site = serve({"length": lambda key: str(len(key))}, endpoint=endpoint)
    with site.connect() as client:
        assert client.ask(b"length before\0after") == b"OK 12"


@pytest.mark.parametrize("name", ["anything", "", "caf\u00e9"])
def test_the_default_map_gets_the_names_that_are_not_registered(serve: Serve, endpoint: str, name: str) -> None:
    site = serve({"table": table}, endpoint=endpoint, default=lambda name, key: f"{name}/{key}")
    with site.connect() as client:
        assert client.ask(f"{name} a key".encode()) == f"OK {name}/a key".encode()
        assert client.ask(b"table ok") == OK


def test_pipelined_requests_are_answered_in_order(site: Site) -> None:
    requests = [f"echo {number}".encode() for number in range(1000)]
    with site.connect() as client:
        client.send(b"".join(map(netstring.encode, requests)))
        assert [client.reply() for _ in requests] == [f"OK <{number}>".encode() for number in range(1000)]


def test_a_request_that_arrives_byte_by_byte_is_answered(site: Site) -> None:
    with site.connect() as client:
        for byte in netstring.encode(b"table ok"):
            client.send(bytes([byte]))
            # The bytes are meant to arrive one by one: that they have left is all that can be waited for.
            eventually(lambda: not unsent(client.sock))
        assert client.reply() == OK


def unsent(sock: socket.socket) -> int:
    """Return how many bytes the peer has not acknowledged, or, of a Unix socket, not read."""
    number = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, number)
    return number[0]


def test_a_request_behind_the_start_of_the_next_one_is_answered_at_once(site: Site) -> None:
    encoded = netstring.encode(b"table ok")
    with site.connect() as client:
        client.send(encoded + encoded[:5])
        assert client.reply() == OK
        client.send(encoded[5:])
        assert client.reply() == OK


def test_a_client_that_sends_its_last_request_and_its_end_is_answered(site: Site) -> None:
    with site.connect() as client:
        client.request(b"table ok")
        client.sock.shutdown(socket.SHUT_WR)
        assert client.reply() == OK


NOT_NETSTRINGS = [b"GET / HTTP/1.1\r\n\r\n", b"05:a b,,", b"-1:", b"3:a b.", b":", b"+3:a b,", b"1" * 20, b"200000:"]


@pytest.mark.parametrize("garbage", NOT_NETSTRINGS)
def test_what_is_no_netstring_is_refused_and_the_reply_arrives_before_an_orderly_close(
    site: Site, garbage: bytes
) -> None:
    with site.connect() as client:
        client.send(garbage)
        assert client.reply() == b"PERM malformed request"
        assert client.end() is End.ORDERLY


def test_requests_before_a_malformed_one_are_answered(site: Site) -> None:
    with site.connect() as client:
        client.send(netstring.encode(b"table ok") + b"garbage")
        assert client.reply() == OK
        assert client.reply() == b"PERM malformed request"
        assert client.end() is End.ORDERLY


def test_the_refusal_arrives_even_when_the_client_has_sent_a_megabyte_more(site: Site) -> None:
    with site.connect() as client:
        client.send(b"garbage" + b"x" * 1_000_000)
        assert client.reply() == b"PERM malformed request"
        assert client.end() is End.ORDERLY


def test_a_client_that_talks_on_after_a_refusal_is_cut_off(site: Site) -> None:
    with site.connect() as client:
        client.send(b"garbage")
        assert client.reply() == b"PERM malformed request"
        with pytest.raises(ConnectionError):
            client.send(b"x" * 100_000_000)


def test_a_request_of_the_largest_size_is_answered_and_a_larger_one_refused(serve: Serve, endpoint: str) -> None:
    site = serve({"length": lambda key: str(len(key))}, Config(max_request_size=20_000), endpoint)
    with site.connect() as client:
        assert client.ask(b"length " + b"x" * 19_993) == b"OK 19993"
        client.send(b"20001:")
        assert client.reply() == b"PERM malformed request"
        assert client.end() is End.ORDERLY


def test_the_reply_size_is_not_limited_when_the_limit_is_0(serve: Serve, endpoint: str) -> None:
    site = serve({"long": lambda key: "x" * int(key)}, Config(max_reply_size=0), endpoint)
    with site.connect() as client:
        assert client.ask(b"long 3000000") == b"OK " + b"x" * 3_000_000


# Timeouts. How long something takes at least is asserted; how long at most is not, since the machine may be busy.


def drip(client: Client, pause: float) -> None:
    """Send a request's bytes one by one, with a pause after each, until the server has enough of it."""
    client.send(b"90000:")
    deadline = time.monotonic() + DEADLINE
    with contextlib.suppress(ConnectionError):
        while client.is_open:
            assert time.monotonic() < deadline, "the server goes on waiting"
            client.send(b"x")
            time.sleep(pause)


@pytest.mark.parametrize("pause", [0.01, 0.1])
def test_a_request_whose_bytes_drip_in_is_bounded_by_read_timeout(serve: Serve, endpoint: str, pause: float) -> None:
    site = serve({"table": table}, Config(read_timeout=0.3), endpoint)
    with site.connect() as client:
        began = time.monotonic()
        drip(client, pause)
        assert time.monotonic() - began >= 0.3


def test_a_client_that_stops_in_the_middle_of_a_request_is_bounded_by_read_timeout(
    serve: Serve, endpoint: str
) -> None:
    site = serve({"table": table}, Config(read_timeout=0.3), endpoint)
    with site.connect() as client:
        began = time.monotonic()
        client.send(b"100:half of")
        assert client.end() is abrupt(endpoint)
        assert time.monotonic() - began >= 0.3
        site.await_count("connections", "timed_out", 1)


def test_read_timeout_begins_anew_with_each_request(serve: Serve, endpoint: str) -> None:
    site = serve({"table": table}, Config(read_timeout=2), endpoint)
    encoded = netstring.encode(b"table ok")
    with site.connect() as client:
        began = time.monotonic()
        client.send(encoded[:5])
        while time.monotonic() - began < 5:
            # Never a moment without the beginning of a request.
            client.send(encoded[5:] + encoded[:5])
            assert client.reply() == OK


def test_a_client_that_does_not_read_its_reply_is_bounded_by_write_timeout(serve: Serve, endpoint: str) -> None:
    config = Config(write_timeout=0.3, max_reply_size=0, process_limit=1)
    site = serve({"table": table, "long": lambda key: "x" * 20_000_000}, config, endpoint)
    with site.connect(receive_buffer=4096) as deaf, site.connect() as other:
        began = time.monotonic()
        deaf.request(b"long key")
        assert other.ask(b"table ok") == OK  # it holds up nobody, though there is one worker
        site.await_count("connections", "timed_out", 1)
        assert time.monotonic() - began >= 0.3
        with contextlib.suppress(ConnectionResetError):
            assert len(b"".join(iter(lambda: deaf.sock.recv(1 << 20), b""))) < 20_000_000


def test_a_slow_reader_gets_its_reply_whole_within_write_timeout(serve: Serve, endpoint: str) -> None:
    site = serve({"long": lambda key: "x" * 3_000_000}, Config(max_reply_size=0), endpoint)
    with site.connect(receive_buffer=4096) as client:
        client.request(b"long key")
        time.sleep(0.2)
        assert client.reply() == b"OK " + b"x" * 3_000_000


def test_a_silent_client_is_closed_by_reset_after_keepalive_timeout(serve: Serve, endpoint: str) -> None:
    site = serve({"table": table}, Config(keepalive_timeout=1), endpoint)
    with site.connect() as silent, site.connect() as asked:
        began = time.monotonic()
        assert asked.ask(b"table ok") == OK
        assert asked.end() is abrupt(endpoint)
        assert time.monotonic() - began >= 1
        assert silent.end() is abrupt(endpoint)


def test_the_longest_times_are_served_as_the_shortest(serve: Serve, endpoint: str) -> None:
    longest = 2**31 - 1
    config = Config(
        read_timeout=longest,
        write_timeout=longest,
        idle_timeout=longest,
        lookup_timeout=longest,
        max_idle=longest,
        keepalive_timeout=longest,
        stop_timeout=longest,
    )
    site = serve({"table": table}, config, endpoint)
    with site.connect() as client:
        assert client.ask(b"table ok") == OK
        time.sleep(0.2)
        encoded = netstring.encode(b"table ok")
        client.send(encoded[:5])
        time.sleep(0.2)
        client.send(encoded[5:])
        assert client.reply() == OK
    site.server.shutdown()


def test_every_timeout_may_be_switched_off(serve: Serve, endpoint: str) -> None:
    config = Config(
        read_timeout=0,
        write_timeout=0,
        idle_timeout=0,
        lookup_timeout=0,
        max_idle=0,
        keepalive_timeout=0,
        stop_timeout=0,
    )
    site = serve({"table": table, "long": lambda key: "x" * 99_000}, config, endpoint)
    with site.connect(receive_buffer=4096) as client:
        client.send(b"100:")
        time.sleep(0.2)
        client.send(b"table " + b"x" * 94 + b",")
        assert client.reply() == b"TEMP lookup failed"
        client.request(b"long key")
        time.sleep(0.2)
        assert len(client.reply()) == 99_003
    site.server.shutdown()
