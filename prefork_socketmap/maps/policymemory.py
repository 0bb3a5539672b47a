"""What a store of TLS policies remembers, for the command ``cache``."""

from __future__ import annotations

from collections.abc import Iterator

from prefork_socketmap.maps.memory import Remembered
from prefork_socketmap.maps.nexthop import parse
from prefork_socketmap.maps.policystore import Store, Stored
from prefork_socketmap.socketmap.messages import Reply


class PolicyMemory:
    """The ``Memory`` of *store*, whose keys are next hops in one form each."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def recall(self, key: str) -> Remembered | None:
        """Return what is remembered of a next hop."""
        next_hop = parse(key)
        stored = self._store.get(str(next_hop)) if next_hop else None
        return _remembered(str(next_hop), stored) if stored else None

    def recall_all(self) -> Iterator[Remembered]:
        """Iterate over all next hops."""
        return (_remembered(key, stored) for key, stored in self._store.all())

    def forget(self, key: str) -> bool:
        """Forget a next hop, its policy included."""
        next_hop = parse(key)
        return next_hop is not None and self._store.remove(str(next_hop))

    def forget_all(self) -> int:
        """Forget all next hops."""
        return self._store.clear()


def _remembered(key: str, stored: Stored) -> Remembered:
    if stored.failure:
        reply = Reply.temp_fail(stored.failure)
    else:
        reply = Reply.ok(stored.answer) if stored.answer else Reply.not_found()
    return Remembered(key, reply, stored.stored, stored.usable_until, stored.kept_until)
