"""Requests and replies of the socketmap protocol, as values and in wire form.

socketmap_table(5): a request is ``name SPACE key``, a reply is a status word, a space and, depending on the status,
the value or a reason. What Postfix makes of each reply is noted where it is not what the manual lets one expect;
those facts were measured with Postfix 3.7.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from prefork_socketmap.socketmap.arguments import expect, expect_bytes, expect_size


class MalformedRequestError(ValueError):
    """The payload of a request has no space, so it has no map name."""


class InvalidReplyError(ValueError):
    """The reply cannot be sent as it is: Postfix would misread it. The text says what to return instead."""


class Status(enum.Enum):
    """The five words a reply can begin with. ``prefix`` is the word as it is sent, with the space behind it."""

    prefix: bytes

    def __init__(self, word: str) -> None:
        # "NOTFOUND " keeps its space: that is how the manual page writes it.
        self.prefix = word.encode("ascii") + b" "

    OK = "OK"
    NOT_FOUND = "NOTFOUND"
    TEMP = "TEMP"
    TIMEOUT = "TIMEOUT"
    PERM = "PERM"


# Lone surrogates carry the bytes of a text that is not UTF-8 (PEP 383): any key survives the way to a map and back.
_ENCODING = "utf-8"
_ERRORS = "surrogateescape"


def to_text(data: bytes) -> str:
    """Decode *data* as UTF-8; a byte that is not UTF-8 becomes a lone surrogate, and ``to_bytes`` restores it."""
    return data.decode(_ENCODING, _ERRORS)


def to_bytes(text: str) -> bytes:
    """Encode *text* as UTF-8, the opposite of ``to_text``."""
    return text.encode(_ENCODING, _ERRORS)


def printable(text: str) -> str:
    """Return *text* with everything that is not printable, line ends above all, as a backslash escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class Request(NamedTuple):
    """One question: the map's name, and the key, which may be empty and may hold spaces."""

    name: str
    key: str

    @classmethod
    def decode(cls, payload: bytes) -> Request:
        """Read a request's netstring payload. Raises MalformedRequestError when no space ends the map's name."""
        expect_bytes("payload", payload)
        return cls(*split_request(payload))

    def encode(self) -> bytes:
        """Return the payload of the request's netstring. Raises ValueError for a name with a space."""
        expect("name", self.name, str, "a str")
        expect("key", self.key, str, "a str")
        if " " in self.name:
            raise ValueError(f"a map name has no space: {self.name!r}")
        return to_bytes(f"{self.name} {self.key}")


def split_request(payload: bytes) -> tuple[str, str]:
    """Return map name and key, as ``Request.decode`` does, at a third of the cost: named tuples are slow to make."""
    name, space, key = payload.decode(_ENCODING, _ERRORS).partition(" ")
    if not space:
        raise MalformedRequestError("no space between map name and key")
    return name, key


class Reply(NamedTuple):
    """One answer: a status and a text, which is the value of an OK and the reason of an error.

    Make one with ``ok``, ``not_found``, ``temp_fail``, ``perm_fail`` or ``timeout``.
    """

    status: Status
    text: str = ""

    @classmethod
    def ok(cls, data: str) -> Reply:
        """Found: *data* is the value. Empty or blank data is a ValueError.

        Postfix reports an empty value as a server configuration error. A map that has nothing to say but "found"
        (a domain list, for one) returns a word.
        """
        try:
            is_blank = not data or str.isspace(data)
        except TypeError:
            is_blank = True
        if is_blank:
            expect("data", data, str, "a str")
            raise ValueError("Reply.ok() needs a value; return any word to say just 'found'")
        return cls(Status.OK, data)

    @classmethod
    def not_found(cls) -> Reply:
        """Not found: the only reply, apart from a value that says so, that lets Postfix reject mail for good."""
        return _NOT_FOUND

    @classmethod
    def temp_fail(cls, reason: str) -> Reply:
        """The lookup failed and may succeed later: Postfix defers the mail and logs *reason*."""
        return cls(Status.TEMP, _text(reason))

    @classmethod
    def perm_fail(cls, reason: str) -> Reply:
        """The lookup cannot succeed until someone repairs something. Postfix still defers: this bounces no mail."""
        return cls(Status.PERM, _text(reason))

    @classmethod
    def timeout(cls, reason: str) -> Reply:
        """The lookup took too long; for Postfix the same as ``temp_fail`` but for the log."""
        return cls(Status.TIMEOUT, _text(reason))

    def encode(self, max_size: int = 0) -> bytes:
        """Return the payload of the reply's netstring. See ``encode_reply``."""
        expect_size("max_size", max_size)
        return encode_reply(self.status, self.text, max_size)

    @classmethod
    def decode(cls, payload: bytes) -> Reply:
        """Read a reply's netstring payload. Raises ValueError for a status word that the protocol does not have."""
        expect_bytes("payload", payload)
        word, _, text = payload.partition(b" ")
        return cls(Status(to_text(word)), to_text(text))


def _text(reason: str) -> str:
    expect("reason", reason, str, "a str")
    return reason


def encode_reply(status: Status, text: str, max_size: int = 0) -> bytes:
    """Return the payload of a reply's netstring.

    *max_size* is in bytes, 0 means no limit. Raises InvalidReplyError for a payload that is longer (Postfix
    fails this lookup and many that follow), that has a NUL (Postfix cuts the value there), or is an OK without
    a value (Postfix takes it for a configuration error).
    """
    try:
        data = text.encode(_ENCODING, _ERRORS)
    except UnicodeEncodeError as error:
        raise InvalidReplyError(f"a reply that is not encodable ({error.reason}); return plain text") from error
    except AttributeError:  # for somebody's temp_fail(exception); to ask before would cost every lookup
        raise InvalidReplyError(f"a reply whose text is of type {type(text).__name__}; return a str") from None
    if b"\0" in data:
        raise InvalidReplyError("a reply with a NUL byte; return a text without it")
    if status is _OK and (not data or data.isspace()):
        raise InvalidReplyError("OK without a value; return any word to say 'found', or None for 'not found'")
    try:
        payload = status.prefix + data
    except AttributeError:
        raise InvalidReplyError(f"a reply with the status {status!r}; use Reply.ok() and its like") from None
    if max_size and len(payload) > max_size:
        raise ReplyTooLargeError(f"a reply of {len(payload)} bytes where {max_size} are allowed")
    return payload


class ReplyTooLargeError(InvalidReplyError):
    """The reply is longer than the limit."""


_OK = Status.OK  # Enum looks its members up in a slow way
_NOT_FOUND = Reply(Status.NOT_FOUND)
