"""Map: what every map type does around its own ``find``.

A lookup folds the key, asks the cache, tries the keys that ``search`` tells, one after the other, gives each to the
type's ``find``, and makes a reply of what comes back. Every type has these settings, so every type has them alike.

The logger's debug lines tell each key that was tried, what was found, and how long it took.
"""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from prefork_socketmap import settings
from prefork_socketmap.maps import template
from prefork_socketmap.maps.ratelimit import RateLimitedLogger
from prefork_socketmap.maps.search import ORDERS, Rules, bounded, propagate
from prefork_socketmap.maps.setting import read_table, setting
from prefork_socketmap.maps.template import Address, Template
from prefork_socketmap.socketmap.messages import Reply, Status

if TYPE_CHECKING:
    from prefork_socketmap.maps.backend import Links
    from prefork_socketmap.maps.cache import Cache
    from prefork_socketmap.maps.memory import Memory

log = logging.getLogger("prefork_socketmap.worker.maps")

_NOT_FOUND = Reply.not_found()
_OK = Status.OK


class MissingLibraryError(settings.SettingError):
    """A map needs a Python package that is not installed; the text says which."""


class LookupFailedError(Exception):
    """A lookup failed in a way that the map foresees; *reply* is what the client is told."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


class UncheckedError(settings.SettingError):
    """``verify`` cannot tell whether the setting is right, or the map's server is down; the text says why."""

    may_pass = True


class CodeError(settings.SettingError):
    """A map's own code has failed when it was opened; the text says where."""

    may_pass = True


def values_in(reply: Reply) -> Sequence[str] | None:
    """Return what a type's ``find`` has to return, or raise LookupFailedError, so that *reply* is given.

    An OK without a value, too, is given as it is. In a database it is a row that says nothing; but code that returns
    it is wrong, and whoever sends replies tells what to return instead.
    """
    if reply.status is Status.NOT_FOUND:
        return None
    if reply.status is Status.OK and reply.text and not reply.text.isspace():
        return (reply.text,)
    raise LookupFailedError(reply)


def reason(error: Exception) -> str:
    """Return what is wrong with a file, without its path, which an OSError repeats."""
    return getattr(error, "strerror", None) or str(error)


def _order(key: str, value: object) -> str:
    return settings.choice(key, value, ORDERS)


class Map(abc.ABC):
    """A lookup table of the configuration.

    Made from its table in the config file, then opened in the process that uses it, asked any number of times, and
    closed. Construction reads settings and touches nothing else; it raises SettingError.

    A type declares its settings with ``setting()`` and defines ``find``; ``prepare`` and ``release`` if it holds
    anything open.
    """

    fold = setting(settings.boolean, True)
    """Whether keys are folded to lower case first, as Postfix does for its own tables."""
    result_format = setting(template.result_format, template.ResultFormat("%s"))
    """What is made of each result; "result_format" in mysql_table(5)."""
    expansion_limit = setting(settings.count, 0)
    """The most results of one lookup; more is an error. 0: no limit."""
    domain = setting(settings.texts, ())
    """Domains; when there are any, only addresses in them, with a local part, are looked up."""
    search = setting(_order, "exact")
    """Which keys are tried: the order of which of Postfix's tables (see ``search.ORDERS``)."""
    max_key_size = setting(settings.count, 10000)
    """Bytes. With any search but "exact" a longer key is not found; 0: no limit. Default: what Postfix sends at most
    ("socketmap_max_query_size" in postconf(5), Postfix 3.12)."""
    recipient_delimiter = setting(settings.text, "")
    """Characters that separate an address extension; "recipient_delimiter" in postconf(5)."""
    local_domains = setting(settings.texts, ())
    """Domains whose users are also tried without the domain, with ``search = "address"``."""
    propagate_extension = setting(settings.boolean, False)
    """Whether an extension that the key found lacks is added to the addresses that are the result."""
    cache_ttl = setting(settings.seconds, 0.0)
    """How long an answer is remembered."""
    negative_cache_ttl = setting(settings.seconds, 0.0)
    """How long "not found" is remembered."""
    cache_size = setting(settings.count, 10000)
    """For how many answers there is room; see ``store.ROOM``."""
    cache_bytes = setting(settings.count, 0)
    """The same in bytes; 0: as ``cache_size`` says."""
    cache_file = setting(settings.text, None)
    """Where they are kept when the server stops."""
    stale_ttl = setting(settings.seconds, 0.0)
    """How long, after it is fresh no more, an answer is still given when a new lookup fails."""

    _look_at: Callable[[str], Sequence[str] | None]
    """``find``, or the same with a line in the log if ``open`` finds that it is wanted."""

    takes_any_key: ClassVar[bool] = False
    """Whether ``find`` is also given keys that are no text: empty, not UTF-8, or with a NUL.

    By default such a key is not found, as in Postfix's own tables; no database has it, and some fail on it.
    """

    is_table: ClassVar[bool] = True
    """Whether keys stand in the map, so that ``search`` can try several and ``domain`` restrict them. A type that
    computes its answers from the key says no; it takes those settings away (``setting.removed``), or has its own of
    the names ``domain`` and ``local_domains``."""

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        """Read *table*, the configuration of the map *name*. Relative paths begin at *base*."""
        self.name = name
        self.base = base
        self.complaints = RateLimitedLogger(log, f"map {name}: ")
        self.__dict__.update(read_table(type(self), f"maps.{name}.", table))
        # Postfix pools the needs of all templates: a result format that speaks of the key's domain suppresses the
        # lookup of a key that has none.
        self._needs = frozenset[str]().union(
            *(value.needs_of_key for value in vars(self).values() if isinstance(value, Template))
        )
        self._domains = frozenset(domain.casefold() for domain in self.domain) if self.is_table else frozenset()
        self._candidates = ORDERS[self.search]
        if self.search != "exact" and self.max_key_size:
            self._candidates = bounded(self._candidates, self.max_key_size)
        # What most maps need not be asked at each lookup.
        self._is_exact = self.search == "exact"
        self._is_choosy = not self.takes_any_key or bool(self._needs or self._domains)
        self._is_plain = self.result_format.is_identity
        self._look_at = self.find
        if self.is_table:
            local_domains = frozenset(domain.casefold() for domain in self.local_domains)
            self._rules = Rules(self.recipient_delimiter, local_domains)
            self._require_address_search()
        self._require_a_cache(table)
        self.cache = self._make_cache()
        self._opened = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def link(self, maps: Mapping[str, Map]) -> None:  # noqa: B027 - most types know of no other map
        """Find other maps of the configuration that this one needs, before any is opened. Raises SettingError."""

    def share(self, links: Callable[[], Links]) -> None:  # noqa: B027 - most types ask no server
        """Take connections, if the type has any, from those that the maps of this process share."""

    def open(self) -> None:
        """Acquire what lookups need, once. Raises what the type's ``prepare`` raises."""
        if not self._opened:
            self._look_at = self._find_and_tell if log.isEnabledFor(logging.DEBUG) else self.find
            self.prepare()
            self._opened = True

    def close(self) -> None:
        """Let go of what ``open`` acquired. A closed map can be opened again."""
        if self._opened:
            self._opened = False
            self.release()

    def count_in(self, cells: MutableSequence[int]) -> None:  # noqa: B027
        """Count in *cells*, on from what stands there, what the type has to count; ``srs`` does its flaws."""

    def verify(self) -> None:  # noqa: B027
        """Find out what an open map would find out at its first lookup: for ``check``, and for a start or a reload.

        Unlike ``open``, it may ask a server. Raises SettingError for a wrong setting, UncheckedError if there is no
        telling.
        """

    def lookup(self, key: str) -> Reply:
        """Look *key* up. What ``find`` raises apart from LookupFailedError goes to the caller."""
        # An extension is propagated in the case in which it was asked; then each candidate is folded, not the key.
        if self.fold and not self.propagate_extension:
            key = _fold(key)
        try:
            return self._search(key) if self.cache is None else self.cache.get(key)
        except LookupFailedError as failure:
            return failure.reply

    def memory(self) -> Memory | None:
        """Return what this map remembers, for the command ``cache``; None: it remembers nothing."""
        return self.cache

    def remembered_key(self, key: str) -> str:
        """Return *key*, as Postfix asks it, as it is remembered."""
        return _fold(key) if self.fold and not self.propagate_extension else key

    @abc.abstractmethod
    def find(self, key: str) -> Sequence[str] | None:
        """Return the values that stand at *key* exactly; none, or None, is not found.

        Raises LookupFailedError with the reply to give, TimeoutError for "timed out"; anything else is a failed
        lookup whose traceback is logged.
        """

    def prepare(self) -> None:  # noqa: B027 - not abstract: most types hold nothing open
        """Acquire what ``find`` needs, in the process that will look up."""

    def release(self) -> None:  # noqa: B027
        """Let go of what ``prepare`` acquired."""

    def _require_address_search(self) -> None:
        if self.search == "address":
            return
        for key in ("local_domains", "propagate_extension"):
            if getattr(self, key):
                raise settings.SettingError(f"maps.{self.name}.{key}", 'goes with search = "address" only')

    def _require_a_cache(self, table: Mapping[str, object]) -> None:
        if "cache_size" in table and "cache_bytes" in table:
            raise settings.SettingError(
                f"maps.{self.name}.cache_bytes", "goes in place of cache_size; give one of them"
            )
        if self.cache_file and not (self.cache_ttl or self.negative_cache_ttl or self.stale_ttl):
            times = "cache_ttl, negative_cache_ttl or stale_ttl"
            raise settings.SettingError(f"maps.{self.name}.cache_file", f"goes with {times} above 0 only")

    def _make_cache(self) -> Cache | None:
        if not self.cache_size or not (self.cache_ttl or self.negative_cache_ttl or self.stale_ttl):
            return None
        # Imported only here: who configures no cache needs none of this.
        from prefork_socketmap.maps.cache import Cache
        from prefork_socketmap.maps.store import pages_for

        return Cache(
            self._search,
            self.complaints,
            pages=pages_for(self.cache_size, self.cache_bytes),
            ttl=self.cache_ttl,
            negative_ttl=self.negative_cache_ttl,
            stale_ttl=self.stale_ttl,
        )

    def _search(self, key: str) -> Reply:
        """Ask ``find`` for the keys of the search, one after the other, until one is found."""
        if self._is_exact:
            values = self._find(key)
            return Reply(_OK, ",".join(values)) if values else _NOT_FOUND
        for candidate in self._candidates(key, self._rules):
            values = self._find(candidate.key)
            if values and self.propagate_extension and candidate.extension:
                values = [propagate(candidate.extension, value) for value in values]
            if values:
                return Reply(_OK, ",".join(values))
        return _NOT_FOUND

    def _find(self, key: str) -> Sequence[str]:
        """Return what ``find`` finds at *key*, in the result format."""
        if self.fold and self.propagate_extension:
            key = _fold(key)
        if self._is_choosy and not self._is_wanted(key):
            log.debug(
                "map %s: %r is not looked up: it is no text, lacks a part, or its domain is not served",
                self.name,
                key,
            )
            return ()
        values = self._look_at(key)
        if not values:
            return ()
        if self._is_plain and len(values) == 1 and values[0] and not values[0].isspace():
            return values
        return self._format(key, values)

    def _find_and_tell(self, key: str) -> Sequence[str] | None:
        begin = time.monotonic()
        values = self.find(key)
        log.debug("map %s: %r: %s, %.1f ms", self.name, key, values or "not found", (time.monotonic() - begin) * 1000)
        return values

    def _is_wanted(self, key: str) -> bool:
        """Whether *key* is a text, has what the templates need, and lies in ``domain``."""
        if not self.takes_any_key and not _is_text(key):
            return False
        if not self._needs and not self._domains:
            return True
        address = Address.split(key)
        if self._domains and not (address.local and address.domain and address.domain.casefold() in self._domains):
            return False
        return address.has(self._needs)

    def _format(self, key: str, values: Sequence[str]) -> Sequence[str]:
        kept = [value for value in values if value and not value.isspace()]
        if len(kept) < len(values):
            self.complaints.log(logging.WARNING, "%r has an empty value, which is taken as not found", key)
        if not self.result_format.is_identity:
            kept = [
                self.result_format.expand_result(address, Address.split(key))
                for address in map(Address.split, kept)
                if address.has(self.result_format.needs_of_value)
            ]
        if self.expansion_limit and len(kept) > self.expansion_limit:
            problem = f"{len(kept)} results where expansion_limit = {self.expansion_limit}"
            self.complaints.log(logging.WARNING, "%r has %s", key, problem)
            raise LookupFailedError(Reply.temp_fail(f"map {self.name}: {problem}"))
        return kept


def _fold(key: str) -> str:
    # Not lower(): Postfix folds "ß" to "ss" and the Kelvin sign to "k", too.
    return key.casefold()


def _is_text(key: str) -> bool:
    """Whether *key* is what Postfix's own tables look up: not empty, UTF-8, no NUL."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return key != "" and "\0" not in key
