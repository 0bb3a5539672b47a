"""New files in the place of old ones: made under a name of their own, written, and renamed.

A reader sees the old file or the new one, whole. What somebody may have put at either name, a link perhaps, is not
followed and not written to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_MODE = 0o644  # whatever the umask: everybody may read it


@contextlib.contextmanager
def in_place_of(path: Path, mode: int = _MODE) -> Iterator[int]:
    """Make a new file, to be written inside, and give it the name *path*.

    The descriptor remains open, and is the caller's to close, unless something is raised: then all is as before.
    Raises OSError.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, descriptor)
        undo.callback(new.unlink, missing_ok=True)
        os.fchmod(descriptor, mode)
        try:
            yield descriptor
        except OSError as error:  # of a write to a disk that is full, for one, which knows no path
            raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
        new.replace(path)
        undo.pop_all()


def write(path: Path, text: str) -> None:
    """Put a file with *text* in the place of the one at *path*. Raises OSError."""
    with in_place_of(path) as descriptor, open(descriptor, "w", encoding="utf-8", closefd=False) as file:
        file.write(text)
    os.close(descriptor)


def read(path: Path) -> str:
    """Return the text of the file at *path*; no link is followed, and nothing that blocks is waited for.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
        return file.read()
