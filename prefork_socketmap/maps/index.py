"""A table of keys and values in one read-only file that is mapped into memory, so that processes share it.

A million entries as Python objects cost some 150 MB, and as much again in each worker, since reference counts make
every page its own. Here they are bytes in the page cache, once, however many processes look things up.

The file: entries (key, NUL, value, newline), then one 64-bit number for each, sorted: the CRC of the key in the upper
half, the entry's place in the file in the lower; then how many there are, and a tag by which the reader recognises
what it was built from. It is written and read on the same machine, so numbers have the machine's byte order.
"""

from __future__ import annotations

import bisect
import mmap
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

_LARGEST = 1 << 32
_NUMBER = 8
TAG_SIZE = 32


def write(file: BinaryIO, entries: Iterable[tuple[bytes, bytes]], tag: bytes) -> None:
    """Write an index of *entries*, whose keys have no NUL and whose values no newline.

    Of entries with the same key, the first counts. *tag*: TAG_SIZE bytes. Raises ValueError beyond 4 GiB of entries.
    """
    places = array("Q")
    place = 0
    for key, value in entries:
        places.append(crc32(key) << 32 | place)
        place += file.write(b"%b\0%b\n" % (key, value))
        if place >= _LARGEST:
            raise ValueError("more than 4 GiB of entries")
    array("Q", sorted(places)).tofile(file)
    array("Q", [len(places)]).tofile(file)
    file.write(tag)


class Index:
    """An index file, open. Raises OSError when there is none, ValueError when it is not whole."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._bytes = memoryview(self._map)
        end = len(self._map) - TAG_SIZE - _NUMBER
        self.tag = bytes(self._bytes[-TAG_SIZE:])
        count = int.from_bytes(self._bytes[max(end, 0) : end + _NUMBER], sys.byteorder)
        if end < 0 or count * _NUMBER > end:
            raise ValueError(f"{path} is no index")
        self._places = self._bytes[end - count * _NUMBER : end].cast("Q")

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of *key*, or None."""
        crc = crc32(key)
        entry = key + b"\0"
        for i in range(bisect.bisect_left(self._places, crc << 32), len(self._places)):
            place = self._places[i]
            if place >> 32 != crc:
                break
            value = (place & (_LARGEST - 1)) + len(entry)
            if self._bytes[value - len(entry) : value] == entry:
                return self._map[value : self._map.find(b"\n", value)]
        return None

    def close(self) -> None:
        """Unmap the file."""
        self._places.release()
        self._bytes.release()
        self._map.close()
