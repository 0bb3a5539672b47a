"""What ``check`` finds out about the resolvers of a map of the type ``tls-policy``, before any mail is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefork_socketmap.maps.base import UncheckedError
from tests.integration.servers.dnsservers import AUTHORITY, NOBODY, RESOLVER, dns_servers
from tests.integration.servers.namespace import private_network
from tests.maps.opening import OpenMap

NO_DANE = "the resolver does not validate what is signed, so there is no DANE"


@pytest.fixture
def make(open_map: OpenMap, tmp_path: Path) -> OpenMap:
    """Return a maker of open maps that ask our resolver, if not another one."""
    tmp_path.chmod(0o700)
    settings = {"resolver": [RESOLVER], "query_timeout": 1, "policy_cache": "cache"}
    return lambda **table: open_map("tls-policy", **{**settings, **table})


def test_a_resolver_that_validates_is_right(make: OpenMap, caplog: pytest.LogCaptureFixture) -> None:
    with private_network(), dns_servers({".": []}, signed=["."]):
        make().verify()
        make(resolver=[NOBODY, RESOLVER]).verify()
    assert caplog.text == ""


def test_one_that_does_not_validate_is_told_of_where_dane_is_looked_for(
    make: OpenMap, caplog: pytest.LogCaptureFixture
) -> None:
    with private_network(), dns_servers({".": []}, signed=[]):
        make(dane=False).verify()
        assert caplog.text == ""
        make().verify()
    assert NO_DANE in caplog.text


def test_one_that_does_not_answer_is_told_of(make: OpenMap) -> None:
    problem = r"^maps\.m\.resolver: the root NS: no resolver answers$"
    with private_network(), pytest.raises(UncheckedError, match=problem):
        make(resolver=[NOBODY]).verify()


def test_one_that_is_no_resolver_is_told_of(make: OpenMap) -> None:
    problem = r"^maps\.m\.resolver: the root NS: the resolver reports a failure$"
    with (
        private_network(),
        dns_servers({"example": []}, signed=[]),
        pytest.raises(UncheckedError, match=problem),
    ):
        make(resolver=[AUTHORITY]).verify()
