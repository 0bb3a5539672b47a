"""The files of caches that outlive the server (``cache_file``): opened, made, and put aside when they are no use.

No link is followed, and what belongs to somebody else is not used; that nobody else can exchange the file has been
seen to (``trust``). What is in the file was written by workers: it is not read here but for its header.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from prefork_socketmap.daemon import newfile
from prefork_socketmap.maps import store
from prefork_socketmap.maps.store import Shared

log = logging.getLogger("prefork_socketmap.master")

_MODE = 0o600


def open_existing(path: Path) -> Shared:
    """Open the cache at *path*. Raises OSError, FileNotFoundError for none, or ValueError for what is no cache."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        found = store.shared(fd)
        undo.pop_all()
    return found


def open_or_make(path: Path, name: str, pages: int, pending: contextlib.ExitStack) -> Shared:
    """Return the cache of *pages* pages at *path*, for the map *name*.

    A new one takes the place of what is there when *pending* is closed. A file that is no cache is put aside. Raises
    OSError.
    """
    try:
        found = open_existing(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        aside = path.with_name(f"{path.name}.bad")
        path.replace(aside)
        log.warning("%s %s: it is put aside, as %s, and the map begins with nothing", path, error, aside.name)
    else:
        status = os.fstat(found.fd)
        if status.st_uid == os.geteuid() and found.pages == pages:
            os.fchmod(found.fd, _MODE)
            os.ftruncate(found.fd, store.file_size(pages))
            return found
        os.close(found.fd)
        if status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"it belongs to user {status.st_uid}")
        log.info("%s has another size than the map's cache is to have now: the map begins with nothing", path)
    return _make(path, name, pages, pending)


def _make(path: Path, name: str, pages: int, pending: contextlib.ExitStack) -> Shared:
    with contextlib.ExitStack() as undo:
        fd = undo.enter_context(_new(path))
        # All its room at once: a full disk shall be noticed now.
        os.posix_fallocate(fd, 0, store.file_size(pages))
        store.lay_out(fd, name, pages)
        pending.push(undo.pop_all())
    return store.shared(os.dup(fd))


@contextlib.contextmanager
def _new(path: Path) -> Iterator[int]:
    with newfile.in_place_of(path, _MODE) as fd:
        yield fd
    os.close(fd)
