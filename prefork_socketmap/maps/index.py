"""A table of keys and values in one file that many processes read, and none has in memory of its own.

A million entries as Python objects cost some 150 MB, and as much again in each worker, since reference counts make
every page its own. Here they are bytes in the page cache, once, however many processes look things up.

The file: a header; entries (key, NUL, value, newline); and one 64-bit number for each, the key's CRC in the upper
half, the entry's place in the file in the lower. The numbers are sorted, and stand where the CRC says, as a share of
the room that there is for them, which is half as much again as they need: or behind those that are in the way. Zeros
stand between them. It is written and read on the same machine, so numbers have the machine's byte order.

Read with pread(2) and not through a mapping: who reads a mapped file that somebody cuts short is killed. Here it is
an error, and so the memory of a table that has been replaced can be given back under those who still have it open.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable
from typing import BinaryIO
from zlib import crc32

TAG_SIZE = 32

_LARGEST = 1 << 32
# So few that each is large enough for malloc(3) to give its room back.
_PARTS = 32
_USUAL = 256  # bytes of most values
# Tag, number of entries, where the numbers begin, how many would have room there, the size of the file.
_HEADER = struct.Struct(f"={TAG_SIZE}sQQQQ")
_NUMBER = 8
_WINDOW = 12  # numbers, of which nearly always one is the right one


class DamagedError(ValueError):
    """The file is no index, or not a whole one, or not any more."""


def write(file: BinaryIO, entries: Iterable[tuple[bytes, bytes]], tag: bytes) -> int:
    """Write an index of *entries*, whose keys have no NUL and whose values no newline; return how many there are.

    Of entries with the same key, the first counts. *tag*: TAG_SIZE bytes, by which a reader recognises what the index
    was built from. Raises ValueError beyond 4 GiB of entries. Takes 8 bytes of memory for an entry.
    """
    # In parts by the first bits of the CRC, which are sorted, written and forgotten one after the other.
    parts = [array("Q") for _ in range(_PARTS)]
    place = file.write(bytes(_HEADER.size))
    count = 0
    for key, value in entries:
        crc = crc32(key)
        parts[crc >> 27].append(crc << 32 | place)
        place += file.write(b"%b\0%b\n" % (key, value))
        count += 1
        if place >= _LARGEST:
            raise ValueError("more than 4 GiB of entries")
    slots = count + count // 2 + 1
    size = place + _NUMBER * _write_numbers(file, parts, slots)
    file.seek(0)
    file.write(_HEADER.pack(tag, count, place, slots, size))
    file.flush()
    return count


def _write_numbers(file: BinaryIO, parts: list[array[int]], slots: int) -> int:
    """Write the numbers in order, emptying *parts*; return how long they are with the zeros between them."""
    written = 0
    parts.reverse()
    while parts:
        spread = array("Q")
        for number in sorted(parts.pop()):
            gap = ((number >> 32) * slots >> 32) - written
            if gap > 0:
                spread.frombytes(bytes(gap * _NUMBER))
                written += gap
            spread.append(number)
            written += 1
        spread.tofile(file)
    rest = max(slots - written, 0) + _WINDOW
    file.write(bytes(rest * _NUMBER))
    return written + rest


class Index:
    """An index file. Takes over *descriptor*. Construction raises DamagedError when the file is not whole."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._count = 0
        try:
            self.tag, self._count, self._numbers, self._slots, size = _HEADER.unpack(self._read(0, _HEADER.size))
            if not self._numbers < size == os.fstat(descriptor).st_size or self._slots >= size:
                raise DamagedError("is no index, or not a whole one")
        except BaseException:
            os.close(descriptor)
            raise

    def __len__(self) -> int:
        return self._count

    def get(self, key: bytes) -> bytes | None:
        """Return the value of *key*, or None. Raises DamagedError when the file is not what it was."""
        crc = crc32(key)
        place = self._numbers + (crc * self._slots >> 32) * _NUMBER
        while True:
            window = os.pread(self._descriptor, _WINDOW * _NUMBER, place)
            if len(window) < _WINDOW * _NUMBER:
                raise DamagedError("has been cut short")
            for number in array("Q", window):
                found = number >> 32
                if not number or found > crc:
                    return None
                if found == crc and (value := self._value(number & (_LARGEST - 1), key)) is not None:
                    return value
            place += _WINDOW * _NUMBER

    def _value(self, place: int, key: bytes) -> bytes | None:
        """Return the value of the entry at *place*, if its key is *key*."""
        begin = len(key) + 1
        length = begin + _USUAL
        while True:
            entry = os.pread(self._descriptor, length, place)
            if entry.startswith(key) and entry[begin - 1 : begin] == b"\0":
                if (end := entry.find(b"\n", begin)) >= 0:
                    return entry[begin:end]
                if len(entry) < length:
                    raise DamagedError("has been cut short")
                length *= 4
            elif entry:
                return None
            else:
                raise DamagedError("has been cut short")

    def _read(self, place: int, length: int) -> bytes:
        found = os.pread(self._descriptor, length, place)
        if len(found) < length:
            raise DamagedError("has been cut short")
        return found

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
