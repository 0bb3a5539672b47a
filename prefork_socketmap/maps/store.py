"""Answers in one file that processes share: a hash table of pages, read without a lock, bounded from the beginning.

Why not a library. LMDB and SQLite have parts of their files mapped that every user can write, so a process whose code
has been captured can kill all others (SIGBUS when it cuts the file), crash them with a broken tree, or hang them with
a lock. Here the file is only ever read and written by pread(2) and pwrite(2), and all that is read is checked:
whoever writes rubbish makes answers be missed, or be wrong, and whoever keeps a lock makes them not be remembered.
What that costs ``python -m tests.bench cache`` tells: 3.6 us for a hit, where a dictionary in each worker takes 1.2,
LMDB 1.1 and SQLite 4.0.

Why nothing is lost, blocked or half written when a process is killed: all that a write changes lies in one page, and
that is written by one call, which the kernel does not interrupt within a page. Whatever crashes more than a process
may leave half a page; so each answer has a checksum. For locks see ``flight``.

    header | outcomes | page of answers | page of answers | ...

The hash of the key, with a secret of the file in it, tells the page. There the latest answers come first, and the
last ones go when there is no room. The hash has in it, too, what the answers depend on (*identity*): answers of a map
that had other settings are not found, grow old, and go. Values that would take too much of a page are in parts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple
from zlib import crc32

from prefork_socketmap.maps import page
from prefork_socketmap.maps.flight import Flight, locked, read
from prefork_socketmap.maps.page import PART, SPREAD, Block, Entry
from prefork_socketmap.socketmap.messages import to_bytes

MEMORY = "cache"
"""The name of stores that have no other (see memfd_create(2))."""
ROOM = 512
"""Bytes for each answer that a store is to have room for: several times what most take, for pages fill unevenly."""
IDENTITY_SIZE = 16
LONGEST_KEY = 1000
"""Bytes. RFC 5321 ends at 256 octets for an address, and who asks longer ones could fill the store."""

_LAYOUT = 1
_MAGIC = b"pfs-memo"
_SALT_SIZE = 16
_HEADER = struct.Struct("<8sII16s")  # magic, layout, number of pages of answers, salt; behind it a checksum
_NUMBER = struct.Struct("<Q")
_NAME_SIZE = struct.Struct("<H")
_PURGES, _COUNT, _IDENTITY, _NAME = 64, 128, 192, 256  # where else something stands in the first page
_LONGEST_NAME = 2048
_OUTCOMES = range(page.SIZE, 5 * page.SIZE)
_FIRST = _OUTCOMES.stop // page.SIZE  # page of answers

# Bytes that do not exist, to be locked: a page's number behind the one, the header the other.
_PAGE_LOCKS, _HEADER_LOCK = 1 << 60, 1 << 61

_OLD = page.SIZE * 3 // 4  # what is found behind that in its page will go soon, unless it is moved to the front
_LARGEST = 1024  # bytes of a value; what is larger is stored in parts
_PART_SIZE = 512
_SHARE = 16  # and it takes no more than so small a part of the whole, so that its parts find room in their pages
_PARTS = struct.Struct("<BBII")  # kind, which of two sets of parts, size and checksum of the value


class Shared(NamedTuple):
    """A store's open file and size, the secret of the file, and what the answers that are asked for depend on."""

    fd: int
    pages: int
    salt: bytes
    identity: bytes


def pages_for(size: int, room: int = 0) -> int:
    """Return how many pages a store has for *size* answers, or for *room* bytes if that is not 0."""
    return max(1, ((room or size * ROOM) + page.SIZE - 1) // page.SIZE)


def file_size(pages: int) -> int:
    """Return the size of a file with so many pages of answers, in bytes."""
    return (_FIRST + pages) * page.SIZE


def create(name: str, pages: int) -> int:
    """Return the descriptor of a new store in memory, whose size nobody can change. Raises OSError."""
    fd = os.memfd_create(MEMORY, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, file_size(pages))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    lay_out(fd, name, pages)
    return fd


def lay_out(fd: int, name: str, pages: int) -> None:
    """Make an empty file of the right size a store. *name* is the map's, for those who look for it."""
    header = _HEADER.pack(_MAGIC, _LAYOUT, pages, os.urandom(_SALT_SIZE))
    os.pwrite(fd, header + _checksum(header), 0)
    text = labelled(name)
    os.pwrite(fd, _NAME_SIZE.pack(len(text)) + text, _NAME)


def shared(fd: int, identity: bytes = b"") -> Shared:
    """Return the store in *fd*. Raises ValueError for a file that is none."""
    data = read(fd, _HEADER.size + 4, 0)
    header = data[: _HEADER.size]
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError("is no cache")
    _, layout, pages, salt = _HEADER.unpack(header)
    if layout != _LAYOUT:
        raise ValueError(f"is a cache of another layout: {layout}, not {_LAYOUT}")
    if data[_HEADER.size :] != _checksum(header) or not pages or os.fstat(fd).st_size < file_size(pages):
        raise ValueError("is a cache that is damaged")
    return Shared(fd, pages, salt, identity)


def labelled(name: str) -> bytes:
    """Return how the name of a map is noted in its store: in UTF-8, cut off if it is very long."""
    return to_bytes(name)[:_LONGEST_NAME]


def label(fd: int) -> bytes:
    """Return the name of the map that a store was made for, as it is noted."""
    text = read(fd, _NAME_SIZE.size + _LONGEST_NAME, _NAME).ljust(_NAME_SIZE.size, b"\0")
    return text[_NAME_SIZE.size : _NAME_SIZE.size + _NAME_SIZE.unpack_from(text)[0]]


def publish(shared: Shared) -> None:
    """Note in the file what the answers that are given depend on: IDENTITY_SIZE bytes."""
    os.pwrite(shared.fd, shared.identity, _IDENTITY)


def published(fd: int) -> bytes:
    """Return what ``publish`` has noted last; nothing if it never has."""
    identity = read(fd, IDENTITY_SIZE, _IDENTITY)
    return identity if any(identity) else b""


def _checksum(data: bytes) -> bytes:
    return crc32(data).to_bytes(4, "little")


class Store:
    """The answers in an open file that depend on one identity. The file remains the caller's to close.

    What cannot be read, or is not whole, is not there; what cannot be written is an OSError.
    """

    def __init__(self, shared: Shared) -> None:
        import hashlib  # not above: this file is read by the master, too, which has no use for that

        self._fd = shared.fd
        self.pages = shared.pages
        self._hash = hashlib.blake2b(digest_size=page.TAG_SIZE, key=shared.salt + shared.identity)

    def get(self, key: bytes) -> Entry | None:
        """Return what stands at *key*, however old it is."""
        # The way of every hit: written out.
        hashed = self._hash.copy()
        hashed.update(key)
        tag = hashed.digest()
        place = (_FIRST + int.from_bytes(tag[:8], "little") % self.pages) * page.SIZE
        try:
            data = os.pread(self._fd, page.SIZE, place)
        except OSError:
            return None
        at = data.find(tag)
        if at < 0:
            return None
        found = page.unpack(data, at)
        if found is None or found[0] != key:
            return None
        if at > _OLD:
            self._renew(place, tag)
        return found[1] if found[1].kind != SPREAD else self._gather(tag, found[1])

    def put(self, key: bytes, entry: Entry, purges: int) -> bool:
        """Let *entry* stand at *key*, unless ``purges`` is no longer what it was; return whether it does.

        It does not, either, when it is too large, or when somebody keeps others from writing.
        """
        if len(key) > LONGEST_KEY:
            return False
        tag = self._tag(key)
        if len(entry.value) > _LARGEST:
            whole = self._spread(tag, entry)
            if whole is None:
                return False
            entry = whole
        return self._insert(page.pack(tag, key, entry), entry.stored, purges)

    def remove(self, key: bytes) -> bool:
        """Remove what stands at *key*; return whether anything did. Raises OSError when that is not possible."""
        self._add(_PURGES, 1)
        tag = self._tag(key)
        return self._remove(self._place(tag), lambda block: block.tag == tag) > 0

    def clear(self) -> int:
        """Remove everything, of any identity; return how many answers. Raises OSError when that is not possible."""
        self._add(_PURGES, 1)
        return sum(self._remove(place, lambda _: True) for place in self._places())

    def __iter__(self) -> Iterator[tuple[bytes, Entry]]:
        """Iterate over what stands there, as key and entry."""
        for place in self._places():
            for block in page.split(read(self._fd, page.SIZE, place)):
                found = page.unpack(block.data, 0)
                if found and found[1].kind != PART and self._tag(found[0]) == block.tag:
                    key, entry, _ = found
                    whole = entry if entry.kind != SPREAD else self._gather(block.tag, entry)
                    if whole:
                        yield key, whole

    @property
    def answers(self) -> int:
        """About how many answers there are, of any identity and age."""
        return self._number(_COUNT)

    @property
    def purges(self) -> int:
        """How often anything was removed by request: what was asked for before may be what was to be forgotten."""
        return self._number(_PURGES)

    def flight(self, key: bytes) -> Flight:
        """Return what lets one process at a time ask for *key*."""
        return Flight(self._fd, self._tag(key), _OUTCOMES)

    # Pages.

    def _tag(self, key: bytes) -> bytes:
        hashed = self._hash.copy()
        hashed.update(key)
        return hashed.digest()

    def _place(self, tag: bytes) -> int:
        return (_FIRST + int.from_bytes(tag[:8], "little") % self.pages) * page.SIZE

    def _places(self) -> range:
        return range(_FIRST * page.SIZE, file_size(self.pages), page.SIZE)

    def _insert(self, new: Block, now: float, purges: int) -> bool:
        def change(blocks: list[Block]) -> list[Block] | None:
            if purges != self.purges:
                return None
            return [new, *(each for each in blocks if each.tag != new.tag and each.kept_until > now)]

        return self._rewrite(self._place(new.tag), change) is not None

    def _renew(self, place: int, tag: bytes) -> None:
        """Move an entry to the front of its page, if that is possible at once."""
        with contextlib.suppress(OSError):
            self._rewrite(place, lambda blocks: sorted(blocks, key=lambda block: block.tag != tag), wait=False)

    def _remove(self, place: int, is_meant: Callable[[Block], bool]) -> int:
        """Remove from a page the entries that are meant; return how many answers that were."""
        removed = self._rewrite(place, lambda blocks: [each for each in blocks if not is_meant(each)])
        if removed is None:
            raise OSError(errno.EDEADLK, "a process keeps others from writing to the cache")
        return removed

    def _rewrite(
        self, place: int, change: Callable[[list[Block]], list[Block] | None], *, wait: bool = True
    ) -> int | None:
        """Let *change* make new entries of those in a page; return how many answers fewer there are.

        None: it has returned None, or somebody keeps others from writing there.
        """
        with locked(self._fd, _PAGE_LOCKS + place, wait=wait) as is_ours:
            if not is_ours:
                return None
            old = page.split(read(self._fd, page.SIZE, place))
            new = change(old)
            if new is None:
                return None
            data, answers = page.join(new)
            os.pwrite(self._fd, data, place)
        fewer = sum(each.is_answer for each in old) - answers
        if fewer:
            self._add(_COUNT, -fewer)
        return fewer

    # Numbers in the first page.

    def _number(self, place: int) -> int:
        number: int = _NUMBER.unpack(read(self._fd, _NUMBER.size, place).ljust(_NUMBER.size, b"\0"))[0]
        return number

    def _add(self, place: int, difference: int) -> None:
        with locked(self._fd, _HEADER_LOCK):
            number = max(self._number(place) + difference, 0) & (1 << 63) - 1
            os.pwrite(self._fd, _NUMBER.pack(number), place)

    # Values that would take too much of a page.

    def _spread(self, tag: bytes, entry: Entry) -> Entry | None:
        """Store the value of *entry* in parts; return an entry that tells of them, None if there is no room."""
        value = entry.value
        if len(value) * _SHARE > self.pages * page.SIZE:
            return None
        # Two sets take turns: whoever gathers the parts of the one finds them whole while the other is written.
        before = self._entry(tag)
        which = 1 if before and before.kind == SPREAD and before.value[1:2] == b"\0" else 0
        for number, begin in enumerate(range(0, len(value), _PART_SIZE)):
            part = entry._replace(kind=PART, value=value[begin : begin + _PART_SIZE])
            if not self._insert(page.pack(self._part_tag(tag, which, number), b"", part), entry.stored, self.purges):
                return None
        return entry._replace(kind=SPREAD, value=_PARTS.pack(entry.kind, which, len(value), crc32(value)))

    def _gather(self, tag: bytes, entry: Entry) -> Entry | None:
        """Return the entry whose value is in parts; None when they are not all there."""
        if len(entry.value) != _PARTS.size:
            return None
        kind, which, size, checksum = _PARTS.unpack(entry.value)
        value = b""
        for number in range((min(size, self.pages * page.SIZE) + _PART_SIZE - 1) // _PART_SIZE):
            part = self._entry(self._part_tag(tag, which, number))
            if part is None or part.kind != PART:
                return None
            value += part.value
        return entry._replace(kind=kind, value=value) if crc32(value) == checksum else None

    def _entry(self, tag: bytes) -> Entry | None:
        data = read(self._fd, page.SIZE, self._place(tag))
        at = data.find(tag)
        found = page.unpack(data, at) if at >= 0 else None
        return found[1] if found else None

    def _part_tag(self, tag: bytes, which: int, number: int) -> bytes:
        return self._tag(b"%b %d %d" % (tag, which, number))
