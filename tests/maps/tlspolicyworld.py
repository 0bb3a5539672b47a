"""A small internet for tests of ``tls-policy``: DNS with zones signed or not, and policy hosts. See the fixtures."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from prefork_socketmap.maps import registry
from prefork_socketmap.maps.base import Map
from tests.integration.servers.dnsservers import RESOLVER, Nsd, Unbound, dns_servers
from tests.integration.servers.namespace import private_network
from tests.integration.servers.policyhosts import PolicyHosts
from tests.maps import tlspolicydomains
from tests.maps.tlspolicydomains import BOGUS, DEAD, SIGNED, Domain


@dataclass
class World:
    authority: Nsd
    resolver: Unbound
    hosts: PolicyHosts
    domains: dict[str, Domain] = field(default_factory=dict)

    def settings(self, **table: object) -> dict[str, object]:
        """Return the settings of a map in this world, but for the store's file."""
        return {"type": "tls-policy", "resolver": [RESOLVER], "tls_CAfile": str(self.hosts.authority.file), **table}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """The world, in a network of its own, in which the module's tests run."""
    with private_network(), PolicyHosts() as hosts:
        domains = [
            *tlspolicydomains.by_dane(),
            *tlspolicydomains.by_record(),
            *tlspolicydomains.by_policy_host(hosts),
            *tlspolicydomains.by_policy(),
        ]
        for domain in domains:
            if domain.policy is not None:
                hosts.add(domain.key, domain.policy, **domain.site)
        hosts.certify_all()
        zones = tlspolicydomains.zones(domains)
        with dns_servers(zones, signed=[SIGNED], bogus=[BOGUS], dead=[DEAD]) as (authority, resolver):
            yield World(authority, resolver, hosts, {domain.key: domain for domain in domains})


MakeMap = Callable[..., Map]


@pytest.fixture
def make(world: World, tmp_path: Path) -> Iterator[MakeMap]:
    """Return a maker of open maps, all of one name and with one store, from settings that are not the usual."""
    tmp_path.chmod(0o700)
    with contextlib.ExitStack() as stack:

        def make(**table: object) -> Map:
            store = {} if "redis" in table else {"policy_cache": "policies.sqlite"}
            found = registry.build({"m": world.settings(**store, **table)}, tmp_path)["m"]
            found.open()
            stack.callback(found.close)
            return found

        yield make


class Clock:
    """The time, which can be put forward."""

    def __init__(self) -> None:
        self._now = time.time
        self._ahead = 0.0

    def __call__(self) -> float:
        return self._now() + self._ahead

    def advance(self, seconds: float) -> None:
        """Let so much time pass at once."""
        self._ahead += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put a clock in the place of ``time.time``."""
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock
