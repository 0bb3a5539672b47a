"""The sample configuration works as shipped."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from prefork_socketmap.client import SocketmapClient
from prefork_socketmap.daemon import configfile
from prefork_socketmap.maps import registry
from prefork_socketmap.prefork.listener import Endpoint
from tests.daemon.installation import Installation

SAMPLES = ["prefork-socketmap.toml", "sample.aliases", "sample.py"]


@pytest.fixture
def shipped(etc: Path, installation: Installation) -> Installation:
    """A copy of what is shipped, on a port of its own."""
    for name in SAMPLES:
        shutil.copy(etc / name, installation.directory)
    text = installation.config.read_text().replace("127.0.0.1:27823", f"127.0.0.1:{installation.port}")
    installation.config.write_text(text.replace('#runtime_dir = "/run/prefork-socketmap"', 'runtime_dir = "run"'))
    return installation


def test_every_map_answers_what_the_file_says(shipped: Installation) -> None:
    shipped.start()
    questions = re.findall(r"postmap -q (\S+) socketmap:(\S+):(\w+)$", shipped.config.read_text(), re.MULTILINE)
    answers = {}
    for key, endpoint, name in questions:
        if name == "mailboxes":  # it is commented out
            continue
        with SocketmapClient(endpoint) as client:
            answers[name, key] = client.lookup(name, key)
    assert answers == {
        ("domains", "example.com"): "OK",
        ("access", "former@example.com"): "REJECT this person has left",
        ("transport", "anybody@example.net"): "smtp:[mail.example.net]",
        ("aliases", "info@example.com"): "alice@example.com",
        ("aliases", "anybody@example.org"): "alice@example.com",
    }


def test_an_alias_with_two_addresses_gets_both(shipped: Installation) -> None:
    shipped.start()
    assert shipped.lookup("aliases", "sales@example.com") == "alice@example.com, bob@example.com"


def test_it_listens_where_the_readme_asks(etc: Path) -> None:
    settings = configfile.load(etc / "prefork-socketmap.toml")
    assert settings.endpoints == (Endpoint.parse("inet:127.0.0.1:27823"),)


def test_what_is_commented_out_is_right_as_well(etc: Path, tmp_path: Path) -> None:
    """Every line that can be switched on by taking its "#" away is valid."""
    text = re.sub(r"^#(?=\w+ =|\[)", "", (etc / "prefork-socketmap.toml").read_text(), flags=re.MULTILINE)
    assert {"user", "allow", "process_limit", "lookup_timeout"} <= tomllib.loads(text).keys()
    file = tmp_path / "file.toml"
    # The user is the one that a package makes.
    file.write_text(re.sub(r"^(user|group) = .*$", "", text, flags=re.MULTILINE))
    settings = configfile.load(file)
    assert settings.log.lookups
    for name in ("sample.py", "sample.aliases"):
        shutil.copy(etc / name, tmp_path)
    assert "mailboxes" in registry.build(settings.maps, tmp_path)
