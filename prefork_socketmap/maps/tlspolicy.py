"""The type ``tls-policy``: what smtp_tls_policy_maps asks, answered by what domains publish of DANE and MTA-STS.

DANE (RFC 7672) comes first, for MTA-STS must not override it (RFC 8461, 2). An answer is remembered in a store that
all workers share, and is looked for by one of them at a time. While it is fresh, or the domain's MTA-STS policy has
not expired, lookups are answered from there at once; who asks when it is no longer young has it refreshed beside
them, in a thread. Only what is not remembered makes a lookup wait, within ``timeout``.

What a domain publishes is found out by ``domainpolicy``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefork_socketmap import settings
from prefork_socketmap.maps import policyhost
from prefork_socketmap.maps.base import LookupFailedError, Map, MissingLibraryError, UncheckedError, log
from prefork_socketmap.maps.dane import Dane, Finding
from prefork_socketmap.maps.dnsclient import DnsClient, DnsError, Resolver
from prefork_socketmap.maps.domainpolicy import LONGEST, SHORTEST, Known, Look, UnknownPolicyError, answer
from prefork_socketmap.maps.nexthop import NextHop, parse
from prefork_socketmap.maps.policymemory import PolicyMemory
from prefork_socketmap.maps.policystore import SqliteStore, Store, Stored, StoreError
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.socketmap.messages import Reply

if TYPE_CHECKING:
    from prefork_socketmap.maps.backend import Links

DEFAULT_CACHE = "/var/cache/prefork-socketmap/tls-policy.sqlite"

# Seconds.
# Part of an answer's life after which who asks has it refreshed.
_YOUTH = 0.75
_FIRST_PAUSE, _LONGEST_PAUSE = 15.0, 300.0
# How long after the end of a lookup's time its claim ends, if it was killed.
_GRACE = 2.0
_LOOK = 0.02
_MOST_REFRESHES = 4

_NOT_WITH_REDIS = ("policy_cache", "cache_size")
# The cache of the other types knows nothing of policies.
_OF_OTHER_TYPES = ("cache_ttl", "negative_cache_ttl", "cache_bytes", "cache_file", "stale_ttl")


def _resolvers(key: str, value: object) -> tuple[Resolver, ...]:
    texts = settings.texts(key, value)
    try:
        return tuple(map(Resolver.parse, texts))
    except ValueError:
        accepted = 'IP addresses, with or without a port, such as "127.0.0.1", "192.0.2.1:5353" or "[::1]:5353"'
        raise settings.wrong(key, value, accepted) from None


def _some_seconds(key: str, value: object) -> float:
    seconds = settings.seconds(key, value)
    if not seconds:
        raise settings.wrong(key, value, "a time above 0")
    return seconds


def _some(key: str, value: object) -> int:
    return settings.count(key, value, minimum=1)


_NO_DANE = Finding(Dane.NONE, 2**31 - 1)
_BY_DANE = {Dane.ALL: "dane-only", Dane.SOME: "dane"}


class TlsPolicyMap(Map):
    """Answers with the security level for a next hop, and what its certificate has to match."""

    fold = setting(settings.boolean, False)
    """Off: domain names are folded as domain names are, be they in Unicode."""
    cache_size = setting(_some, 100_000)
    """The most next hops that are remembered in ``policy_cache``, about; those with a policy go last."""
    dane = setting(settings.boolean, True)
    """Whether to look for DANE. It takes a resolver that is trusted."""
    mta_sts = setting(settings.boolean, True)
    """Whether to look for MTA-STS."""
    tlsrpt = setting(settings.boolean, False)
    """Whether to add what Postfix 3.10 and newer report (TLSRPT_README). Older ones refuse such answers."""
    resolver = setting(_resolvers, ())
    """IP addresses of the DNS resolvers. Default: those of resolv.conf(5)."""
    trusted_resolver = setting(_resolvers, ())
    """IP addresses of resolvers whose word about signatures counts, beside those on the loopback interface."""
    timeout = setting(_some_seconds, 10.0)
    """How long one lookup may take; below ``lookup_timeout``."""
    query_timeout = setting(_some_seconds, 3.0)
    """How long a resolver is waited for, each time it is asked."""
    tls_CAfile = setting(settings.text, "")  # noqa: N815 - Postfix's name
    """Authorities that are believed when they certify policy hosts, in PEM. Default: the system's."""
    policy_cache = setting(settings.text, DEFAULT_CACHE)
    """The SQLite file where answers are remembered. Its directory must belong to the workers' user."""
    redis = setting(settings.table, None)
    """Where the Redis is in which answers are remembered in place of a file."""

    _store: Store

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        if not self.dane and not self.mta_sts:
            raise settings.SettingError(f"maps.{name}.mta_sts", "cannot be false together with dane")
        for key in _NOT_WITH_REDIS if self.redis is not None else ():
            if key in table:
                raise settings.SettingError(f"maps.{name}.{key}", "cannot be together with redis")
        for key in _OF_OTHER_TYPES:
            if key in table:
                raise settings.SettingError(f"maps.{name}.{key}", "is not for tls-policy, which remembers by itself")
        self._client = DnsClient(self.resolver, self.trusted_resolver, self.query_timeout)
        self._tls_file = str(base / self.tls_CAfile) if self.tls_CAfile else None
        try:
            self._tls = policyhost.tls_context(self._tls_file)
        except OSError as error:
            raise settings.SettingError(f"maps.{name}.tls_CAfile", f"cannot be used: {error}") from error
        self._store = self._make_store()
        self._basis = f"dane={self.dane:d} mta_sts={self.mta_sts:d} tlsrpt={self.tlsrpt:d}"
        self._refreshing: set[str] = set()

    def share(self, links: Callable[[], Links]) -> None:
        """Share the connection to Redis, and what is known of it."""
        self._store.share(links)

    def prepare(self) -> None:
        """Open the store. Raises SettingError."""
        try:
            self._store.prepare()
        except StoreError as error:
            problem = f"{settings.shown(self.policy_cache)} cannot be used: {error}"
            raise settings.SettingError(f"maps.{self.name}.policy_cache", problem) from None
        if self.dane and not self._client.is_trusted:
            log.warning("map %s: no resolver is trusted, so there is no DANE; see trusted_resolver", self.name)

    def verify(self) -> None:
        """Find out whether Redis answers, and a resolver. Raises SettingError or UncheckedError."""
        self._store.verify()
        try:
            # Each that validates knows the root to be signed.
            root = self._client.ask("", "NS", time.monotonic() + 2 * self.query_timeout)
        except DnsError as error:
            raise UncheckedError(f"maps.{self.name}.resolver", str(error)) from error
        if self.dane and self._client.is_trusted and not root.is_secure:
            log.warning("map %s: the resolver does not validate what is signed, so there is no DANE", self.name)

    def release(self) -> None:
        """Close the store."""
        self._store.close()

    def memory(self) -> PolicyMemory:
        """Return what this map remembers, for the command ``cache``. Raises StoreError."""
        self._store.prepare()
        return PolicyMemory(self._store)

    def remembered_key(self, key: str) -> str:
        """Return *key*, as Postfix asks it, as it is remembered."""
        return str(parse(key) or key)

    def find(self, key: str) -> Sequence[str] | None:
        """Return the policy for the next hop *key*."""
        next_hop = parse(key)
        if next_hop is None:
            log.debug("map %s: %r is no next hop that can have a policy", self.name, key)
            return None
        try:
            return self._policy_of(str(next_hop), next_hop)
        except StoreError as error:
            self._complain_of_store(error)
            raise self._unavailable("the cache is not available") from error

    def _policy_of(self, key: str, next_hop: NextHop) -> Sequence[str] | None:
        now = time.time()
        stored = self._store.get(key)
        if stored is not None and self._holds(stored, now):
            if stored.refresh_after <= now:
                self._refresh_beside(key, next_hop)
            if log.isEnabledFor(logging.DEBUG):
                self._tell(key, stored, now)
        else:
            stored = self._wait_for(key, next_hop)
        if stored.failure:
            raise self._unavailable(stored.failure)
        return (stored.answer,) if stored.answer else None

    def _tell(self, key: str, stored: Stored, now: float) -> None:
        """Tell what is remembered, and of what it came."""
        log.debug(
            "map %s: %s is remembered since %.0f s, for %.0f s more; it is refreshed by who asks in %.0f s%s",
            self.name, key, now - stored.stored, stored.usable_until - now, max(stored.refresh_after - now, 0),
            f"; {stored.failure}" if stored.failure else "",
        )  # fmt: skip
        known = Known.load(stored.details)
        if policy := known.live_policy:
            log.debug(
                "map %s: %s: MTA-STS: id %s, fetched %.0f s ago, expires in %.0f s: %s",
                self.name, key, known.id, now - known.fetched, known.expires - now, "; ".join(policy.lines)[:1000],
            )  # fmt: skip

    def _holds(self, stored: Stored, now: float) -> bool:
        # Who sets the clock back shall not make an answer live for ever.
        return stored.basis == self._basis and stored.stored <= now + SHORTEST and now < stored.usable_until

    def _complain_of_store(self, error: StoreError) -> None:
        self.complaints.log(logging.ERROR, "the cache is not available: %s", error)

    def _unavailable(self, problem: str) -> LookupFailedError:
        return LookupFailedError(Reply.temp_fail(f"map {self.name}: {problem}"))

    # Who looks, and when.

    def _wait_for(self, key: str, next_hop: NextHop) -> Stored:
        """Look for an answer, or wait until another worker has found one."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                claim = self._store.claim(key, self.timeout + _GRACE)
            except StoreError as error:
                # It can be read, but not written: the disk is full, say. What is known of policies counts still.
                self._complain_of_store(error)
                return self._looked_for(next_hop, self._store.get(key))
            stored = self._store.get(key)
            if stored is not None and self._holds(stored, time.time()):
                if claim:
                    self._store.give_back(key, claim)
                return stored
            if claim:
                return self._refresh(key, next_hop, stored, claim)
            if time.monotonic() > deadline:
                raise self._unavailable("another worker is looking for the policy")
            time.sleep(_LOOK)

    def _refresh_beside(self, key: str, next_hop: NextHop) -> None:
        """Have an answer refreshed by a thread, unless one does that, or much is being refreshed already."""
        if key in self._refreshing or len(self._refreshing) >= _MOST_REFRESHES:
            return
        self._refreshing.add(key)
        try:
            threading.Thread(
                target=self._refresh_in_thread, args=(key, next_hop), name=f"refresh {key}", daemon=True
            ).start()
        except RuntimeError as error:  # the system has no room for a thread
            self._refreshing.discard(key)
            self.complaints.log(logging.ERROR, "%s cannot be refreshed: %s", key, error)

    def _refresh_in_thread(self, key: str, next_hop: NextHop) -> None:
        # The claim, too, is taken here: a store may have to be waited for.
        try:
            claim = self._store.claim(key, self.timeout + _GRACE)
            stored = self._store.get(key)
            now = time.time()
            if claim and stored is not None and self._holds(stored, now) and stored.refresh_after > now:
                self._store.give_back(key, claim)  # another worker has done it since this one has looked
            elif claim:
                self._refresh(key, next_hop, stored, claim)
        except Exception as error:  # noqa: BLE001 - what nobody else would hear of
            self.complaints.log(logging.ERROR, "%s cannot be refreshed: %s", key, error)
        finally:
            self._store.close()
            self._refreshing.discard(key)

    def _refresh(self, key: str, next_hop: NextHop, before: Stored | None, claim: str) -> Stored:
        """Look for an answer, remember it, and return it."""
        try:
            stored = self._looked_for(next_hop, before)
        except BaseException:
            # A lookup past its time, or a mistake of ours: the next one shall not wait until the claim ends.
            with contextlib.suppress(StoreError):
                self._store.give_back(key, claim)
            raise
        try:
            self._store.put(key, stored, claim)
        except StoreError as error:
            self._complain_of_store(error)
        return stored

    def _looked_for(self, next_hop: NextHop, before: Stored | None) -> Stored:
        known = Known.load(before.details) if before else Known()
        look = Look(self._client, next_hop, known, time.monotonic() + self.timeout)
        try:
            dane = look.dane() if self.dane and self._client.is_trusted else _NO_DANE
            if dane.dane in _BY_DANE:
                return self._stored(_BY_DANE[dane.dane], known, dane.ttl)
            known, ttl = look.mta_sts(self._tls, self.complaints) if self.mta_sts else (known, dane.ttl)
        except UnknownPolicyError as error:
            return self._failed(next_hop, known, error)
        by_policy = self._by_policy(next_hop, known)
        if dane.dane is Dane.FAILED and by_policy:
            # Neither may stand in for the other, so there is no telling.
            return self._failed(next_hop, known, UnknownPolicyError(Dane.FAILED.value, overrides_policy=True))
        if not by_policy and dane.dane in (Dane.FAILED, Dane.UNUSABLE):
            return self._stored("dane", known, dane.ttl)
        return self._stored(by_policy, known, min(dane.ttl, ttl), is_by_policy=bool(by_policy))

    def _stored(self, text: str, known: Known, ttl: float, *, is_by_policy: bool = False) -> Stored:
        """Return what is remembered of an answer that holds for *ttl* seconds, one by a policy until that expires."""
        now = time.time()
        life = min(max(ttl, SHORTEST), LONGEST)
        usable_until = known.expires if is_by_policy else now + life
        return Stored(
            answer=text,
            failure="",
            basis=self._basis,
            stored=now,
            refresh_after=now + _YOUTH * life,
            usable_until=usable_until,
            kept_until=max(usable_until, known.expires),
            details=known._replace(failures=0).dump(),
        )

    def _failed(self, next_hop: NextHop, known: Known, error: UnknownPolicyError) -> Stored:
        """Return what is remembered of a failure: an answer still, if there is a policy that has not expired."""
        now = time.time()
        pause = min(_FIRST_PAUSE * 2 ** min(known.failures, 10), _LONGEST_PAUSE)
        known = known._replace(failures=known.failures + 1)
        text = "" if error.overrides_policy else self._by_policy(next_hop, known)
        self.complaints.log(logging.WARNING, "%s: %s", next_hop, error)
        usable_until = known.expires if text else now + pause
        return Stored(
            answer=text,
            failure="" if text else str(error),
            basis=self._basis,
            stored=now,
            refresh_after=now + pause,
            usable_until=usable_until,
            kept_until=max(usable_until, known.expires),
            details=known.dump(),
        )

    def _by_policy(self, next_hop: NextHop, known: Known) -> str:
        """Return the answer by the MTA-STS policy that is known, if it has not expired and calls for one."""
        policy = known.live_policy
        return answer(policy, next_hop.domain, tlsrpt=self.tlsrpt) if policy and self.mta_sts else ""

    def _make_store(self) -> Store:
        if self.redis is None:
            return SqliteStore(self.base / self.policy_cache, self.name, self.cache_size)
        try:
            from prefork_socketmap.maps.policyredis import RedisStore
        except ImportError as error:
            problem = f"a Python package is not there ({error}); install prefork-socketmap[redis]"
            raise MissingLibraryError(f"maps.{self.name}.redis", problem) from error
        return RedisStore(self.name, self.redis, self.base)
