"""The type ``file``: a text file of ``key value`` lines, reread when it changes, held in memory once for all workers.

The worker that first needs a table writes it as an index (``index``) into a directory that only its user can enter;
the others map that file. When the text file changes, the worker that notices first writes the next index; the others
go on with the one they have until it is there. A file that cannot be read or parsed changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from prefork_socketmap import settings
from prefork_socketmap.maps import textfile
from prefork_socketmap.maps.base import Map, log
from prefork_socketmap.maps.index import Index, write
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.socketmap.messages import to_bytes, to_text

# File times advance with the kernel's tick, at most 10 ms: a file younger than that may change once more and look the
# same.
_TICK = 0.02


class FileMap(Map):
    """Answers with the value of the line that begins with the key."""

    path = setting(settings.text)
    """The text file, in the format of postmap(1)."""
    index_dir = setting(settings.text, None)
    """Directory for indexes, made if need be; it must belong to the workers' user, and nobody else may write there.
    Default: ``prefork-socketmap-UID`` in the directory for temporary files."""

    _index: Index | None = None
    _refused: bytes | None = None
    """Tag of a file that did not parse: reading it again would not change that."""

    def prepare(self) -> None:
        """Map the index, writing it first if nobody has. Raises SettingError when that is not possible."""
        self._file = self.base / self.path
        self._directory = self._private_directory()
        # The name tells which file this is an index of, its tag, which state of that file.
        name = hashlib.sha256(b"%b %d" % (os.fsencode(self._file.absolute()), self.fold)).hexdigest()
        self._index_path = self._directory / name
        try:
            self._update(wait=True)
        except (OSError, ValueError) as error:
            raise settings.SettingError(f"maps.{self.name}.path", f"{self._file}: {error}") from error

    def release(self) -> None:
        """Unmap the index."""
        if self._index is not None:
            self._index.close()
        self._index = self._refused = None

    def find(self, key: str) -> Sequence[str] | None:
        """Return the value at *key*, of the file as it is now."""
        try:
            self._update(wait=False)
        except (OSError, ValueError) as error:
            self.complaints.log(logging.ERROR, "%s: %s; the table stays as it was", self._file, error)
        value = None if self._index is None else self._index.get(to_bytes(key))
        return None if value is None else (to_text(value),)

    def _update(self, *, wait: bool) -> None:
        """Map an index of the file as it is now; if another process is writing one, *wait* for it or change nothing.

        Raises OSError or ValueError when the file cannot be read, or the index not be written.
        """
        tag = _tag(self._file.stat())
        if tag == self._refused or (self._index is not None and tag == self._index.tag):
            return
        with _locked(self._directory, wait=wait) as is_ours:
            if not is_ours:
                return
            index = self._existing(tag)
            if index is None:
                index = self._written()
        self.release()
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
        with self._file.open("rb") as lines:
            tag = _tag(_settled(lines.fileno()))
            new = self._index_path.with_suffix(f".{os.getpid()}")
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
        log.info("map %s: %d entries read in %.1f s", self.name, len(index), time.monotonic() - begin)
        return index

    def _entries(self, lines: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
        for key, value in textfile.entries(lines):
            yield to_bytes(to_text(key).casefold()) if self.fold else key, value

    def _private_directory(self) -> Path:
        if self.index_dir is None:
            directory = Path(tempfile.gettempdir(), f"prefork-socketmap-{os.geteuid()}")
        else:
            directory = self.base / self.index_dir
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            status = directory.lstat()
        except OSError as error:
            raise settings.SettingError(f"maps.{self.name}.index_dir", str(error)) from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            # Whoever can write there decides what this map answers.
            problem = f"{directory} must be a directory of user {os.geteuid()}, and nobody else may write there"
            raise settings.SettingError(f"maps.{self.name}.index_dir", problem)
        return directory


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _tag(status: os.stat_result) -> bytes:
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return hashlib.sha256(repr(identity).encode()).digest()


def _settled(descriptor: int) -> os.stat_result:
    """Return the file's status once its next change will show in it."""
    age = time.time() - os.fstat(descriptor).st_mtime
    if 0 <= age < _TICK:
        time.sleep(_TICK - age)
    return os.fstat(descriptor)


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
