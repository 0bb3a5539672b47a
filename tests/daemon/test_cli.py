"""The command line itself."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest

from prefork_socketmap.daemon import cli
from tests.daemon.installation import COMMAND, TIMEOUT

COMMANDS = ["serve", "check", "reload", "upgrade", "stop", "status", "query"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=TIMEOUT)


def test_the_version_is_told() -> None:
    assert run("--version").stdout == f"prefork-socketmap {importlib.metadata.version('prefork-socketmap')}\n"


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    assert [command for command in COMMANDS if f"\n    {command} " not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_that_fits_a_screen(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0
    assert 5 < result.stdout.count("\n") < 24


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["serve", "--nonsense"], ["query"]])
def test_wrong_usage_has_its_own_exit_code(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == os.EX_USAGE
    assert result.stderr.startswith("usage: prefork-socketmap")


def test_a_command_loads_no_more_than_it_needs() -> None:
    """The command line is what an init script runs many times; and the master keeps what it has loaded."""
    program = "import sys; from prefork_socketmap.daemon import cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = ["prefork_socketmap.maps", "prefork_socketmap.daemon.serve", "daemon", "sqlite3", "ssl"]
    assert [module for module in heavy if module in loaded] == []


def test_every_command_leads_to_a_function() -> None:
    for command in COMMANDS:
        arguments = ["inet:h:1:m", "key"] if command == "query" else []
        module, _, function = cli.parser().parse_args([command, *arguments]).run.partition(":")
        assert callable(getattr(importlib.import_module(f"prefork_socketmap.daemon.{module}"), function))
