"""A disk that can be filled: a file system of its own, in memory, which only root can make."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

_SIZE = "1m"
_BLOCK = 4096


class SmallDisk:
    """A file system at *path*, which is an empty directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        """Leave no byte."""
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(_BLOCK))

    def empty(self) -> None:
        """Give all of it back."""
        self._filler.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        mode = self._path.stat().st_mode & 0o7777
        options = f"size={_SIZE},mode={mode:o}"
        command = ["mount", "-t", "tmpfs", "-o", options, "small-disk", str(self._path)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            raise PermissionError(f"no file system can be mounted here: {mounted.stderr.strip()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Lazily: a process that has not ended yet may still have a file open there.
        subprocess.run(["umount", "--lazy", self._path], check=True)
