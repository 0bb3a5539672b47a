"""What a store of TLS policies remembers, for the command ``cache``."""

from __future__ import annotations

from collections.abc import Iterator

from prefork_socketmap.maps.memory import Remembered
from prefork_socketmap.maps.policystore import Store, Stored
from prefork_socketmap.socketmap.messages import Reply


class PolicyMemory:
    """The ``Memory`` of *store*, whose keys are next hops in one form each."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def recall(self, key: str) -> Remembered | None:
        """Return what is remembered of a next hop."""
        stored = self._store.get(key)
        return _remembered(key, stored) if stored else None

    def recall_all(self) -> Iterator[Remembered]:
        """Iterate over all next hops."""
        return (_remembered(key, stored) for key, stored in self._store.all())

    def forget(self, key: str) -> bool:
        """Forget a next hop, its policy included."""
        return self._store.remove(key)

    def forget_all(self) -> int:
        """Forget all next hops."""
        return self._store.clear()


def _remembered(key: str, stored: Stored) -> Remembered:
    if stored.failure:
        reply = Reply.temp_fail(stored.failure)
    else:
        reply = Reply.ok(stored.answer) if stored.answer else Reply.not_found()
    return Remembered(key, reply, stored.stored, stored.usable_until, stored.kept_until)
