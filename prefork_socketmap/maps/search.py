"""Partial keys: which keys are tried for the one that was asked, and in which order.

Postfix asks a socketmap for the full key only (socketmap_table(5)); it generates partial keys for its own indexed
tables and no others. The orders here are those, as the manuals of the tables give them and as Postfix 3.7 was seen to
ask: virtual(5), canonical(5), "TABLE SEARCH ORDER"; transport(5); access(5), "EMAIL ADDRESS PATTERNS" and "HOST
NAME/ADDRESS PATTERNS"; relay_domains in postconf(5).

A local part that is no dot-string is tried with quotes first and then without, at every step: tables have it either
way.

A key is what a stranger chose, and each candidate is a question to a database. So there are no more of them than an
address or the name of a host can have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_LISTED_ADDRESS = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.)*"|")+')
# RFC 5321, "Dot-string", with UTF-8 (RFC 6531): atoms, none empty, separated by dots.
_SPECIAL = r'\x00-\x20\x7f()<>@,;:\\"\[\]'
_DOT_STRING = re.compile(rf"[^.{_SPECIAL}]+(?:\.[^.{_SPECIAL}]+)*")
_IPV4 = re.compile(r"\d+\.\d+\.\d+\.\d+")
_MOST_LABELS = 127  # of a host name: RFC 1035, 255 octets, two of them for the shortest label
_UTF8_MOST = 4  # bytes of a character
_MOST_COLONS = 8  # of an IPv6 address, in which "::" stands for at least one group
# Never split: "mailer-daemon" is no extension of "mailer" (postconf(5), recipient_delimiter).
_WHOLE = frozenset({"mailer-daemon", "double-bounce", "postmaster"})


class Candidate(NamedTuple):
    """A key to try, and the address extension, delimiter included, that it lacks."""

    key: str
    extension: str = ""


class Rules(NamedTuple):
    """What the orders depend on."""

    recipient_delimiter: str = ""
    """Any of these characters separates an address extension; "": there are none."""
    local_domains: frozenset[str] = frozenset()
    """Domains, folded, whose addresses are also tried without the domain, as those of mydestination are."""


class _Address(NamedTuple):
    local: str
    """Without quotes."""
    extension: str
    domain: str | None

    @classmethod
    def parse(cls, key: str, delimiters: str) -> _Address:
        local, at, domain = key.rpartition("@")
        if not at:
            local = key
        if quoted := _QUOTED.fullmatch(local):
            local = _ESCAPED.sub(r"\1", quoted[1])
        local, extension = _split_extension(local, delimiters)
        return cls(local, extension, domain if at else None)

    def with_domain(self, domain: str) -> Iterator[Candidate]:
        """The address with *domain* behind it: with the extension, then, if there is one, without."""
        yield from self._forms(self.local + self.extension, domain, "")
        if self.extension:
            yield from self._forms(self.local, domain, self.extension)

    def whole(self) -> Iterator[Candidate]:
        return self.with_domain("" if self.domain is None else f"@{self.domain}")

    @staticmethod
    def _forms(local: str, domain: str, lacking: str) -> Iterator[Candidate]:
        if not _DOT_STRING.fullmatch(local):
            escaped = re.sub(r'(["\\])', r"\\\1", local)
            yield Candidate(f'"{escaped}"{domain}', lacking)
        yield Candidate(local + domain, lacking)


def _split_extension(local: str, delimiters: str) -> tuple[str, str]:
    """Split at the first delimiter, unless nothing would be left, or the whole is a name of its own."""
    lower = local.lower()
    if lower in _WHOLE or ("-" in delimiters and (lower.startswith("owner-") or lower.endswith("-request"))):
        return local, ""
    end = min((place for place in map(local.find, delimiters) if place >= 0), default=0)
    return (local[:end], local[end:]) if end else (local, "")


def _exact(key: str, rules: Rules) -> Iterable[Candidate]:  # noqa: ARG001 - one signature for all orders
    return (Candidate(key),)


def _address(key: str, rules: Rules) -> Iterator[Candidate]:
    """user+ext@domain, user@domain; in a local domain user+ext, user; @domain."""
    address = _Address.parse(key, rules.recipient_delimiter)
    yield from address.whole()
    if address.domain is None:
        return
    if address.domain.casefold() in rules.local_domains:
        yield from address.with_domain("")
    yield Candidate(f"@{address.domain}")


def _transport(key: str, rules: Rules) -> Iterator[Candidate]:
    """user+ext@sub.domain, user@sub.domain; sub.domain, .domain; ``*``."""
    if "@" in key:
        address = _Address.parse(key, rules.recipient_delimiter)
        yield from address.whole()
        yield from _names(address.domain or "", ".")
    else:
        yield from _names(key, ".")
    if key != "*":
        yield Candidate("*")


def _access(key: str, rules: Rules) -> Iterator[Candidate]:
    """user+ext@sub.domain, user@sub.domain; sub.domain, domain; user+ext@, user@. Names and networks likewise."""
    if "@" not in key:
        yield from _network(key, rules) if _is_network(key) else _names(key)
        return
    address = _Address.parse(key, rules.recipient_delimiter)
    yield from address.whole()
    yield from _names(address.domain or "")
    yield from address.with_domain("@")


def _domain(key: str, rules: Rules) -> Iterator[Candidate]:  # noqa: ARG001
    """sub.domain, domain."""
    yield from _names(key)


def _network(key: str, rules: Rules) -> Iterator[Candidate]:  # noqa: ARG001
    """192.0.2.77, 192.0.2, 192.0, 192; 2001:db8::1, 2001:db8:, 2001:db8, 2001. A host name: as it is."""
    yield Candidate(key)
    if not _is_network(key):
        return
    delimiter = ":" if ":" in key else "."
    while delimiter in key:
        key = key.rpartition(delimiter)[0]
        yield Candidate(key)


def _is_network(key: str) -> bool:
    # A literal in brackets, which a client may say in HELO, is cut like a name.
    return _IPV4.fullmatch(key) is not None or (0 < key.count(":") <= _MOST_COLONS and not key.startswith("["))


def _names(name: str, prefix: str = "") -> Iterator[Candidate]:
    """*name* and its parent domains, these with *prefix*. Address literals are cut like names, as Postfix does.

    Of a name with more labels than the name of a host can have, only the parents that can be one: not those that lie
    nearest to it, for otherwise such a name would get around what a table says about all names below a domain.
    """
    if name:
        yield Candidate(name)
    parent = name.find(".", 1)
    if name.count(".") > _MOST_LABELS:
        parent = len(name.rsplit(".", _MOST_LABELS)[0])
    while parent > 0:
        if rest := name[parent + 1 :]:
            yield Candidate(prefix + rest)
        parent = name.find(".", parent + 1)


Order = Callable[[str, Rules], Iterable[Candidate]]
"""Returns the keys to try for the one that was asked."""

ORDERS: Mapping[str, Order] = {
    "exact": _exact,
    "address": _address,
    "transport": _transport,
    "access": _access,
    "domain": _domain,
    "network": _network,
}
"""The orders, by the name that the setting ``search`` gives them: functions of the key that was asked."""


def bounded(order: Order, max_size: int) -> Order:
    """Return *order* for keys of at most *max_size* bytes: none is tried for a longer one."""

    def candidates(key: str, rules: Rules) -> Iterable[Candidate]:
        is_long = len(key) * _UTF8_MOST > max_size and len(key.encode("utf-8", "surrogateescape")) > max_size
        return () if is_long else order(key, rules)

    return candidates


def propagate(extension: str, result: str) -> str:
    """Return *result*, addresses separated by commas, with *extension* in each of them.

    "propagate_unmatched_extensions" in postconf(5). A result ``@domain`` stays as it is: Postfix puts the local part
    that it asked for in front, and that has the extension.
    """
    return _LISTED_ADDRESS.sub(lambda match: _extend(extension, match[0]), result)


def _extend(extension: str, text: str) -> str:
    address = text.strip()
    if not address or address.startswith("@"):
        return text
    local, at, domain = address.rpartition("@")
    if not at:
        local = address
    extended = f'{local[:-1]}{extension}"' if _QUOTED.fullmatch(local) else local + extension
    return text.replace(address, extended + at + (domain if at else ""))
