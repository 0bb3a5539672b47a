"""A text file as a table that processes share: read by one of them beside the lookups, looked up by all.

What is read is written as an index (``index``) into a private directory. When a lookup finds that the text file has
changed, its process forks a reader, and goes on with the table that it has. So do the others, until the new index is
whole and takes the place of the old one, whose room is given back at once, whoever still has it open. One reader at a
time is at work in a directory: it holds a lock, which ends with it, however it ends.

A file that cannot be read or parsed, or that somebody is writing, changes nothing. The reader says why, once, and
leaves a note of it for the others.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import logging
import os
import signal
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from setproctitle import setproctitle

from prefork_socketmap.maps import filestate, textfile
from prefork_socketmap.maps.base import reason
from prefork_socketmap.maps.index import TAG_SIZE, DamagedError, Index, write
from prefork_socketmap.socketmap.messages import to_bytes, to_text

log = logging.getLogger("prefork_socketmap.worker.maps")

# Seconds between two looks for an index that is in the making, and until a file is read again that could not be.
_LOOK = 0.01
_PAUSE = 5.0
# Seconds that a reader may live: it holds the lock.
_LONGEST = 600
_LOWEST_PRIORITY = 19
# Signals that end a reader. Workers ignore what is for their master.
_ENDS = (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class NoTableError(Exception):
    """The table is gone, and will be read again."""


class _Failure(NamedTuple):
    """A note that a reader has left: why the state *tag* of the file is not the table."""

    tag: bytes = b""
    is_final: bool = False
    """Whether to read it again would change nothing."""
    text: str = ""


class SharedTable:
    """The table in the text file *source*, its keys folded if *fold*; its index is kept in *directory*."""

    problem: Exception | None = None
    """Why ``open`` has opened an earlier table than that of the file as it was then."""

    def __init__(self, source: Path, directory: Path, *, fold: bool) -> None:
        self._source = source
        self._path = os.fspath(source)
        self._directory = directory
        self._fold = fold
        # The name tells which file this is an index of, and in which form; its tag tells which state of that file.
        name = hashlib.sha256(b"2 %b %d" % (os.fsencode(source.absolute()), fold)).hexdigest()
        self._index_path = directory / name
        self._new_path = directory / f"{name}.new"
        self._failure_path = directory / f"{name}.failed"
        self._index: Index | None = None
        # States of the file that need no reading: the table's, and one that cannot be read.
        self._tags: tuple[bytes, ...] = ()
        self._next_look = 0.0
        self._reader = 0

    def open(self) -> None:
        """Open the table of the file as it is now, which is read here if nobody has.

        When that is not possible, but an earlier table is there, that one is opened. Otherwise raises OSError, for a
        file that cannot be read or an index that cannot be written, or ValueError, for one that cannot be parsed.
        """
        make_private(self._directory)
        self.problem = None
        self._adopt(self._existing())
        # When there is a table, who starts beside a reader need not wait for it.
        with _locked(self._directory, wait=self._index is None) as is_ours:
            if is_ours:
                try:
                    self._catch_up()
                except (OSError, ValueError) as error:
                    self.problem = error
                self._adopt(self._existing())
        if self._index is None:
            raise self.problem or OSError("its index has vanished")

    def close(self) -> None:
        """Close the table, and stop reading."""
        if self._reader:
            os.kill(self._reader, signal.SIGKILL)
            os.waitpid(self._reader, 0)
            self._reader = 0
        self._adopt(None)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of *key*, or None. Raises NoTableError."""
        try:
            if self._index is not None:
                return self._index.get(key)
        except DamagedError:
            pass  # as a rule, since a new one has taken its place
        self._adopt(self._existing())
        try:
            if self._index is not None:
                return self._index.get(key)
        except DamagedError:
            self._index_path.unlink(missing_ok=True)
            self._adopt(None)
        raise NoTableError

    def refresh(self) -> None:
        """Go on to the table of the file as it is now, if that has been read; otherwise have it read. Never waits.

        Raises OSError when there is no file, or nobody can be told to read it.
        """
        tag = filestate.tag(os.stat(self._path))  # noqa: PTH116 - in half the time of Path.stat
        if tag not in self._tags:
            self._follow(tag)

    def _follow(self, tag: bytes) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK
        try:
            if not (self._is_reading() or self._is_settled(tag)):
                self._have_it_read(tag)
        except OSError:
            self._next_look = now + _PAUSE
            raise

    def _is_settled(self, tag: bytes) -> bool:
        """Take what others have read; return whether there is nothing more to read, for now at least."""
        index = self._existing()
        if index is not None:
            self._adopt(index)
            if index.tag == tag:
                return True
        failure, age = self._failure()
        if failure.tag != tag:
            return False
        if failure.is_final:
            self._tags += (tag,)
        return failure.is_final or 0 <= age < _PAUSE

    def _have_it_read(self, tag: bytes) -> None:
        # Again and again, since those who tidy /tmp may have removed it.
        make_private(self._directory)
        with _locked(self._directory, wait=False) as is_ours:
            # Again, for the reader before may have come to its end only now.
            if is_ours and not self._is_settled(tag):
                self._reader = os.fork()
                if not self._reader:
                    self._be_reader()

    def _is_reading(self) -> bool:
        """Whether a reader that this process has forked is at work."""
        if not self._reader:
            return False
        pid, status = os.waitpid(self._reader, os.WNOHANG)
        if not pid:
            return True
        self._reader = 0
        if os.WIFSIGNALED(status):
            log.error("%s: its reader was ended by signal %d", self._source, os.WTERMSIG(status))
        return False

    # Whoever reads holds the lock: a process that opens the table, or a reader, which does nothing else.

    def _be_reader(self) -> NoReturn:
        """In a process that was forked off: read, and never return."""
        try:
            for number in _ENDS:
                signal.signal(number, signal.SIG_DFL)
            signal.alarm(_LONGEST)
            setproctitle(f"prefork-socketmap: reader of {self._path}")
            os.nice(_LOWEST_PRIORITY)
            gc.disable()  # it would write to pages that are the worker's, too
            before, _ = self._failure()
            try:
                self._read(filestate.left_alone)
            except (OSError, ValueError) as error:
                if self._failure()[0] != before:
                    log.error("%s: %s; the table stays as it was", self._source, reason(error))
        except BaseException:
            log.exception("%s: its reader gives up", self._source)
        finally:
            logging.shutdown()
            os._exit(0)

    def _catch_up(self) -> None:
        tag = filestate.tag(self._source.stat())
        if self._index is not None:
            if self._index.tag == tag:
                return
            failure, _ = self._failure()
            if failure.tag == tag and failure.is_final:
                raise ValueError(failure.text)
        self._read(filestate.settled)

    def _read(self, wait: Callable[[int], os.stat_result]) -> None:
        """Write the index of the file, once *wait* tells its state. Raises OSError or ValueError."""
        tag = filestate.tag(self._source.stat())
        self._note(_Failure(tag, False, "its reader was killed"))
        try:
            with filestate.open_regular(self._source) as lines:
                tag = filestate.tag(wait(lines.fileno()))
                self._write(lines, tag)
        except (OSError, ValueError) as error:
            self._new_path.unlink(missing_ok=True)
            self._note(_Failure(tag, not isinstance(error, OSError), reason(error)))
            raise
        self._failure_path.unlink(missing_ok=True)

    def _write(self, lines: BinaryIO, tag: bytes) -> None:
        begin = time.monotonic()
        with open(self._new_path, "wb", opener=_private) as file:
            try:
                count = write(file, self._entries(lines), tag)
            finally:
                # Before any other verdict on what was read.
                filestate.refuse_change(lines, tag)
        try:
            old = os.open(self._index_path, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._new_path.replace(self._index_path)
        else:
            self._new_path.replace(self._index_path)
            os.truncate(old, 0)
            os.close(old)
        log.info("%s: %d entries read in %.1f s", self._source, count, time.monotonic() - begin)

    def _entries(self, lines: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
        for key, value in textfile.entries(lines):
            yield to_bytes(to_text(key).casefold()) if self._fold else key, value

    # What is in the directory.

    def _existing(self) -> Index | None:
        try:
            return Index(os.open(self._index_path, os.O_RDONLY | os.O_CLOEXEC))
        except (OSError, DamagedError):
            return None

    def _adopt(self, index: Index | None) -> None:
        if self._index is not None:
            self._index.close()
        self._index = index
        self._tags = () if index is None else (index.tag,)

    def _failure(self) -> tuple[_Failure, float]:
        """Return the last reader's note, if it has left one, and its age in seconds."""
        try:
            with self._failure_path.open("rb") as file:
                age = time.time() - os.fstat(file.fileno()).st_mtime
                note = file.read()
        except OSError:
            return _Failure(), 0.0
        return _Failure(note[:TAG_SIZE], note[TAG_SIZE : TAG_SIZE + 1] == b"1", to_text(note[TAG_SIZE + 1 :])), age

    def _note(self, failure: _Failure) -> None:
        with contextlib.suppress(OSError), open(self._failure_path, "wb", opener=_private) as file:
            file.write(b"%b%d%b" % (failure.tag, failure.is_final, to_bytes(failure.text)))


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
