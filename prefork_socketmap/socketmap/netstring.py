"""Netstrings: the framing of the socketmap protocol.

A netstring is the length of its payload in ASCII decimal digits, a colon, the payload, and a comma:
``5:hello,`` (https://cr.yp.to/proto/netstrings.txt; socketmap_table(5), "PROTOCOL").

This file knows bytes and nothing else: what the payload means is in ``messages``, where it comes from is the
business of whoever holds the socket.
"""

from __future__ import annotations

from prefork_socketmap.socketmap.arguments import expect, expect_bytes, expect_size

_ZERO, _COMMA = b"0,"


class FramingError(ValueError):
    """The input is not a netstring, or it announces more bytes than the decoder takes.

    The stream cannot be read any further: nobody knows where the next netstring would begin.
    """


def encode(payload: bytes) -> bytes:
    """Return *payload* as a netstring."""
    try:
        return b"%d:%b," % (len(payload), payload)
    except TypeError:  # to look before would cost every lookup
        expect_bytes("payload", payload)
        raise


class Splitter:
    """Finds netstrings in bytes. It keeps nothing, so one of them serves any number of streams.

    *max_size*: the longest payload, in bytes, that is accepted. The length is compared with it before any of the
    payload is awaited, and its digits are counted before they are converted: no input makes anybody reserve memory
    for a length that is refused.
    """

    __slots__ = ("_max_digits", "_max_size")

    def __init__(self, max_size: int) -> None:
        expect_size("max_size", max_size)
        self._max_size = max_size
        self._max_digits = len(str(max_size))

    def __repr__(self) -> str:
        return f"Splitter({self._max_size})"

    def split(self, data: bytes | bytearray, begin: int = 0) -> tuple[bytes | None, int]:
        """Return the payload of the netstring at *begin*, and where the next one begins.

        When it is not complete: None, and how many bytes are missing, at least. Raises FramingError as soon as the
        bytes that are there cannot begin a netstring of at most *max_size*.
        """
        try:
            colon = data.find(b":", begin, begin + self._max_digits + 1)
        except (AttributeError, TypeError):
            expect("data", data, bytes | bytearray, "bytes")
            raise
        if colon < 0:
            self._check_digits(bytes(data[begin : begin + self._max_digits + 1]))
            return None, 1
        digits = data[begin:colon]
        # int() alone would admit signs, blanks and underscores.
        if not digits.isdigit() or (digits[0] == _ZERO and len(digits) > 1):
            raise FramingError(f"not a length: {bytes(digits)!r}")
        length = int(digits)
        if length > self._max_size:
            raise FramingError(f"{length} bytes announced, at most {self._max_size} are accepted")
        comma = colon + 1 + length
        if len(data) <= comma:
            return None, comma + 1 - len(data)
        if data[comma] != _COMMA:
            raise FramingError(f"byte {data[comma]:#04x} where the comma belongs")
        return bytes(data[colon + 1 : comma]), comma + 1

    def _check_digits(self, beginning: bytes) -> None:
        """Raise FramingError unless *beginning*, which has no colon, may still become a length."""
        if beginning and (not beginning.isdigit() or (beginning[0] == _ZERO and len(beginning) > 1)):
            raise FramingError(f"not a length: {beginning!r}")
        if len(beginning) > self._max_digits:
            raise FramingError(f"a length of more than {self._max_digits} digits")


class Decoder:
    """Cuts a stream of bytes into netstring payloads, however the stream was split on its way.

    ``feed()`` takes what was received, ``next()`` returns the next complete payload, or None when it needs more
    input. It holds at most one incomplete netstring and what was fed behind it, so a caller that calls ``next()``
    until it returns None before it feeds again bounds the memory by *max_size* (see ``Splitter``) and its own read
    size. ``pending`` is what is held: the beginning of a netstring, or, before ``next()``, more than that.
    """

    __slots__ = ("_splitter", "pending")

    def __init__(self, max_size: int) -> None:
        self._splitter = Splitter(max_size)
        # Bytes while it holds whole input (cheap to slice), a bytearray while input trickles in (cheap to extend).
        self.pending: bytes | bytearray = b""

    def __repr__(self) -> str:
        return f"<Decoder: {len(self.pending)} bytes pending>"

    def feed(self, data: bytes) -> None:
        """Add *data*, the bytes that were received."""
        expect("data", data, bytes | bytearray | memoryview, "bytes")
        if not self.pending:
            self.pending = bytes(data)
            return
        if not isinstance(self.pending, bytearray):
            self.pending = bytearray(self.pending)
        self.pending += data

    def next(self) -> bytes | None:
        """Return the next payload, or None when its end has not arrived yet.

        Raises FramingError as soon as the bytes that are there cannot begin a netstring of at most *max_size*.
        """
        payload, end = self._splitter.split(self.pending)
        if payload is not None:
            self.pending = self.pending[end:]
        return payload
