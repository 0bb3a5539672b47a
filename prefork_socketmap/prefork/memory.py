"""Memory that processes share, as a file without a name: unlike an anonymous mapping it survives execve(2)."""

from __future__ import annotations

import mmap
import os


def create(name: str, size: int) -> int:
    """Return the descriptor of new memory of *size* zero bytes; what is never touched takes no room."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(name)
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def view(fd: int) -> memoryview:
    """Map the whole of *fd*, shared and writable."""
    return memoryview(mmap.mmap(fd, os.fstat(fd).st_size))
