"""What stands in for a map whose library is not installed, so that the other maps can be served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefork_socketmap.maps.base import LookupFailedError, Map
from prefork_socketmap.socketmap.messages import Reply


class UnavailableMap(Map):
    """Answers every key with PERM and *reason*."""

    takes_any_key = True

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, {}, Path())
        self._reason = reason

    def find(self, key: str) -> Sequence[str] | None:  # noqa: ARG002
        """Fail."""
        raise LookupFailedError(Reply.perm_fail(self._reason))
