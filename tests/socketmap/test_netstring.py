"""Netstrings: what is written can be read, however it was split, and nothing else can."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork_socketmap.socketmap.netstring import Decoder, FramingError, Splitter, encode

LIMIT = 100_000

payloads = st.binary(max_size=300)
# Mostly what netstrings are made of, so that a good part of the garbage gets past the first byte.
garbage = st.binary(max_size=40) | st.text("0123456789:, +-_x", max_size=40).map(str.encode)


def drain(decoder: Decoder) -> list[bytes]:
    """Return every payload that is complete."""
    return list(iter(decoder.next, None))


def decode(data: bytes, *, limit: int = LIMIT) -> list[bytes]:
    """Return the payloads of *data*, fed at once."""
    decoder = Decoder(limit)
    decoder.feed(data)
    return drain(decoder)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Return *data* cut at the given places, each taken modulo its length."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[begin:end] for begin, end in itertools.pairwise(places)]


def test_the_wire_form_is_length_colon_payload_comma() -> None:
    assert encode(b"hello") == b"5:hello,"
    assert encode(b"") == b"0:,"


@given(payloads)
def test_what_is_encoded_can_be_decoded(payload: bytes) -> None:
    assert decode(encode(payload)) == [payload]


@given(st.lists(payloads, max_size=8))
def test_several_requests_in_one_read_come_out_in_order(sent: list[bytes]) -> None:
    assert decode(b"".join(map(encode, sent))) == sent


@given(st.lists(payloads, min_size=1, max_size=5), st.lists(st.integers(min_value=0), max_size=10))
def test_any_split_of_the_input_gives_the_same_payloads(sent: list[bytes], cuts: list[int]) -> None:
    decoder, received = Decoder(LIMIT), []
    for piece in pieces(b"".join(map(encode, sent)), cuts):
        decoder.feed(piece)
        received += drain(decoder)
    assert received == sent
    assert not decoder.pending


@pytest.mark.parametrize("cut", range(1, len(encode(b"hello world")) * 2))
def test_two_reads_that_meet_at_any_byte_are_joined(cut: int) -> None:
    stream = encode(b"hello world") * 2
    decoder = Decoder(LIMIT)
    decoder.feed(stream[:cut])
    received = drain(decoder)
    decoder.feed(stream[cut:])
    assert received + drain(decoder) == [b"hello world"] * 2


@given(st.lists(payloads, min_size=1, max_size=3))
def test_bytes_that_arrive_one_at_a_time_are_joined(sent: list[bytes]) -> None:
    decoder, received = Decoder(LIMIT), []
    for byte in b"".join(map(encode, sent)):
        decoder.feed(bytes([byte]))
        received += drain(decoder)
    assert received == sent


@given(payloads)
def test_an_incomplete_netstring_is_awaited(payload: bytes) -> None:
    decoder = Decoder(LIMIT)
    decoder.feed(encode(payload)[:-1])
    assert decoder.next() is None
    assert decoder.pending


def test_nothing_is_pending_where_nothing_was_fed() -> None:
    decoder = Decoder(LIMIT)
    assert not decoder.pending
    decoder.feed(b"")
    assert decoder.next() is None
    assert not decoder.pending


@given(garbage, st.integers(min_value=1, max_value=200), st.lists(st.integers(min_value=0), max_size=5))
def test_garbage_raises_nothing_but_a_framing_error(data: bytes, limit: int, cuts: list[int]) -> None:
    decoder, received = Decoder(limit), []
    try:
        for piece in pieces(data, cuts):
            decoder.feed(piece)
            received += drain(decoder)
    except FramingError:
        return
    # What was accepted is netstrings, and the beginning of one that may still fit the limit.
    accepted = b"".join(map(encode, received))
    assert data.startswith(accepted)
    assert len(data) - len(accepted) < len(encode(bytes(limit)))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"x", id="a letter"),
        pytest.param(b":", id="no digit"),
        pytest.param(b":,", id="no digit, but a comma"),
        pytest.param(b",", id="a comma"),
        pytest.param(b"+5:hello,", id="plus sign"),
        pytest.param(b"-5:hello,", id="minus sign"),
        pytest.param(b"-", id="minus sign alone"),
        pytest.param(b" 5:hello,", id="leading blank"),
        pytest.param(b"5 :hello,", id="blank behind"),
        pytest.param(b"1_0:helloworld,", id="underscore"),
        pytest.param(b"5\n:hello,", id="newline"),
        pytest.param("\N{ARABIC-INDIC DIGIT FIVE}:hello,".encode(), id="a digit that is not ASCII"),
        pytest.param(b"\x00", id="NUL"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00", id="TLS"),
    ],
)
def test_what_is_not_a_length_is_refused(data: bytes) -> None:
    with pytest.raises(FramingError):
        decode(data)


@pytest.mark.parametrize("data", [b"00:,", b"05:hello,", b"00", b"05"])
def test_a_leading_zero_is_refused(data: bytes) -> None:
    with pytest.raises(FramingError, match="not a length"):
        decode(data)


def test_zero_is_a_length() -> None:
    assert decode(b"0:,1:a,") == [b"", b"a"]


@given(st.binary(min_size=1, max_size=1).filter(lambda byte: byte != b","))
def test_the_terminator_is_checked(byte: bytes) -> None:
    with pytest.raises(FramingError, match="where the comma belongs"):
        decode(b"5:hello" + byte)


def test_the_longest_payload_is_accepted_and_one_byte_more_is_not() -> None:
    assert decode(encode(bytes(LIMIT))) == [bytes(LIMIT)]
    with pytest.raises(FramingError, match="100001 bytes announced, at most 100000"):
        decode(encode(bytes(LIMIT + 1)))


def test_a_refused_length_is_refused_before_its_payload_arrives() -> None:
    with pytest.raises(FramingError, match="announced"):
        decode(b"100001:")


@pytest.mark.parametrize("limit", [1, 9, 10, 99, 100, 100_000])
def test_the_digits_are_counted_before_the_colon_arrives(limit: int) -> None:
    digits = len(str(limit))
    decoder = Decoder(limit)
    decoder.feed(b"1" * digits)
    assert decoder.next() is None
    decoder.feed(b"1")
    with pytest.raises(FramingError, match="digits"):
        decoder.next()


def test_endless_digits_are_not_converted() -> None:
    # int() refuses more than 4300 digits with a plain ValueError: reaching it would show.
    with pytest.raises(FramingError, match="digits"):
        decode(b"9" * 10_000 + b":")


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="PyPy does not tell the size of an object")
def test_no_memory_is_taken_for_an_announced_length() -> None:
    decoder = Decoder(10**9)
    decoder.feed(b"999999999:")
    assert decoder.next() is None
    decoder.feed(b"x")
    assert decoder.next() is None
    assert sys.getsizeof(decoder.pending) < 1000


# The splitter: it keeps nothing, so its caller has to be told where to go on and how much to wait for.


def split_all(data: bytes, *, limit: int = LIMIT) -> tuple[list[bytes], int, int]:
    """Return all payloads that are complete, where what is not complete begins, and how many bytes it lacks."""
    splitter, begin = Splitter(limit), 0
    found: list[bytes] = []
    while True:
        payload, end = splitter.split(data, begin)
        if payload is None:
            return found, begin, end
        found.append(payload)
        begin = end


@given(st.lists(payloads, max_size=8))
def test_the_splitter_tells_where_the_next_netstring_begins(sent: list[bytes]) -> None:
    stream = b"".join(map(encode, sent))
    found, begin, missing = split_all(stream)
    assert found == sent
    assert begin == len(stream)
    assert missing > 0


@given(payloads, payloads, st.integers(min_value=1))
def test_the_splitter_never_asks_for_more_than_is_missing(first: bytes, second: bytes, cut: int) -> None:
    """Who reads so many bytes never reads into the next request."""
    wanted = encode(second)
    kept = cut % len(wanted)
    stream = encode(first) + wanted[:kept]
    found, begin, missing = split_all(stream)
    assert (found, begin) == ([first], len(encode(first)))
    assert 0 < missing <= len(wanted) - kept
    if b":" in wanted[:kept]:
        assert missing == len(wanted) - kept


@given(st.binary(max_size=300))
def test_who_reads_as_many_bytes_as_are_missing_gets_there(payload: bytes) -> None:
    splitter, wanted = Splitter(LIMIT), encode(payload)
    data, rounds = b"", 0
    while (found := splitter.split(data))[0] is None:
        data = wanted[: len(data) + found[1]]
        rounds += 1
    assert found == (payload, len(wanted))
    assert rounds <= len(str(len(payload))) + 2


@given(garbage, garbage, st.integers(min_value=1, max_value=200))
def test_the_splitter_looks_at_nothing_before_its_beginning(before: bytes, data: bytes, limit: int) -> None:
    def outcome(stream: bytes, begin: int) -> tuple[bytes | None, int] | str:
        try:
            payload, end = Splitter(limit).split(stream, begin)
        except FramingError as error:
            return str(error)
        return payload, end - begin if payload is not None else end

    assert outcome(before + data, len(before)) == outcome(data, 0)


def test_one_splitter_serves_many_streams() -> None:
    splitter = Splitter(10)
    assert splitter.split(b"5:hel") == (None, 3)
    assert splitter.split(b"3:abc,") == (b"abc", 6)
    with pytest.raises(FramingError):
        splitter.split(b"11:")
    assert splitter.split(bytearray(b"5:hello,")) == (b"hello", 8)


@pytest.mark.parametrize(
    ("function", "argument", "error", "text"),
    [
        (encode, "x", TypeError, "payload: type str .*expected bytes"),
        (encode, None, TypeError, "payload: type NoneType"),
        (Decoder, "10", TypeError, "max_size: type str .*expected a number of bytes"),
        (Decoder, -1, ValueError, "max_size: -1"),
        (Splitter, 1.5, TypeError, "max_size: type float"),
        (Decoder(10).feed, "1:x,", TypeError, "data: type str .*expected bytes"),
        (Decoder(10).feed, 5, TypeError, "data: type int"),
        (Splitter(10).split, "1:x,", TypeError, "data: type str .*expected bytes"),
        (Splitter(10).split, None, TypeError, "data: type NoneType"),
    ],
)
def test_wrong_usage_is_an_error_that_says_what_is_accepted(
    function: Callable[[object], object], argument: object, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        function(argument)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_buffer_stays_its_owners(kind: Callable[[bytes], bytes]) -> None:
    decoder, data = Decoder(10), kind(b"2:a")
    decoder.feed(data)
    decoder.feed(kind(b"b,"))
    assert decoder.next() == b"ab"
    assert bytes(data) == b"2:a"
