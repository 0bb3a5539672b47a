"""A text file as a table that processes share: read once, looked up by all, read again when it changes.

The process that first needs the table writes it as an index (``index``) into a private directory; the others map that
file. When the text file changes, the process that notices first writes the next index; the others go on with the one
they have until it is there. A file that cannot be read or parsed changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from prefork_socketmap.maps import filestate, textfile
from prefork_socketmap.maps.index import Index, write
from prefork_socketmap.socketmap.messages import to_bytes, to_text

log = logging.getLogger("prefork_socketmap.worker.maps")


class SharedTable:
    """The table in the text file *source*, its keys folded if *fold*; its index is kept in *directory*."""

    def __init__(self, source: Path, directory: Path, *, fold: bool) -> None:
        self._source = source
        self._directory = directory
        self._fold = fold
        # The name tells which file this is an index of; its tag tells which state of that file.
        name = hashlib.sha256(b"%b %d" % (os.fsencode(source.absolute()), fold)).hexdigest()
        self._index_path = directory / name
        self._index: Index | None = None
        # Tag of a file that did not parse: reading it again would not change that.
        self._refused: bytes | None = None

    def get(self, key: bytes) -> bytes | None:
        """Return the value of *key* as of the last ``refresh``, or None."""
        return None if self._index is None else self._index.get(key)

    def close(self) -> None:
        """Unmap the index."""
        if self._index is not None:
            self._index.close()
        self._index = self._refused = None

    def refresh(self, *, wait: bool) -> None:
        """Follow the file to what it is now. If another process is reading it, *wait* for that or change nothing.

        The table stays as it was when this raises OSError, for a file that cannot be read or an index that cannot be
        written, or ValueError, once for each state of a file that cannot be parsed.
        """
        tag = filestate.tag(self._source.stat())
        if tag == self._refused or (self._index is not None and tag == self._index.tag):
            return
        # Again and again, since those who tidy /tmp may have removed it.
        make_private(self._directory)
        with _locked(self._directory, wait=wait) as is_ours:
            if not is_ours:
                return
            index = self._existing(tag)
            if index is None:
                index = self._written()
        self.close()
        self._index = index

    def _existing(self, tag: bytes) -> Index | None:
        try:
            index = Index(self._index_path)
        except (OSError, ValueError):
            return None
        if index.tag == tag:
            return index
        index.close()
        return None

    def _written(self) -> Index:
        """Write the index of the file; the caller holds the lock."""
        begin = time.monotonic()
        for left_by_the_killed in self._directory.glob(f"{self._index_path.name}.*"):
            left_by_the_killed.unlink()
        new = self._index_path.with_suffix(f".{os.getpid()}")
        with self._source.open("rb") as lines:
            tag = filestate.tag(filestate.settled(lines.fileno()))
            try:
                with open(new, "xb", opener=_private) as file:
                    write(file, self._entries(lines), tag)
                new.replace(self._index_path)
            except ValueError:
                self._refused = tag
                raise
            finally:
                new.unlink(missing_ok=True)
        index = Index(self._index_path)
        log.info("%s: %d entries read in %.1f s", self._source, len(index), time.monotonic() - begin)
        return index

    def _entries(self, lines: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
        for key, value in textfile.entries(lines):
            yield to_bytes(to_text(key).casefold()) if self._fold else key, value


def make_private(directory: Path) -> None:
    """Make *directory*, if need be. Raises OSError when it is not ours, or others may write there.

    Whoever can write there decides what the tables answer.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"it must be a directory of user {os.geteuid()}, and nobody else may write there")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextlib.contextmanager
def _locked(directory: Path, *, wait: bool) -> Iterator[bool]:
    """Lock *directory* against other processes; yield whether it is locked, which it always is after a *wait*.

    The directory itself: a lock file could be removed under its users, by those who tidy /tmp.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
