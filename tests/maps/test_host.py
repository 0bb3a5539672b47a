"""Where a server is, as settings say it."""

from __future__ import annotations

import pytest

from prefork_socketmap.maps.host import Host, hosts
from prefork_socketmap.settings import SettingError


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("db.example.com", Host("db.example.com", 5432)),
        ("db.example.com:1", Host("db.example.com", 1)),
        ("inet:db.example.com:65535", Host("db.example.com", 65535)),
        ("192.0.2.1:5433", Host("192.0.2.1", 5433)),
        ("[2001:db8::1]", Host("2001:db8::1", 5432)),
        ("inet:[2001:db8::1]:5433", Host("2001:db8::1", 5433)),
        ("unix:/run/my sql:1", Host("", 0, "/run/my sql:1")),
    ],
)
def test_a_host_is_read(text: str, host: Host) -> None:
    assert Host.parse(text, 5432) == host


@pytest.mark.parametrize(
    "text",
    ["host:", "host:0", "host:65536", "host:http", ":1", "2001:db8::1", "[::1", "unix:run", "unix:", "http://host/"],
)
def test_what_is_no_host_is_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(SettingError, match=r'k: .* is not accepted here; expected "host", "host:port"'):
        hosts("k", [text])


def test_at_least_one_host_is_needed() -> None:
    with pytest.raises(SettingError, match="expected a list of at least one host"):
        hosts("k", [])
