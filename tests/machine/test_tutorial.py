"""The tutorial, prefork-socketmap(7): each command in it is said, in order, and prints what stands there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.machine.base import base
from tests.machine.clone import ROOT
from tests.machine.machine import Machine

PAGE = ROOT / "man/prefork-socketmap.7"
_HERE_DOCUMENT = re.compile(r"<<'(\w+)'$")


@dataclass
class Step:
    """A command, and the lines that it prints."""

    command: str
    output: list[str]


def steps() -> list[Step]:
    """Return all commands of the page."""
    found: list[Step] = []
    for display in re.findall(r"^\.Bd -literal\n(.*?)^\.Ed$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL):
        lines = iter(display.replace(r"\&", "").replace(r"\e", "\\").splitlines())
        for line in lines:
            if not line.startswith("# "):
                found[-1].output.append(line)
                continue
            command = line[2:]
            if here := _HERE_DOCUMENT.search(line):
                for document in lines:
                    command += f"\n{document}"
                    if document == here[1]:
                        break
            found.append(Step(command, []))
    return found


def pattern(output: list[str]) -> str:
    """Return a regular expression for what is printed: numbers differ, and "..." is anything."""
    text = "".join(f"{line}\n" if line != "..." else line for line in output)
    pieces = [re.sub(r"\d+", r"\\d+", re.escape(piece)) for piece in text.split("...")]
    return "(?s:.*)".join(re.sub(r"(\\ )+", r"\\s+", piece) for piece in pieces)


def test_every_command_works_and_prints_what_is_promised(release: str, packages: list[Path]) -> None:
    with Machine(base(release)) as machine:
        machine.path(f"/root/{packages[0].name}").write_bytes(packages[0].read_bytes())
        # What an installation of PostgreSQL leaves, but for some of those without a locale.
        machine.shell("pg_lsclusters -h | grep -q . || pg_createcluster $(ls /usr/lib/postgresql) main")
        machine.run("systemctl", "restart", "postgresql")
        directory = "/root"
        for step in steps():
            done = machine.run("bash", "-c", f"exec 2>&1\ncd {directory}\n{step.command}\n", check=False)
            if step.command.startswith("cd "):
                directory = step.command[3:]
            printed = done.stdout
            assert re.fullmatch(pattern(step.output), printed), f"# {step.command}\n{printed}"


@pytest.mark.parametrize(
    "printed", ["alice", "alice\nbob\n", ""], ids=["no end of line", "a line too much", "nothing"]
)
def test_what_is_printed_is_compared(printed: str) -> None:
    assert re.fullmatch(pattern(["alice"]), "alice\n")
    assert not re.fullmatch(pattern(["alice"]), printed)


def test_the_page_has_commands() -> None:
    assert len(steps()) > 30
