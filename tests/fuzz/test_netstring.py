"""The decoder beside a second one too simple to be wrong: same payloads, same refusal, however input is split.

The second one knows the whole stream. It is written from the definition of a netstring, not from the decoder, and has
one opinion for every stream: the payloads, then whether it goes on, or is no netstring from there on.
"""

from __future__ import annotations

import itertools
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from prefork_socketmap.socketmap.netstring import Decoder, FramingError, encode
from tests.fuzz import repeat, unlimited

_LENGTH = re.compile(rb"(0|[1-9][0-9]*):", re.ASCII)
_BEGINNING = re.compile(rb"(0|[1-9][0-9]*)?", re.ASCII)

Outcome = tuple[list[bytes], bool]
"""The payloads, and whether the stream is refused behind them."""


def naive(stream: bytes, limit: int) -> Outcome:
    """Decode all of *stream*, one netstring after the other."""
    payloads: list[bytes] = []
    while True:
        match = _LENGTH.match(stream)
        if match is None:
            return payloads, not _may_become_a_length(stream, limit)
        length = int(match[1])
        if length > limit:
            return payloads, True
        payload, rest = stream[match.end() :][:length], stream[match.end() + length :]
        if not rest:
            return payloads, False
        if rest[:1] != b",":
            return payloads, True
        payloads.append(payload)
        stream = rest[1:]


def _may_become_a_length(beginning: bytes, limit: int) -> bool:
    # As many digits as the limit has are not yet too many: nobody knows whether they are all.
    return _BEGINNING.fullmatch(beginning) is not None and len(beginning) <= len(str(limit))


def decode(pieces: list[bytes], limit: int) -> Outcome:
    """Decode what arrives in *pieces*, as a service does: all that is complete, before the next piece is fed."""
    decoder, payloads = Decoder(limit), list[bytes]()
    for piece in pieces:
        decoder.feed(piece)
        try:
            payloads += iter(decoder.next, None)
        except FramingError:
            return payloads, True
    return payloads, False


limits = st.integers(min_value=1, max_value=150) | st.sampled_from([9, 10, 99, 100, 999, 1000, 100_000])
netstrings = st.binary(max_size=120).map(encode)
noise = st.binary(max_size=8) | st.text("0123456789:, +-_", max_size=12).map(str.encode)
# Lengths that lie about what follows, among them such as no memory would be enough for.
lies = st.builds(
    lambda length, zeros, payload: b"0" * zeros + b"%d:%b," % (length, payload),
    st.integers(min_value=0, max_value=200) | st.sampled_from([10**9, 2**31, 2**63, 10**30]),
    st.sampled_from([0, 0, 0, 1, 3]),
    st.binary(max_size=60),
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Mostly netstrings, with noise and lies between, a byte changed or lost, the end cut off."""
    stream = bytearray(b"".join(draw(st.lists(netstrings | netstrings | noise | lies, max_size=8))))
    for _ in range(draw(st.integers(min_value=0, max_value=2)) if stream else 0):
        place = draw(st.integers(min_value=0, max_value=len(stream)))
        stream[place : place + draw(st.integers(0, 1))] = draw(st.binary(max_size=1))
    return bytes(stream[: draw(st.integers(min_value=0, max_value=len(stream)))] if draw(st.booleans()) else stream)


@st.composite
def cut_streams(draw: st.DrawFn) -> list[bytes]:
    """A stream in pieces: at random places, or every byte alone."""
    stream = draw(streams())
    if draw(st.booleans()):
        return [stream[place : place + 1] for place in range(len(stream))]
    places = sorted(draw(st.lists(st.integers(min_value=0, max_value=len(stream)), max_size=8)))
    return [stream[begin:end] for begin, end in itertools.pairwise([0, *places, len(stream)])]


@unlimited
def test_any_split_of_any_stream_is_decoded_as_the_simplest_decoder_decodes_the_whole() -> None:
    @settings(max_examples=3000, deadline=None)
    @given(cut_streams(), limits)
    def check(pieces: list[bytes], limit: int) -> None:
        assert decode(pieces, limit) == naive(b"".join(pieces), limit)

    repeat(check)


@unlimited
def test_what_the_decoder_holds_is_bounded_by_the_longest_netstring() -> None:
    @settings(max_examples=1000, deadline=None)
    @given(cut_streams(), limits)
    def check(pieces: list[bytes], limit: int) -> None:
        decoder, longest = Decoder(limit), len(encode(bytes(limit)))
        for piece in pieces:
            decoder.feed(piece)
            try:
                list(iter(decoder.next, None))
            except FramingError:
                return
            assert len(decoder.pending) < longest

    repeat(check)
