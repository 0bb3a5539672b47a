"""Where the fixtures come from that more than one directory of tests uses; and which tests are fast."""

from __future__ import annotations

import re
import signal

import pytest

pytest_plugins = [
    "tests.integration.servers.dropping",
    "tests.integration.servers.httpd",
    "tests.integration.servers.mariadb",
    "tests.integration.servers.memcached",
    "tests.integration.servers.postgresql",
    "tests.integration.servers.redis",
    "tests.integration.servers.slapd",
    "tests.maps.opening",
    "tests.maps.tlspolicyworld",
    "tests.serving",
    "tests.crowd",  # it uses the one above
]

# What a shell starts in the background ignores SIGINT, and so would all programs that tests start, and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests that "pytest -m fast" runs: of the parts that are pure, and of the documents. One that starts a server of
# somebody else's, or many of ours, is not.
_FAST = re.compile(
    r"tests/(socketmap/|maps/(?!test_(sql_servers|envelopes|policystore))|etc/test_systemd|test_(client|config|manual|readme|settings|structure)\.py|"
    r"test_architecture\.py|daemon/test_(cli|configfile|install|newfile|notify|pidfile)\.py)"
)
_FOREIGN = ("tests.integration.", "tests.maps.tlspolicyworld")
_SLOW = {
    "test_a_damaged_cdb_raises_and_never_more_than_that",
    "test_many_networks_are_a_table",
    "test_workers_that_start_together_share_one_copy",
    "test_a_process_that_is_killed_in_a_write_loses_blocks_and_breaks_nothing",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast tests."""
    for item in items:
        if isinstance(item, pytest.Function) and _is_fast(item):
            item.add_marker(pytest.mark.fast)


def _is_fast(item: pytest.Function) -> bool:
    fixtures = [found[-1].func.__module__ for found in item._fixtureinfo.name2fixturedefs.values()]
    return (
        _FAST.match(item.nodeid) is not None
        and item.originalname not in _SLOW
        and not any(module.startswith(_FOREIGN) for module in fixtures)
    )
