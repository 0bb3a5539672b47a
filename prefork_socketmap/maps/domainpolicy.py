"""What a domain publishes of its TLS policies now, given what was known of it before; and what Postfix is told of it.

When it is looked for, and how long an answer holds, is the business of ``tlspolicy``. Section numbers are those of
RFC 8461 (MTA-STS).
"""

from __future__ import annotations

import json
import logging
import ssl
import time
from typing import NamedTuple

from prefork_socketmap.maps import mtasts, policyhost
from prefork_socketmap.maps.base import log
from prefork_socketmap.maps.dane import DaneError, Discovery, Finding
from prefork_socketmap.maps.dnsclient import Answer, DnsClient, DnsError, Failure
from prefork_socketmap.maps.mtasts import Policy, PolicyError
from prefork_socketmap.maps.nexthop import NextHop
from prefork_socketmap.maps.policyhost import FetchError
from prefork_socketmap.maps.ratelimit import RateLimitedLogger

# Seconds. What DNS says holds for as long as it says, within these bounds.
SHORTEST, LONGEST = 60.0, 3600.0
# A policy is fetched again about once a day (3.3, 10.2);
_DAY = 86400.0
# after a fetch that failed, so long before the next one for the same id (3.3).
_FETCH_PAUSE = 300.0
_MOST_ADDRESSES = 4
_LONGEST_REPORT = 50_000
"""Characters of an answer with TLSRPT attributes; they are left out of a longer one. Postfix takes 100000 bytes."""


class Known(NamedTuple):
    """What is known of a domain beside its answer."""

    id: str = ""
    """The policy's, when it was fetched; "" for no policy."""
    fetched: float = 0.0
    policy: Policy | None = None
    failed_id: str = ""
    """For which a fetch has failed,"""
    failed: float = 0.0
    """and when."""
    failures: int = 0
    """How many refreshes have failed, one after the other."""

    @property
    def expires(self) -> float:
        """When the policy does; it lives for as long as an answer at least."""
        return self.fetched + max(self.policy.max_age, SHORTEST) if self.policy else 0.0

    @property
    def live_policy(self) -> Policy | None:
        """The policy, unless it has expired."""
        return self.policy if self.expires > time.time() else None

    def dump(self) -> str:
        """Return it as ``load`` reads it."""
        return json.dumps(self)

    @classmethod
    def load(cls, text: str) -> Known:
        """Read what ``dump`` has written; what is of another version is nothing."""
        try:
            identity, fetched, policy, *rest = json.loads(text)
            return cls(identity, fetched, Policy(*policy) if policy else None, *rest)
        except (ValueError, TypeError):
            return cls()


class UnknownPolicyError(Exception):
    """There is no telling what the answer is, so no mail may go; the text says why."""

    def __init__(self, problem: object, *, overrides_policy: bool) -> None:
        super().__init__(str(problem))
        self.overrides_policy = overrides_policy
        """Whether even a policy that is known is no answer: DANE fails, and MTA-STS must not override that."""


class Look:
    """A look at what a next hop's domain publishes now, until *deadline* of ``time.monotonic``."""

    def __init__(self, client: DnsClient, next_hop: NextHop, known: Known, deadline: float) -> None:
        self._client = client
        self._next_hop = next_hop
        self._known = known
        self._deadline = deadline

    def dane(self) -> Finding:
        """Find out about DANE. Raises UnknownPolicyError."""
        try:
            finding = Discovery(self._ask_for_dane, self._next_hop).run()
        except DaneError as error:
            raise UnknownPolicyError(error, overrides_policy=True) from error
        except DnsError as error:
            raise UnknownPolicyError(error, overrides_policy=error.failure is Failure.BOGUS) from error
        log.debug("%s: DANE: %s", self._next_hop, finding.dane.value)
        return finding

    def mta_sts(self, tls: ssl.SSLContext, complaints: RateLimitedLogger) -> tuple[Known, float]:
        """Return what is known of MTA-STS now, and for how many seconds. Raises UnknownPolicyError."""
        known = self._known
        try:
            answer = self._ask(f"_mta-sts.{self._next_hop.domain}", "TXT")
        except DnsError as error:
            if error.failure is Failure.BOGUS and not known.live_policy:
                raise UnknownPolicyError(error, overrides_policy=False) from error
            log.debug("%s: MTA-STS: %s; %s", self._next_hop, error, self._what_stays())
            return known, 0
        identity = self._id(answer)
        if identity is None or not self._is_to_be_fetched(identity):
            return known, answer.ttl
        now = time.time()
        try:
            policy = self._fetch(tls)
        except (FetchError, PolicyError) as error:
            # 3.3: administrators should hear of it.
            level = logging.WARNING if known.live_policy and known.live_policy.mode != "none" else logging.INFO
            complaints.log(level, "%s: MTA-STS: %s; %s", self._next_hop, error, self._what_stays())
            return known._replace(failed_id=identity, failed=now), min(answer.ttl, _FETCH_PAUSE)
        log.debug("%s: MTA-STS: fetched: %s", self._next_hop, "; ".join(policy.lines)[:1000])
        return Known(identity, now, policy), answer.ttl

    def _ask(self, name: str, kind: str) -> Answer:
        return self._client.ask(name, kind, self._deadline)

    def _ask_for_dane(self, name: str, kind: str) -> Answer:
        try:
            return self._ask(name, kind)
        except DnsError as error:
            if time.monotonic() < self._deadline:
                raise
            # Of what there was no time for, it must not be concluded that it is not there.
            raise UnknownPolicyError(error, overrides_policy=False) from error

    def _id(self, answer: Answer) -> str | None:
        """Return the policy's id by the TXT records (3.1)."""
        texts = [b"".join(each.strings).decode("latin-1") for each in answer.records]
        try:
            identity = mtasts.record_id(texts)
        except PolicyError as error:
            log.debug("%s: MTA-STS: %s; %s", self._next_hop, error, self._what_stays())
            return None
        if identity is None:
            log.debug("%s: MTA-STS: there is no record; %s", self._next_hop, self._what_stays())
        return identity

    def _is_to_be_fetched(self, identity: str) -> bool:
        known, now = self._known, time.time()
        if known.failed_id == identity and 0 <= now - known.failed < _FETCH_PAUSE:
            log.debug("%s: MTA-STS: fetching it has just failed; %s", self._next_hop, self._what_stays())
            return False
        policy = known.live_policy
        if policy is None or known.id != identity:
            return True
        is_old = now - known.fetched >= min(_DAY, policy.max_age / 2)
        if not is_old:
            log.debug("%s: MTA-STS: id %s is known, mode %s", self._next_hop, identity, policy.mode)
        return is_old

    def _fetch(self, tls: ssl.SSLContext) -> Policy:
        host = f"mta-sts.{self._next_hop.domain}"
        addresses: list[str] = []
        for kind in ("A", "AAAA"):
            try:
                addresses += [each.address for each in self._ask(host, kind).records[: _MOST_ADDRESSES // 2]]
            except DnsError as error:
                log.debug("DNS: %s", error)
        return policyhost.fetch(host, addresses, tls, self._deadline)

    def _what_stays(self) -> str:
        policy = self._known.live_policy
        if policy is None:
            return "no policy is known"
        return f"the policy that is known, mode {policy.mode}, holds until it expires"


def answer(policy: Policy, domain: str, *, tlsrpt: bool) -> str:
    """Return what Postfix is told of an MTA-STS policy: "smtp_tls_policy_maps" in postconf(5), TLSRPT_README.

    "" is "not found".
    """
    if policy.mode == "enforce":
        # Postfix has no wildcard for one label; its .parent matches any number of them.
        patterns = (each.removeprefix("*") for each in policy.mx)
        text = f"secure match={':'.join(patterns)} servername=hostname"
    elif policy.mode == "testing" and tlsrpt:
        text = "may"
    else:
        return ""
    if not tlsrpt:
        return text
    report = f"{text} {_report(policy, domain)}"
    return report if len(report) <= _LONGEST_REPORT else text


def _report(policy: Policy, domain: str) -> str:
    # Braces would end the attribute, and let a stranger write the next one.
    lines = [line for line in policy.lines if line.isascii() and not {"{", "}"} & set(line)]
    return " ".join(
        [
            f"policy_type=sts policy_domain={domain} policy_ttl={min(policy.max_age, int(LONGEST))}",
            *(f"{{ policy_string = {line} }}" for line in lines),
            *(f"mx_host_pattern={pattern}" for pattern in policy.mx),
        ]
    )
