"""Questions to DNS resolvers: who is asked, for how long, and whose word counts about what DNSSEC has signed.

A resolver that validates says so with the AD bit (RFC 4035, 3.2.3). Who is between it and us can set the bit as well,
so it counts only from a resolver on the loopback interface, or one that the configuration trusts. The work is
dnspython's; not its own resolver, which does not tell who has answered, and takes the next resolver, trusted or not,
for one that fails.
"""

from __future__ import annotations

import enum
import ipaddress
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdatatype
import dns.resolver

from prefork_socketmap.maps.base import log
from prefork_socketmap.maps.host import Host

PORT = 53
_RESOLV_CONF = Path("/etc/resolv.conf")
# What passes unfragmented nearly everywhere; longer answers come over TCP. DNS Flag Day 2020.
_PAYLOAD = 1232
_TRIES = 2
_MOST_RECORDS = 100


class Failure(enum.Enum):
    """Why there is no answer."""

    SILENT = "no resolver answers"
    FAILED = "the resolver reports a failure"
    MALFORMED = "the answer has a record that is malformed"
    BOGUS = "the answer is bogus: its DNSSEC signatures are not valid"


class DnsError(Exception):
    """There is no answer, not even that there are no records."""

    def __init__(self, question: str, failure: Failure) -> None:
        super().__init__(f"{question}: {failure.value}")
        self.failure = failure


class Answer(NamedTuple):
    """What DNS says: records, perhaps none."""

    records: Sequence[Any]
    """Of dnspython's classes, one for each kind."""
    is_secure: bool
    """Whether a trusted resolver has validated all of it, that there are no records included."""
    name: str
    """Whose the records are: what was asked for, or what that is an alias of, in the end."""
    is_alias: bool
    ttl: int
    """Seconds."""


class Resolver(NamedTuple):
    """Where a resolver is."""

    address: str
    port: int

    @property
    def is_local(self) -> bool:
        """Whether nobody is between it and us."""
        return ipaddress.ip_address(self.address.partition("%")[0]).is_loopback

    def __str__(self) -> str:
        return f"{self.address}:{self.port}" if self.port != PORT else self.address

    @classmethod
    def parse(cls, text: str) -> Resolver:
        """Read an IP address with or without a port. Raises ValueError."""
        try:
            ipaddress.ip_address(text)
        except ValueError:
            host = Host.parse(text, PORT)
            ipaddress.ip_address(host.name)
            return cls(host.name, host.port)
        return cls(text, PORT)


class DnsClient:
    """Asks *resolvers*, or those of resolv.conf(5) if there are none; *trusted* are addresses whose AD bit counts.

    If any of them is trusted, none but the trusted are asked: whoever silences those shall not get another one's
    word taken. A question waits *timeout* seconds for each answer.
    """

    def __init__(self, resolvers: Sequence[Resolver], trusted: Sequence[Resolver], timeout: float) -> None:
        self._given = resolvers
        self._trusted = {each.address for each in trusted}
        self._timeout = timeout
        self._read: tuple[object, Sequence[Resolver]] = (None, ())

    @property
    def is_trusted(self) -> bool:
        """Whether the resolvers' word about signatures counts."""
        return self._choose()[1]

    def ask(self, name: str, kind: str, deadline: float) -> Answer:
        """Ask for records, until *deadline* (of ``time.monotonic``). Raises DnsError. *name*: "" is the root."""
        question = f"{name or 'the root'} {kind}"
        resolvers, is_trusted = self._choose()
        try:
            query = dns.message.make_query(
                name + ".", kind, use_edns=0, want_dnssec=True, payload=_PAYLOAD, flags=dns.flags.RD | dns.flags.AD
            )
        except dns.exception.DNSException:  # too long, with a label such as _mta-sts in front
            return Answer((), False, name, False, 0)
        begin = time.monotonic()
        response = self._exchange(query, resolvers, question, deadline)
        if response.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            raise DnsError(question, self._why(query, response, resolvers, question, deadline))
        answer = _answer(question, response, is_trusted=is_trusted)
        if log.isEnabledFor(logging.DEBUG):
            texts = ", ".join(_shown(each) for each in answer.records) or dns.rcode.to_text(response.rcode())
            log.debug(
                "DNS: %s: %s (%s, TTL %d s, %.1f ms)", question, texts,
                "signed" if answer.is_secure else "not signed", answer.ttl, (time.monotonic() - begin) * 1000,
            )  # fmt: skip
        return answer

    def _choose(self) -> tuple[Sequence[Resolver], bool]:
        """Return whom to ask, and whether they are trusted."""
        resolvers = self._given or self._of_the_system()
        trusted = [each for each in resolvers if each.is_local or each.address in self._trusted]
        return (trusted, True) if trusted else (resolvers, False)

    def _of_the_system(self) -> Sequence[Resolver]:
        """Return the resolvers of resolv.conf as it is now."""
        try:
            status = _RESOLV_CONF.stat()
            state = status.st_mtime_ns, status.st_ino
            if state != self._read[0]:
                found = dns.resolver.Resolver(str(_RESOLV_CONF)).nameservers
                self._read = state, [Resolver(str(each), PORT) for each in found]
        except (OSError, dns.exception.DNSException):
            # resolv.conf(5): if there is no such file, only the name server on this machine is asked.
            return [Resolver("127.0.0.1", PORT)]
        return self._read[1]

    def _exchange(
        self, query: dns.message.Message, resolvers: Sequence[Resolver], question: str, deadline: float
    ) -> dns.message.Message:
        """Return the first response that is one; a resolver's failure only if no other does better."""
        failed: dns.message.Message | None = None
        for _ in range(_TRIES):
            for resolver in resolvers:
                timeout = min(self._timeout, deadline - time.monotonic())
                if timeout <= 0:
                    break
                try:
                    response, _is_tcp = dns.query.udp_with_fallback(
                        query, resolver.address, timeout, resolver.port, ignore_unexpected=True
                    )
                except dns.exception.FormError as error:
                    raise DnsError(question, Failure.MALFORMED) from error
                except (OSError, EOFError, dns.exception.DNSException) as error:
                    log.debug("DNS: %s: no answer of %s: %s", question, resolver, type(error).__name__)
                    continue
                if response.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                    return response
                log.debug("DNS: %s: %s says %s", question, resolver, dns.rcode.to_text(response.rcode()))
                failed = response
            if failed is not None:
                return failed
        raise DnsError(question, Failure.SILENT)

    def _why(
        self, query: dns.message.Message, response: dns.message.Message, resolvers: Sequence[Resolver],
        question: str, deadline: float,
    ) -> Failure:  # fmt: skip
        """Tell a bogus answer from other failures: without validation (CD, RFC 4035, 3.2.2) there is an answer."""
        if response.rcode() != dns.rcode.SERVFAIL:
            return Failure.FAILED
        query.flags |= dns.flags.CD
        try:
            unchecked = self._exchange(query, resolvers, question, deadline)
        except DnsError:
            return Failure.FAILED
        return Failure.FAILED if unchecked.rcode() == dns.rcode.SERVFAIL else Failure.BOGUS


def _answer(question: str, response: dns.message.Message, *, is_trusted: bool) -> Answer:
    if not isinstance(response, dns.message.QueryMessage):
        raise DnsError(question, Failure.FAILED)
    try:
        chain = response.resolve_chaining()
    except dns.exception.DNSException as error:  # an endless chain of aliases, and the like
        raise DnsError(question, Failure.FAILED) from error
    return Answer(
        records=tuple(chain.answer or ())[:_MOST_RECORDS],
        is_secure=is_trusted and bool(response.flags & dns.flags.AD),
        name=chain.canonical_name.to_text(omit_final_dot=True).lower(),
        is_alias=bool(chain.cnames),
        ttl=min(int(chain.minimum_ttl), 2**31 - 1),
    )


def _shown(record: dns.rdata.Rdata) -> str:
    return record.to_text()[:200]


Ask = Callable[[str, str], Answer]
"""Asks for a name's records of a kind, within what is left of a lookup's time. Raises DnsError."""
