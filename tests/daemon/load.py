"""A load on a server: connections that ask without a pause, and note every answer that is none."""

from __future__ import annotations

from collections import Counter

from prefork_socketmap.client import LookupFailed, SocketmapClient
from tests.threads import Threads


class Load(Threads):
    """*connections* clients that ask *endpoint* for *key* in the map *name* for as long as the context lasts.

    ``answers`` counts what they were told, whole answers and failures alike. The clients behave as Postfix: they try
    once more when the server hangs up.
    """

    def __init__(self, endpoint: str, name: str, key: str, connections: int = 32) -> None:
        super().__init__([self._ask] * connections)
        self.answers: Counter[str | None] = Counter()
        self._endpoint = endpoint
        self._question = (name, key)

    def _ask(self) -> None:
        with SocketmapClient(self._endpoint) as client:
            while not self.enough.is_set():
                try:
                    self.answers[client.lookup(*self._question)] += 1
                except LookupFailed as error:
                    self.answers[f"failed: {error}"] += 1
