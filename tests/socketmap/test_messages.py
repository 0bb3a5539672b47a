"""Requests and replies: any bytes survive, and nothing is sent that Postfix would misread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork_socketmap.socketmap.messages import (
    InvalidReplyError,
    MalformedRequestError,
    Reply,
    ReplyTooLargeError,
    Request,
    Status,
    to_bytes,
    to_text,
)

names = st.binary(min_size=1, max_size=30).filter(lambda name: b" " not in name)
values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@given(st.binary())
def test_any_bytes_survive_as_text(data: bytes) -> None:
    assert to_bytes(to_text(data)) == data


@given(names, st.binary())
def test_any_bytes_survive_in_a_request(name: bytes, key: bytes) -> None:
    payload = name + b" " + key
    request = Request.decode(payload)
    assert (to_bytes(request.name), to_bytes(request.key)) == (name, key)
    assert request.encode() == payload


@pytest.mark.parametrize(
    ("payload", "request_"),
    [
        (b"virtual user@example.com", Request("virtual", "user@example.com")),
        (b"virtual ", Request("virtual", "")),
        (b"virtual  ", Request("virtual", " ")),
        (b"virtual quoted user@example.com ", Request("virtual", "quoted user@example.com ")),
        (b" key", Request("", "key")),
        ("virtual ümlaut@example.com".encode(), Request("virtual", "ümlaut@example.com")),
        (b"virtual \xff@example.com", Request("virtual", "\udcff@example.com")),
        (b"virtual a\0b", Request("virtual", "a\0b")),
    ],
)
def test_a_request_is_split_at_its_first_space(payload: bytes, request_: Request) -> None:
    assert Request.decode(payload) == request_


@pytest.mark.parametrize("payload", [b"", b"virtual", b"virtual\tkey"])
def test_a_request_without_a_space_is_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedRequestError):
        Request.decode(payload)


@pytest.mark.parametrize(
    ("reply", "payload"),
    [
        (Reply.ok("value"), b"OK value"),
        (Reply.ok(" two "), b"OK  two "),
        (Reply.ok("ümlaut"), "OK ümlaut".encode()),
        (Reply.ok("\udcff"), b"OK \xff"),
        (Reply.not_found(), b"NOTFOUND "),
        (Reply.temp_fail("database down"), b"TEMP database down"),
        (Reply.perm_fail("no such table"), b"PERM no such table"),
        (Reply.timeout("too slow"), b"TIMEOUT too slow"),
        (Reply.temp_fail(""), b"TEMP "),
    ],
)
def test_each_status_has_its_word_a_space_and_its_text(reply: Reply, payload: bytes) -> None:
    assert reply.encode() == payload
    assert Reply.decode(payload) == reply


@given(st.sampled_from(Status), values)
def test_a_reply_survives_the_round_trip(status: Status, text: str) -> None:
    assert Reply.decode(Reply(status, text).encode()) == Reply(status, text)


def test_a_bare_notfound_is_understood() -> None:
    assert Reply.decode(b"NOTFOUND") == Reply.not_found()


@pytest.mark.parametrize("payload", [b"", b" ", b"ok value", b"OK\tvalue", b"OKvalue", b"\xff value", b"NOT_FOUND "])
def test_a_word_that_the_protocol_does_not_have_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="is not a valid Status"):
        Reply.decode(payload)


@given(st.binary(max_size=30))
def test_decoding_a_reply_raises_nothing_but_a_value_error(payload: bytes) -> None:
    try:
        reply = Reply.decode(payload)
    except ValueError:
        return
    assert payload.startswith(reply.status.value.encode())


@pytest.mark.parametrize("data", ["", " ", "\t\n ", "\N{NO-BREAK SPACE}"])
def test_a_blank_value_is_refused_where_it_is_made(data: str) -> None:
    with pytest.raises(ValueError, match=r"Reply\.ok\(\) needs a value"):
        Reply.ok(data)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "text"),
    [
        (Reply.ok, [None], TypeError, "data: type NoneType .*expected a str"),
        (Reply.ok, [b"x"], TypeError, "data: type bytes"),
        (Reply.ok, [5], TypeError, "data: type int"),
        (Reply.temp_fail, [OSError("x")], TypeError, "reason: type OSError .*expected a str"),
        (Reply.perm_fail, [None], TypeError, "reason: type NoneType"),
        (Reply.timeout, [b""], TypeError, "reason: type bytes"),
        (Reply.not_found().encode, ["1"], TypeError, "max_size: type str .*expected a number of bytes"),
        (Reply.not_found().encode, [True], TypeError, "max_size: type bool"),
        (Reply.not_found().encode, [-1], ValueError, "max_size: -1"),
        (Reply.decode, ["OK x"], TypeError, "payload: type str .*expected bytes"),
        (Request.decode, ["a b"], TypeError, "payload: type str .*expected bytes"),
    ],
)
def test_wrong_usage_is_an_error_that_says_what_is_accepted(
    function: Callable[..., object], arguments: list[object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        function(*arguments)


@pytest.mark.parametrize(
    ("name", "key", "error", "text"),
    [
        (5, "x", TypeError, "name: type int .*expected a str"),
        ("x", b"x", TypeError, "key: type bytes"),
        ("a b", "c", ValueError, "a map name has no space: 'a b'"),
    ],
)
def test_a_request_that_would_be_read_as_another_is_not_sent(
    name: Any, key: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Request(name, key).encode()


def test_a_status_that_the_protocol_does_not_have_is_not_sent() -> None:
    word: Any = "OK"
    with pytest.raises(InvalidReplyError, match=r"the status 'OK'; use Reply\.ok\(\)"):
        Reply(word, "x").encode()


@pytest.mark.parametrize("data", ["", " ", "\t\n "])
def test_an_ok_without_a_value_is_not_sent(data: str) -> None:
    # Reply(...) itself is not checked: a map can make any.
    with pytest.raises(InvalidReplyError, match="OK without a value"):
        Reply(Status.OK, data).encode()


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("text", ["\0", "value\0", "a\0b"])
def test_a_nul_is_not_sent(status: Status, text: str) -> None:
    with pytest.raises(InvalidReplyError, match="NUL"):
        Reply(status, text).encode()


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_a_surrogate_that_stands_for_no_byte_is_not_sent(text: str) -> None:
    with pytest.raises(InvalidReplyError, match="not encodable"):
        Reply.ok(text).encode()


def test_the_limit_counts_the_bytes_of_the_whole_payload() -> None:
    assert Reply.ok("ü" * 10).encode(max_size=23) == b"OK " + "ü".encode() * 10
    with pytest.raises(ReplyTooLargeError, match="23 bytes where 22 are allowed"):
        Reply.ok("ü" * 10).encode(max_size=22)


def test_no_limit_is_zero() -> None:
    assert len(Reply.ok("x" * 200_000).encode(max_size=0)) == 200_003


def test_a_reason_is_limited_like_a_value() -> None:
    with pytest.raises(ReplyTooLargeError):
        Reply.temp_fail("x" * 100).encode(max_size=100)
