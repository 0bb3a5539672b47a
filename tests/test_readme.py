"""README says what is true: its table of limits, and its example."""

from __future__ import annotations

import dataclasses
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from prefork_socketmap import Config
from prefork_socketmap.client import SocketmapClient, TempFail
from prefork_socketmap.daemon import cli
from prefork_socketmap.maps import registry
from tests.waiting import eventually

README = Path(__file__).parent.parent / "README.md"


def section(title: str) -> str:
    """Return the text below a heading."""
    return README.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def accepts(path: Path) -> bool:
    """Whether somebody listens on the Unix socket at *path*."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def test_the_table_of_limits_has_every_field_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| ", section("Config"), flags=re.MULTILINE)
    assert {name: float(default) for name, default in rows} == dataclasses.asdict(Config())


def test_every_command_and_every_map_type_is_named() -> None:
    text = section("The daemon")
    usage = cli.parser().format_help()
    commands = re.findall(r"^\| `prefork-socketmap (\w+)\b", text, flags=re.MULTILINE)
    assert commands
    assert sorted(commands) == sorted(re.findall(r"^    (\w+)\b", usage, flags=re.MULTILINE))
    types = text.partition("The types are")[2].partition(";")[0]
    assert sorted(re.findall(r"`([\w-]+)`", types)) == sorted(registry._BUILT_IN)


def test_the_library_example_works(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", section("The library"), flags=re.DOTALL)
    path = tmp_path / "sock"
    program = example.replace('listen_and_serve("127.0.0.1:27823")', f'listen_and_serve_unix("{path}")')
    assert program != example
    with subprocess.Popen([sys.executable, "-c", program]) as server:
        try:
            eventually(lambda: accepts(path), what="the example serves")
            with SocketmapClient(f"unix:{path}") as client:
                assert client.lookup("virtual_domains", "Example.COM") == "found"
                assert client.lookup("virtual_domains", "example.net") is None
                with pytest.raises(TempFail, match="there is no map other"):
                    client.lookup("other", "key")
        finally:
            server.terminate()
    assert server.returncode == 0
