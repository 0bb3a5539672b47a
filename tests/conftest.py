"""Where the fixtures come from that more than one directory of tests uses."""

from __future__ import annotations

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
