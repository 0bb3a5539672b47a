"""The type ``tls-policy``: each rule of RFC 7672 and RFC 8461 kept and broken by a domain, with the answer.

Against a real authoritative server, a real resolver that validates, and policy hosts over HTTPS on port 443.
"""

from __future__ import annotations

import pytest

from prefork_socketmap.maps.base import Map
from prefork_socketmap.socketmap.messages import Status
from tests.maps.tlspolicydomains import PLAIN, Domain, by_dane, by_policy, by_record
from tests.maps.tlspolicyworld import MakeMap, World


def told(table: Map, key: str) -> str:
    """Return what Postfix is told, of a failure the status."""
    reply = table.lookup(key)
    return reply.text if reply.status is Status.OK else reply.status.value


@pytest.mark.parametrize("domain", [*by_dane(), *by_record(), *by_policy()], ids=lambda domain: domain.key)
def test_a_domain_gets_the_answer_that_the_rules_give(make: MakeMap, domain: Domain) -> None:
    assert told(make(timeout=5, query_timeout=2), domain.key) == domain.reply


HOSTILE = [
    "status-404", "status-500", "status-203", "redirected", "type-html", "type-none", "type-with-charset",
    "type-in-capitals", "compressed", "drips", "floods", "cut-off", "too-short", "many-headers",
    "certificate-of-another", "certificate-expired", "certificate-with-common-name", "certificate-with-wildcard",
    "certificate-with-high-wildcard", "certificate-of-stranger",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_policy_host_is_believed_only_by_the_rules(world: World, make: MakeMap, name: str) -> None:
    domain = world.domains[f"{name}.{PLAIN}"]
    assert told(make(timeout=3), domain.key) == domain.reply


def test_every_policy_host_of_the_table_is_tried(world: World) -> None:
    others = {domain.key for domain in [*by_dane(), *by_record(), *by_policy()]}
    assert world.domains.keys() - others == {f"{name}.{PLAIN}" for name in HOSTILE}
