"""CONTRIBUTING.md tells the truth: its diagrams name the code's states, and its paths exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefork_socketmap.prefork.scoreboard import State
from prefork_socketmap.prefork.table import Stage

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def diagram(title: str) -> str:
    """Return the diagram of a section."""
    (found,) = re.findall(
        r"```mermaid\n(.*?)```", TEXT.partition(f"### {title}\n")[2].partition("\n### ")[0], flags=re.DOTALL
    )
    return str(found)


def states(text: str) -> set[str]:
    """Return the states that a diagram names."""
    return {name for pair in re.findall(r"^    (\S+) --> (\S+) : ", text, flags=re.MULTILINE) for name in pair} - {
        "[*]"
    }


@pytest.mark.parametrize(("title", "kinds"), [("The life of a request", Stage), ("The life of a worker", State)])
def test_a_diagram_names_every_state_and_no_other(title: str, kinds: type[State] | type[Stage]) -> None:
    assert states(diagram(title)) == {kind.name for kind in kinds}


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_every_file_that_is_named_is_there(name: str) -> None:
    text = (ROOT / name).read_text()
    named = set(re.findall(r"`([\w./]+(?:/|\.py|\.md|\.toml|/[\w.]+))`", text))
    places = [ROOT, ROOT / "prefork_socketmap", ROOT / "tests/daemon"]
    assert len(named) > 3
    assert {path for path in named if not any((place / path).exists() for place in places)} == set()


def test_every_type_of_test_has_its_place() -> None:
    """The table of tiers names each directory of tests."""
    directories = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}
    tiers = set(re.findall(r"`tests/(\w+)`", TEXT.partition("## The tests")[2].partition("\n## ")[0]))
    assert tiers == directories - {"socketmap"}
