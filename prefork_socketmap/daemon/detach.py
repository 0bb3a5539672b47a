"""Into the background: the process that was started waits until the daemon is ready, and says so or why not."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable

from daemon.daemon import (  # type: ignore[import-untyped]
    change_file_creation_mask,
    change_working_directory,
    detach_process_context,
    prevent_core_dump,
)

from prefork_socketmap.daemon.owndescriptor import OwnDescriptor

_UMASK = 0o022
_LAST_STANDARD = 2  # descriptor

log = logging.getLogger("prefork_socketmap.master")


class Launch:
    """How a start went: told to the process that was started, through a pipe."""

    def __init__(self, pipe: int) -> None:
        # A worker that held it open would keep the waiting process waiting.
        self._pipe = OwnDescriptor(pipe)

    def succeeded(self) -> None:
        """Tell that the server is ready."""
        self._tell(os.EX_OK, "")

    def failed(self, code: int, reason: str) -> None:
        """Tell why it is not, and what to exit with; and log it, for a start that nobody waits for any more."""
        log.critical("%s", reason)
        self._tell(code, reason)

    def _tell(self, code: int, reason: str) -> None:
        if self._pipe.is_open:
            os.write(self._pipe.fileno(), f"{code} {reason}".encode("utf-8", "backslashreplace"))
            self._pipe.close()


def in_background(program: Callable[[Launch], int], keep: Iterable[int]) -> int:
    """Run *program* in a daemon process, whose open descriptors are those in *keep*; return the exit code.

    Returns in both processes: in the one that was started as soon as the program has told its ``Launch`` how the
    start went, in the daemon when the program has ended.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return _wait(child, reader)
    os.close(reader)
    _become_daemon([*keep, writer])
    launch = Launch(writer)
    try:
        return program(launch)
    except Exception as error:
        # Nobody sees a traceback here, and the interpreter prints it where nobody looks.
        log.exception("the daemon ends")
        launch.failed(os.EX_SOFTWARE, f"{type(error).__name__}: {error}")
        return os.EX_SOFTWARE


def _wait(child: int, reader: int) -> int:
    os.waitpid(child, 0)  # python-daemon forks again, and that process ends at once
    with open(reader, encoding="utf-8") as pipe:
        code, _, reason = pipe.read().partition(" ")
    if not code:
        code, reason = str(os.EX_SOFTWARE), "the daemon ended before it was ready; see its log"
    if reason:
        print(f"prefork-socketmap: {reason}", file=sys.stderr)
    return int(code)


def _become_daemon(keep: Collection[int]) -> None:
    """Do as ``DaemonContext.open`` does, but close what is open, and not each number up to the limit of descriptors.

    That is a billion in a container without a limit, and some Pythons and systems close each by a call of its own.
    """
    prevent_core_dump()
    change_file_creation_mask(_UMASK)
    change_working_directory("/")
    detach_process_context()
    for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        if number > _LAST_STANDARD and number not in keep:
            with contextlib.suppress(OSError):  # that of the directory itself
                os.close(number)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(_LAST_STANDARD + 1):
        os.dup2(null, standard)  # inheritable: what replaces this program needs the three, too
    if null > _LAST_STANDARD:
        os.close(null)
