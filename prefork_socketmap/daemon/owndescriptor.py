"""A descriptor that is the master's alone. A worker is not to be believed, nor its map code: it shall not have it."""

from __future__ import annotations

import os


class OwnDescriptor:
    """Owns the descriptor *fd*: a child that this process forks closes it at once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.register_at_fork(after_in_child=self.close)

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed yet."""
        return self._fd >= 0

    def fileno(self) -> int:
        """Return the number; -1 when it has been closed."""
        return self._fd

    def close(self) -> None:
        """Close it, once: its number may be somebody else's afterwards."""
        if self.is_open:
            os.close(self._fd)
            self._fd = -1
