"""Netstrings: the framing of the socketmap protocol.

A netstring is the length of its payload in ASCII decimal digits, a colon, the payload, and a comma:
``5:hello,`` (https://cr.yp.to/proto/netstrings.txt; socketmap_table(5), "PROTOCOL").

This file knows bytes and nothing else: what the payload means is in ``messages``, where it comes from is the
business of whoever holds the socket.
"""

from __future__ import annotations

_ZERO, _COMMA = b"0,"


class FramingError(ValueError):
    """The input is not a netstring, or it announces more bytes than the decoder takes.

    The stream cannot be read any further: nobody knows where the next netstring would begin.
    """


def encode(payload: bytes) -> bytes:
    """Return *payload* as a netstring."""
    return b"%d:%b," % (len(payload), payload)


class Decoder:
    """Cuts a stream of bytes into netstring payloads, however the stream was split on its way.

    ``feed()`` takes what was received, ``next()`` returns the next complete payload, or None when it needs more
    input. It holds at most one incomplete netstring and what was fed behind it, so a caller that calls ``next()``
    until it returns None before it feeds again bounds the memory by *max_size* and its own read size. ``pending`` is
    what is held: the beginning of a netstring, or, before ``next()``, more than that.

    *max_size*: the longest payload, in bytes, that is accepted. The length is compared with it before any of the
    payload is awaited, and its digits are counted before they are converted: no input makes the decoder reserve
    memory for a length that it refuses.
    """

    __slots__ = ("_max_digits", "_max_size", "pending")

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._max_digits = len(str(max_size))
        # Bytes while it holds whole input (cheap to slice), a bytearray while input trickles in (cheap to extend).
        self.pending: bytes | bytearray = b""

    def feed(self, data: bytes) -> None:
        """Add *data*, the bytes that were received."""
        if not self.pending:
            self.pending = data
            return
        if not isinstance(self.pending, bytearray):
            self.pending = bytearray(self.pending)
        self.pending += data

    def next(self) -> bytes | None:
        """Return the next payload, or None when its end has not arrived yet.

        Raises FramingError as soon as the bytes that are there cannot begin a netstring of at most *max_size*.
        """
        buffer = self.pending
        if not buffer:
            return None
        colon = buffer.find(b":", 0, self._max_digits + 1)
        if colon < 0:
            self._check_digits(bytes(buffer[: self._max_digits + 1]))
            return None
        digits = buffer[:colon]
        # int() alone would admit signs, blanks and underscores.
        if not digits.isdigit() or (digits[0] == _ZERO and colon > 1):
            raise FramingError(f"not a length: {bytes(digits)!r}")
        length = int(digits)
        if length > self._max_size:
            raise FramingError(f"{length} bytes announced, at most {self._max_size} are accepted")
        comma = colon + 1 + length
        if len(buffer) <= comma:
            return None
        if buffer[comma] != _COMMA:
            raise FramingError(f"byte {buffer[comma]:#04x} where the comma belongs")
        self.pending = buffer[comma + 1 :]
        payload = buffer[colon + 1 : comma]
        return payload if isinstance(payload, bytes) else bytes(payload)

    def _check_digits(self, beginning: bytes) -> None:
        """Raise FramingError unless *beginning*, which has no colon, may still become a length."""
        if not beginning.isdigit() or (beginning[0] == _ZERO and len(beginning) > 1):
            raise FramingError(f"not a length: {beginning!r}")
        if len(beginning) > self._max_digits:
            raise FramingError(f"a length of more than {self._max_digits} digits")
