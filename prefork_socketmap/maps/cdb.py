"""The type ``cdb``: a constant database, as postmap(1) makes one, read without a library: it is two hash tables.

The format (D. J. Bernstein, "cdb"): 256 pairs of numbers, place and length of a hash table; the records, each the
lengths of key and value and then the two; the hash tables, each entry a hash and the place of a record. All numbers
have 32 bits, the lowest first.

Read with pread(2) and not through a mapping: a worker that reads a mapped file which somebody cuts short is killed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from prefork_socketmap.maps.watched import WatchedFileMap
from prefork_socketmap.socketmap.messages import to_bytes, to_text

_PAIR = struct.Struct("<LL")
_HEADER = struct.Struct("<512L")
_MASK = 0xFFFFFFFF


class Cdb:
    """An open database; takes over *descriptor*. Construction raises ValueError when it is not whole."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        numbers = _HEADER.unpack(self._read(0, _HEADER.size))
        self._tables = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        if any(place + length * _PAIR.size > self._size for place, length in self._tables):
            raise ValueError("is no cdb file, or not a whole one")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def get(self, key: bytes) -> bytes | None:
        """Return the first value of *key*, or None. Raises ValueError when the file is damaged."""
        hashed = _hash(key)
        for record in self._records(hashed):
            key_length, value_length = _PAIR.unpack(self._read(record, _PAIR.size))
            if key_length == len(key) and self._read(record + _PAIR.size, key_length) == key:
                return self._read(record + _PAIR.size + key_length, value_length)
        return None

    def _records(self, hashed: int) -> Iterator[int]:
        """Iterate over the places of the records whose keys have that hash."""
        place, length = self._tables[hashed & 0xFF]
        for number in range(length):
            slot = place + _PAIR.size * (((hashed >> 8) + number) % length)
            found, record = _PAIR.unpack(self._read(slot, _PAIR.size))
            if not record:
                return
            if found == hashed:
                yield record

    def _read(self, place: int, length: int) -> bytes:
        if place + length > self._size:
            raise ValueError("is no cdb file, or not a whole one")
        found = os.pread(self._descriptor, length, place)
        if len(found) < length:
            raise ValueError("has been cut short")
        return found


def _hash(key: bytes) -> int:
    value = 5381
    for byte in key:
        value = (value * 33 & _MASK) ^ byte
    return value


class CdbMap(WatchedFileMap[Cdb]):
    """Answers with the value of the key in a database file."""

    is_text = False

    def read(self, file: BinaryIO) -> Cdb:
        """Open the database."""
        descriptor = os.dup(file.fileno())
        try:
            return Cdb(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def dispose(self, content: Cdb) -> None:
        """Close the database."""
        content.close()

    def find(self, key: str) -> Sequence[str] | None:
        """Return the value at *key*."""
        database = self.content()
        asked = to_bytes(key)
        # Which of the two is there depends on how postmap was built.
        if (value := database.get(asked)) is not None:
            return (to_text(value),)
        if (value := database.get(asked + b"\0")) is not None:
            return (to_text(value.removesuffix(b"\0")),)
        return None
