"""Map: what every map type does around its own ``find``.

A lookup folds the key, asks the cache, tries the keys that ``search`` tells, one after the other, gives each to the
type's ``find``, and makes a reply of what comes back. Every type has these settings, so every type has them alike.
"""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from prefork_socketmap import settings
from prefork_socketmap.maps import template
from prefork_socketmap.maps.ratelimit import RateLimitedLogger
from prefork_socketmap.maps.setting import read_table, setting
from prefork_socketmap.maps.template import Address, Template
from prefork_socketmap.socketmap.messages import Reply

log = logging.getLogger("prefork_socketmap.worker.maps")


class LookupFailedError(Exception):
    """A lookup failed in a way that the map foresees; *reply* is what the client is told."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


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

    takes_any_key: ClassVar[bool] = False
    """Whether ``find`` is also given keys that are no text: not UTF-8, or with a NUL.

    By default such a key is not found, as in Postfix's own tables; no database has it, and some fail on it.
    """

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        """Read *table*, the configuration of the map *name*. Relative paths begin at *base*."""
        self.name = name
        self.base = base
        self.__dict__.update(read_table(type(self), f"maps.{name}.", table))
        # Postfix pools the needs of all templates: a result format that speaks of the key's domain suppresses the
        # lookup of a key that has none.
        self._needs = frozenset[str]().union(
            *(value.needs_of_key for value in vars(self).values() if isinstance(value, Template))
        )
        self._domains = frozenset(domain.casefold() for domain in self.domain)
        self._opened = False
        self.complaints = RateLimitedLogger(log)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def open(self) -> None:
        """Acquire what lookups need, once. Raises what the type's ``prepare`` raises."""
        if not self._opened:
            self.prepare()
            self._opened = True

    def close(self) -> None:
        """Let go of what ``open`` acquired. A closed map can be opened again."""
        if self._opened:
            self._opened = False
            self.release()

    def lookup(self, key: str) -> Reply:
        """Look *key* up. What ``find`` raises apart from LookupFailedError goes to the caller."""
        if self.fold:
            # Not lower(): Postfix folds "ß" to "ss" and the Kelvin sign to "k", too.
            key = key.casefold()
        try:
            return self._search(key)
        except LookupFailedError as failure:
            return failure.reply

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

    def _search(self, key: str) -> Reply:
        values = self._find(key)
        return Reply.ok(",".join(values)) if values else Reply.not_found()

    def _find(self, key: str) -> Sequence[str]:
        """Return what ``find`` finds at *key*, in the result format."""
        if not self._is_wanted(key):
            log.debug(
                "map %s: %r is not looked up: it is no text, lacks a part, or its domain is not served",
                self.name,
                key,
            )
            return ()
        begin = time.monotonic()
        values = self.find(key) or ()
        log.debug("map %s: %r: %s, %.1f ms", self.name, key, values, (time.monotonic() - begin) * 1000)
        return self._format(key, values)

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
            self.complaints.log(
                logging.WARNING, "map %s: %r has an empty value, which is taken as not found", self.name, key
            )
        if not self.result_format.is_identity:
            kept = [
                self.result_format.expand_result(address, Address.split(key))
                for address in map(Address.split, kept)
                if address.has(self.result_format.needs_of_value)
            ]
        if self.expansion_limit and len(kept) > self.expansion_limit:
            problem = f"{len(kept)} results where expansion_limit = {self.expansion_limit}"
            self.complaints.log(logging.WARNING, "map %s: %r has %s", self.name, key, problem)
            raise LookupFailedError(Reply.temp_fail(f"map {self.name}: {problem}"))
        return kept


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in key
