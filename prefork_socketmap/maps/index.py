"""A table of keys and values in one file that many processes read, and none has in memory of its own.

A million entries as Python objects cost some 150 MB, and as much again in each worker, since reference counts make
every page its own. Here they are bytes in the page cache, once, however many processes look things up.

The file: a header; entries (key, NUL, value, newline); one 64-bit number for each, sorted: the CRC of the key in the
upper half, the entry's place in the file in the lower; and a directory: for each value of the CRC's first bits where
its numbers begin, four or so. It is written and read on the same machine, so numbers have the machine's byte order.

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
# Tag, number of entries, bits of the CRC that the directory goes by, where the numbers begin, the size of the file.
_HEADER = struct.Struct(f"={TAG_SIZE}sQQQQ")
_NUMBER = 8
_PAIR = struct.Struct("=II")


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
    bits = max(count.bit_length() - 3, 0)
    directory = _write_numbers(file, parts, bits)
    directory.tofile(file)
    size = place + count * _NUMBER + len(directory) * directory.itemsize
    file.seek(0)
    file.write(_HEADER.pack(tag, count, bits, place, size))
    file.flush()
    return count


def _write_numbers(file: BinaryIO, parts: list[array[int]], bits: int) -> array[int]:
    """Write the numbers in order, emptying *parts*; return the directory."""
    directory = array("I", bytes(4 * ((1 << bits) + 1)))
    shift = 64 - bits
    bucket = written = 0
    parts.reverse()
    while parts:
        numbers = array("Q", sorted(parts.pop()))
        for number in numbers:
            while bucket < number >> shift:
                bucket += 1
                directory[bucket] = written
            written += 1
        numbers.tofile(file)
    while bucket < 1 << bits:
        bucket += 1
        directory[bucket] = written
    return directory


class Index:
    """An index file. Takes over *descriptor*. Construction raises DamagedError when the file is not whole."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._count = 0
        try:
            self.tag, self._count, bits, self._numbers, size = _HEADER.unpack(self._read(0, _HEADER.size))
            self._directory = self._numbers + self._count * _NUMBER
            self._shift = 32 - bits
            if bits > 32 or size != self._directory + 4 * ((1 << bits) + 1) or size != os.fstat(descriptor).st_size:
                raise DamagedError("is no index, or not a whole one")
        except BaseException:
            os.close(descriptor)
            raise

    def __len__(self) -> int:
        return self._count

    def get(self, key: bytes) -> bytes | None:
        """Return the value of *key*, or None. Raises DamagedError when the file is not what it was."""
        crc = crc32(key)
        first, end = _PAIR.unpack(self._read(self._directory + 4 * (crc >> self._shift), _PAIR.size))
        if not first <= end <= self._count:
            raise DamagedError("is damaged")
        if first < end:
            for number in array("Q", self._read(self._numbers + first * _NUMBER, (end - first) * _NUMBER)):
                if number >> 32 == crc and (value := self._value(number & (_LARGEST - 1), key)) is not None:
                    return value
        return None

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
