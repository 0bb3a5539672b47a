"""TLS policies remembered in Redis or Valkey, for workers on several machines; see ``policystore``.

Where the server is, how it is logged in to, and what happens when it is down is as in the type ``redis``.
"""

# Parts of redis-py have no type hints.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from prefork_socketmap import settings
from prefork_socketmap.maps.base import LookupFailedError
from prefork_socketmap.maps.policystore import Stored, StoreError
from prefork_socketmap.maps.redis import RedisMap
from prefork_socketmap.socketmap.messages import to_text

if TYPE_CHECKING:
    from prefork_socketmap.maps.backend import Links

_CONNECTION_KEYS = (
    "hosts", "sentinel", "cluster", "dbname", "user", "password", "password_file", "password_env", "timeout",
    "max_connections", "max_connection_idle", "max_workers_share",
    "tls", "tls_CAfile", "tls_CApath", "tls_cert_file", "tls_key_file", "tls_verify_cert",
)  # fmt: skip
_PUT = """
if redis.call('get', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('del', KEYS[2])
if ARGV[2] ~= '' then redis.call('set', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1
"""
_SCAN = "(all keys)"
_COUNT = 500


class PolicyRedisMap(RedisMap):
    """The type ``redis``, for any command in place of a lookup: it reconnects, and leaves a dead server alone."""

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, {**table, "query": "GET %s"}, base)
        self._key = ""
        self._words: Sequence[str | int] = ()
        self._answer: Any = None

    def do(self, key: str, *words: str | int) -> Any:
        """Return the answer to a command that is about *key*. Raises LookupFailedError."""
        self._key, self._words = key, words
        self.find(key)
        return self._answer

    def keys(self, pattern: str) -> Iterator[str]:
        """Iterate over the keys that match, on all nodes of a cluster. Raises LookupFailedError."""
        for link in self.all_links():
            cursor = 0
            while True:
                self._key, self._words = _SCAN, ("SCAN", cursor, "MATCH", pattern, "COUNT", _COUNT)
                self.find_at(link, _SCAN)
                cursor, found = self._answer
                yield from map(to_text, found)
                if not int(cursor):
                    break

    def ask(self, connection: redis.Redis, key: str) -> Sequence[str] | None:
        """Send the command."""
        if key is not self._key:  # which node of a cluster has what
            return super().ask(connection, key)
        try:
            if self._is_asking:
                connection.execute_command("ASKING")
            self._answer = connection.execute_command(*self._words)
        except redis.ResponseError as error:
            self.refuse(connection, error)
        return None


class RedisStore:
    """A store in Redis or Valkey, which forgets by itself what has expired.

    *table* has the keys of the type ``redis`` that tell where it is; connections are made as that type makes them.
    """

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        """Raises SettingError."""
        settings.reject_unknown(f"maps.{name}.redis.", table, _CONNECTION_KEYS)
        self._make = lambda: PolicyRedisMap(f"{name}.redis", table, base)
        self._prefix = f"prefork-socketmap:{name}:"
        # A connection for each thread: redis-py's are not for several.
        self._local = threading.local()
        self._server()

    def share(self, links: Callable[[], Links]) -> None:
        """Take this thread's connection from those that the maps of this process share."""
        self._server().share(links)

    def verify(self) -> None:
        """Connect. Raises SettingError or UncheckedError."""
        self._server().verify()

    def prepare(self) -> None:
        """Do nothing: the first lookup connects."""

    def get(self, key: str) -> Stored | None:
        """Return what is remembered of *key*."""
        return _parsed(self._ask(key, "GET", self._key(key)))

    def put(self, key: str, stored: Stored, claim: str) -> None:
        """Remember *stored*, and end *claim*; do nothing if that has ended."""
        self._end(key, claim, json.dumps(stored), max(int((stored.kept_until - time.time()) * 1000), 1))

    def claim(self, key: str, seconds: float) -> str | None:
        """Claim *key* for so long; return the claim, None while somebody else has one."""
        token = secrets.token_hex(8)
        words = ("SET", self._claim_key(key), token, "NX", "PX", int(seconds * 1000))
        return token if self._ask(key, *words) else None

    def give_back(self, key: str, claim: str) -> None:
        """End *claim* without an answer."""
        self._end(key, claim, "", 0)

    def all(self) -> Iterator[tuple[str, Stored]]:
        """Iterate over what is remembered, by key."""
        for key in sorted(self._keys()):
            if stored := self.get(key):
                yield key, stored

    def remove(self, key: str) -> bool:
        """Forget *key*; return whether anything was remembered."""
        self._ask(key, "DEL", self._claim_key(key))
        return bool(self._ask(key, "DEL", self._key(key)))

    def clear(self) -> int:
        """Forget everything; return how much it was."""
        return sum(self.remove(key) for key in self._keys())

    def close(self) -> None:
        """Close this thread's connection."""
        found: PolicyRedisMap | None = self._local.__dict__.pop("server", None)
        if found is not None:
            found.release()

    def _key(self, key: str) -> str:
        # The braces: in a cluster both keys are on one node.
        return f"{self._prefix}{{{key}}}"

    def _claim_key(self, key: str) -> str:
        return f"{self._key(key)}:claim"

    def _keys(self) -> list[str]:
        with self._errors():
            names = set(self._server().keys(f"{_literal(self._prefix)}{{*}}"))
        return [name[len(self._prefix) + 1 : -1] for name in names]

    def _end(self, key: str, claim: str, value: str, milliseconds: int) -> None:
        self._ask(key, "EVAL", _PUT, 2, self._key(key), self._claim_key(key), claim, value, milliseconds)

    def _ask(self, key: str, *command: str | int) -> Any:
        with self._errors():
            return self._server().do(self._key(key), *command)

    def _server(self) -> PolicyRedisMap:
        found: PolicyRedisMap | None = getattr(self._local, "server", None)
        if found is None:
            found = self._local.server = self._make()
        return found

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (LookupFailedError, *self._server().errors) as error:
            raise StoreError(str(error)) from error


def _parsed(value: bytes | str | None) -> Stored | None:
    try:
        return None if value is None else Stored(*json.loads(value))
    except (ValueError, TypeError):  # of another version, or not ours
        return None


def _literal(text: str) -> str:
    """Return *text* as a pattern of Redis that matches itself."""
    return "".join(f"\\{each}" if each in "*?[]\\" else each for each in text)
