"""The layout of the project: what lies at the top, and which part may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "prefork_socketmap"

# For each part, what it may import of this package besides itself; a name stands for all that is below it.
ALLOWED = {
    "socketmap": [],
    "settings": [],
    "config": ["settings"],
    "prefork": ["settings"],
    "maps": ["socketmap", "settings"],
    "service": ["socketmap", "prefork", "config"],
    "background": ["prefork"],
    "asynchronous": [],
    "registered": ["prefork.listener"],
    "usage": ["settings"],
    "client": ["socketmap", "settings", "prefork.listener"],
}
# These put the parts together.
UNBOUND = {"daemon", "foreground", "server", "testing", "__init__", "__main__"}


def part_of(path: Path) -> str:
    """Return the name of the part that the module at *path* belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Return what the module at *path* imports of this package, as dotted names below the package."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # "from . import x" counts its dots from the module's own package.
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top == PACKAGE.name:
                yield rest


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_has_its_rule() -> None:
    assert {part_of(path) for path in MODULES} <= ALLOWED.keys() | UNBOUND


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if part_of(path) not in UNBOUND],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_a_module_imports_only_what_its_part_may(path: Path) -> None:
    allowed = [part_of(path), *ALLOWED.get(part_of(path), [])]
    for name in imports(path):
        assert any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed), f"{path} imports {name}"


def test_the_top_level_holds_these_names_and_no_others() -> None:
    generated = (ROOT / ".gitignore").read_text().replace("/\n", "\n").split()
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    found = {name for name in names if not any(fnmatch(name, pattern) for pattern in generated)}
    expected = {"pyproject.toml", "README.md", "LICENSE", "prefork_socketmap", "etc", "tests", "man"}
    assert found - {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"} == expected
