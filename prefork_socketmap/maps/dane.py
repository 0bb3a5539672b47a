"""What RFC 7672 (DANE for SMTP) makes of a next hop: for which of its MX hosts there are TLSA records to go by.

Postfix does DANE itself, host by host, when the answer is ``dane`` or ``dane-only``; what is found out here is which
of these it shall be. Section numbers are those of the RFC.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

from dns.rdtypes.ANY.TLSA import TLSA

from prefork_socketmap.maps.base import log
from prefork_socketmap.maps.dnsclient import Answer, Ask, DnsError, Failure
from prefork_socketmap.maps.nexthop import NextHop

# A domain with more hosts is looked at in part, and so cannot be dane-only.
_MOST_HOSTS = 20
_LENGTHS = {1: 32, 2: 64}  # of SHA-256 and SHA-512
_SEQUENCE = 0x30


class Dane(enum.Enum):
    """What there is of DANE at a next hop."""

    NONE = "no host has TLSA records"
    UNUSABLE = "there are TLSA records, but none that can be used"
    FAILED = "the TLSA records of some hosts cannot be had, and the others have none"
    SOME = "some hosts have TLSA records, or the MX records are not signed"
    ALL = "all hosts have TLSA records, and the MX records are signed"


class Finding(NamedTuple):
    """What was found out, and for how many seconds that holds."""

    dane: Dane
    ttl: int


class DaneError(Exception):
    """TLSA records cannot be had, of any host, and may be there: no mail may go (2.1.2)."""


class Discovery:
    """Looks at one next hop, by asking *ask*."""

    def __init__(self, ask: Ask, next_hop: NextHop) -> None:
        self._ask_for = ask
        self._next_hop = next_hop
        self._ttl = 2**31 - 1
        self._problem: DnsError | None = None
        """What went wrong last with the addresses of a host."""

    def run(self) -> Finding:
        """Find out. Raises DaneError; DnsError when the hosts, or the addresses of all of them, cannot be had."""
        names, is_secure = self._hosts()
        # Postfix does not send to a host whose address it cannot have.
        hosts = [each for each in map(self._host, names[:_MOST_HOSTS]) if each is not None]
        if self._problem and not hosts:
            raise self._problem
        if hosts and set(hosts) == {Dane.FAILED}:
            raise DaneError(f"{self._next_hop}: {Dane.FAILED.value}")
        is_complete = is_secure and self._problem is None and len(names) <= _MOST_HOSTS
        return Finding(_sum(set(hosts), is_complete=is_complete), self._ttl)

    def _ask(self, name: str, kind: str) -> Answer:
        answer = self._ask_for(name, kind)
        self._ttl = min(self._ttl, answer.ttl)
        return answer

    def _hosts(self) -> tuple[Sequence[str], bool]:
        """Return the names of the hosts, the preferred first, and whether they are what the domain has signed."""
        domain = self._next_hop.domain
        if not self._next_hop.has_mx:
            return [domain], True
        answer = self._ask(domain, "MX")
        if not answer.records:
            return [domain], answer.is_secure  # 2.2.2; RFC 5321, 5.1
        records = sorted(answer.records, key=lambda each: each.preference)
        names = [each.exchange.to_text(omit_final_dot=True).lower() for each in records]
        # A null MX (RFC 7505): no mail is sent.
        return list(dict.fromkeys(name for name in names if name not in ("", "."))), answer.is_secure

    def _host(self, name: str) -> Dane | None:
        """Return what one host has; None if it has no address."""
        try:
            bases = self._base_domains(name)
        except DnsError as error:
            if error.failure is Failure.BOGUS:
                return Dane.FAILED
            log.debug("DNS: %s", error)
            self._problem = error
            return None
        for base in bases or ():
            try:
                answer = self._ask(f"_{self._next_hop.port}._tcp.{base}", "TLSA")
            except DnsError as error:
                log.debug("DNS: %s", error)
                return Dane.UNUSABLE if error.failure is Failure.MALFORMED else Dane.FAILED
            if answer.is_secure and answer.records:
                return Dane.ALL if any(map(_is_usable, answer.records)) else Dane.UNUSABLE
        return None if bases is None else Dane.NONE

    def _base_domains(self, name: str) -> Sequence[str] | None:
        """Return the names whose TLSA records may count (2.2.2); None if the host has no address."""
        answer = self._ask(name, "A")
        if not answer.records:
            answer = self._ask(name, "AAAA")
        if not answer.records:
            return None
        if not answer.is_alias:
            return (name,) if answer.is_secure else ()
        if answer.is_secure:
            return answer.name, name
        # Of an alias that leads out of what is signed, the first step may be signed.
        first = self._ask(name, "CNAME")
        return (name,) if first.is_secure and first.records else ()


def _sum(found: set[Dane], *, is_complete: bool) -> Dane:
    """Return what holds for all hosts, of each of which one of *found* holds."""
    if found == {Dane.ALL} and is_complete:
        return Dane.ALL
    if Dane.ALL in found:
        return Dane.SOME  # with dane, Postfix asks for itself, and spares a host whose records it cannot have
    return next((each for each in (Dane.FAILED, Dane.UNUSABLE) if each in found), Dane.NONE)


def _is_usable(record: TLSA) -> bool:
    """Whether an MTA can go by a TLSA record: 3.1 for the usages, RFC 6698, 2.1 for the rest."""
    usable = record.usage in (2, 3) and record.selector in (0, 1) and _has_right_size(record.mtype, record.cert)
    if not usable:
        log.debug("DNS: a TLSA record that cannot be used: %d %d %d", record.usage, record.selector, record.mtype)
    return usable


def _has_right_size(matching_type: int, data: bytes) -> bool:
    if matching_type == 0:
        return _is_der(data)
    return len(data) == _LENGTHS.get(matching_type)


def _is_der(data: bytes) -> bool:
    """Whether *data* is one DER sequence, as certificates and public keys are."""
    if len(data) < 2 or data[0] != _SEQUENCE:
        return False
    size = data[1]
    if size < 0x80:
        return len(data) == 2 + size
    count = size & 0x7F
    return 1 <= count <= 3 and len(data) == 2 + count + int.from_bytes(data[2 : 2 + count], "big")
