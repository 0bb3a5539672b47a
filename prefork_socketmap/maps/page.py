"""A page of answers, as bytes: entries one behind the other, the latest first, then zeros.

What is read may have been written by anybody, or half of it: whatever is not whole is not there, and ends the page.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from zlib import crc32

SIZE = 4096
TAG_SIZE = 16
SPREAD, PART = 254, 255
"""Kinds of entries: a value in parts, and a part of one."""

_HEADER = struct.Struct("<16sIHHBddd")  # tag, checksum of what follows, sizes of key and value, kind, times
_CHECKED = TAG_SIZE + 4  # from here on the checksum is taken
_KIND = 24  # where it stands
_KEPT_UNTIL = struct.Struct("<d")


class Entry(NamedTuple):
    """What stands at a key. Kinds below 254 are the caller's business. Times are in seconds since the epoch."""

    kind: int
    value: bytes
    stored: float
    fresh_until: float
    kept_until: float


class Block(NamedTuple):
    """An entry as it stands in a page."""

    tag: bytes
    data: bytes

    @property
    def is_answer(self) -> bool:
        """Whether it is no part of another one."""
        return self.data[_KIND] != PART

    @property
    def kept_until(self) -> float:
        """When the entry is of no more use."""
        kept_until: float = _KEPT_UNTIL.unpack_from(self.data, _HEADER.size - _KEPT_UNTIL.size)[0]
        return kept_until


def pack(tag: bytes, key: bytes, entry: Entry) -> Block:
    """Return *entry* as it will stand in a page."""
    kind, value, *times = entry
    rest = _HEADER.pack(tag, 0, len(key), len(value), kind, *times)[_CHECKED:] + key + value
    return Block(tag, tag + crc32(rest).to_bytes(4, "little") + rest)


def unpack(page: bytes, at: int) -> tuple[bytes, Entry, int] | None:
    """Return key and entry that stand at a place in *page*, and where they end; None if nothing whole does."""
    if at + _HEADER.size > len(page):
        return None
    _, checksum, key_size, value_size, kind, stored, fresh_until, kept_until = _HEADER.unpack_from(page, at)
    value = at + _HEADER.size + key_size
    end = value + value_size
    if end > len(page) or crc32(page[at + _CHECKED : end]) != checksum:
        return None
    key = page[value - key_size : value]
    return key, Entry(kind, page[value:end], stored, fresh_until, kept_until), end


def split(page: bytes) -> Iterator[Block]:
    """Iterate over what stands in *page*."""
    begin = 0
    while found := unpack(page, begin):
        end = found[2]
        yield Block(page[begin : begin + TAG_SIZE], page[begin:end])
        begin = end


def join(blocks: Iterable[Block]) -> tuple[bytes, int]:
    """Return a page of the first of *blocks*, as many as it has room for, and how many answers are in it."""
    page = b""
    answers = 0
    for block in blocks:
        if len(page) + len(block.data) > SIZE:
            break
        page += block.data
        answers += block.is_answer
    return page.ljust(SIZE, b"\0"), answers
