"""A load on a server: connections that ask without a pause, and note every answer that is none."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType

from prefork_socketmap.client import LookupFailed, SocketmapClient


class Load:
    """*connections* clients that ask *endpoint* for *key* in the map *name* for as long as the context lasts.

    ``answers`` counts what they were told, whole answers and failures alike. The clients behave as Postfix: they try
    once more when the server hangs up.
    """

    def __init__(self, endpoint: str, name: str, key: str, connections: int = 32) -> None:
        self.answers: Counter[str | None] = Counter()
        self._endpoint = endpoint
        self._question = (name, key)
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(connections)]

    def _ask(self) -> None:
        with SocketmapClient(self._endpoint) as client:
            while not self._enough.is_set():
                try:
                    self.answers[client.lookup(*self._question)] += 1
                except LookupFailed as error:
                    self.answers[f"failed: {error}"] += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(60)
