"""A library that is not installed: ``check`` says which extra brings it, and only the map that needs it fails."""

from __future__ import annotations

import os

import pytest

from prefork_socketmap.client import PermFail
from tests.daemon.installation import Installation

COLOURS = '[maps.colours]\ntype = "static"\nentries = { sky = "blue" }\n'
# The package, the extra that brings it, and the key that asks for it.
NEEDS = [
    ("urllib3", "http", 'type = "http"\n', "type"),
    ("ldap", "ldap", 'type = "ldap"\n', "type"),
    ("lmdb", "lmdb", 'type = "lmdb"\n', "type"),
    ("pymemcache", "memcache", 'type = "memcache"\n', "type"),
    ("pymysql", "mysql", 'type = "mysql"\n', "type"),
    ("pcre2", "pcre", 'type = "pcre"\n', "type"),
    ("psycopg", "postgresql", 'type = "postgresql"\n', "type"),
    ("redis", "redis", 'type = "redis"\n', "type"),
    ("dns", "tls-policy", 'type = "tls-policy"\n', "type"),
    ("redis", "redis", 'type = "tls-policy"\nredis = { hosts = ["localhost"] }\n', "redis"),
]


def without(installation: Installation, package: str) -> dict[str, str]:
    """Return the environment of a program for which *package* is not installed."""
    directory = installation.directory / "not_installed"
    directory.mkdir()
    (directory / f"{package}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{package}'\")\n")
    return {"PYTHONPATH": str(directory)}


@pytest.mark.parametrize(("package", "extra", "table", "key"), NEEDS, ids=[need[1] for need in NEEDS])
def test_check_says_which_extra_to_install(
    installation: Installation, package: str, extra: str, table: str, key: str
) -> None:
    installation.configure(maps=f"{COLOURS}[maps.m]\n{table}")
    result = installation.run("check", env=without(installation, package))
    assert result.returncode == os.EX_CONFIG
    assert f"{installation.config}: maps.m.{key}: " in result.stderr
    assert f"No module named '{package}'" in result.stderr
    assert result.stderr.endswith(f"install prefork-socketmap[{extra}]\n")


def test_a_missing_library_costs_only_the_map_that_needs_it(installation: Installation) -> None:
    installation.configure(maps=f'{COLOURS}[default_map]\ntype = "redis"\n')
    installation.start(env=without(installation, "redis"))
    assert installation.lookup("colours", "sky") == "blue"
    with pytest.raises(PermFail, match=r"install prefork-socketmap\[redis\]"):
        installation.lookup("other", "key")
    line = installation.logged("install prefork-socketmap[redis]")
    assert f"error: {installation.config}: default_map.type: " in line


def test_too_old_a_library_is_as_good_as_none(installation: Installation) -> None:
    installation.configure(maps=f'{COLOURS}[maps.m]\ntype = "http"\n')
    environment = without(installation, "urllib3")
    (installation.directory / "not_installed/urllib3.py").write_text('__version__ = "1.26.12"\n')
    (installation.directory / "not_installed/sitecustomize.py").write_text(
        "import sys, types\nsys.modules['urllib3.connection'] = module = types.ModuleType('urllib3.connection')\n"
        "module.HTTPConnection = module.HTTPSConnection = object\n"
    )
    result = installation.run("check", env=environment)
    assert result.returncode == os.EX_CONFIG
    assert "urllib3 2.2 or newer; an older one is installed" in result.stderr
    assert result.stderr.endswith("install prefork-socketmap[http]\n")
