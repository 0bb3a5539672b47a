"""A page of answers, as bytes: entries one behind the other, the latest first, then zeros.

What is read may have been written by anybody, or half of it: no bytes are a reason to fail.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple
from zlib import crc32

SIZE = 4096
TAG_SIZE = 16
SPREAD, PART = 254, 255
"""Kinds of entries: a value in parts, and a part of one."""

_HEADER = struct.Struct("<16sIHHBddd")  # tag, checksum of what follows, sizes of key and value, kind, times
_CHECKED = TAG_SIZE + 4  # from here on the checksum is taken
_SUMMARY = struct.Struct("<HHB16xd")  # what stands there: sizes, kind, the last of the times
_END = bytes(TAG_SIZE)


class Entry(NamedTuple):
    """What stands at a key. Kinds below 254 are the caller's business. Times are in seconds since the epoch."""

    kind: int
    value: bytes
    stored: float
    fresh_until: float
    kept_until: float


class Block(NamedTuple):
    """An entry as it stands in a page, with what is to be known to keep a page in order."""

    tag: bytes
    data: bytes
    kind: int
    kept_until: float

    @property
    def is_answer(self) -> bool:
        """Whether it is no part of another one."""
        return self.kind != PART


def pack(tag: bytes, key: bytes, entry: Entry) -> Block:
    """Return *entry* as it will stand in a page."""
    kind, value, *times = entry
    rest = _HEADER.pack(tag, 0, len(key), len(value), kind, *times)[_CHECKED:] + key + value
    return Block(tag, tag + crc32(rest).to_bytes(4, "little") + rest, kind, entry.kept_until)


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


def split(page: bytes) -> list[Block]:
    """Return what stands in *page*, as far as one can tell at a glance: whether it is whole, ``unpack`` tells."""
    blocks = []
    begin = 0
    while begin + _HEADER.size <= len(page) and (tag := page[begin : begin + TAG_SIZE]) != _END:
        key_size, value_size, kind, kept_until = _SUMMARY.unpack_from(page, begin + _CHECKED)
        end = begin + _HEADER.size + key_size + value_size
        if end > len(page):
            break
        blocks.append(Block(tag, page[begin:end], kind, kept_until))
        begin = end
    return blocks


def join(blocks: Iterable[Block]) -> tuple[bytes, int]:
    """Return a page of the first of *blocks*, as many as it has room for, and how many answers are in it."""
    kept: list[bytes] = []
    room = SIZE
    answers = 0
    for block in blocks:
        room -= len(block.data)
        if room < 0:
            break
        kept.append(block.data)
        answers += block.kind != PART
    return b"".join(kept).ljust(SIZE, b"\0"), answers
