"""Every parameter of Postfix's tables has a counterpart, or the manual says that it has none, and why."""

from __future__ import annotations

import gzip
import re
import subprocess
from pathlib import Path

import pytest

from prefork_socketmap.daemon import translate
from prefork_socketmap.maps.setting import declared
from tests.integration.servers.process import program, unavailable
from tests.test_manual import SECTIONS, map_class

MAN_PAGES = Path("/usr/share/man/man5")


def parameters(kind: str) -> set[str]:
    """Return the parameters that Debian's manual page of *kind* documents."""
    path = MAN_PAGES / f"{kind}_table.5.gz"
    if not path.exists():
        unavailable(f"the manual page {kind}_table(5) is missing: apt install postfix-{kind}, with manual pages")
    items = re.findall(
        r'^\.IP "\\fB([a-zA-Z_, ]+?)(?: \(|\\f)', gzip.decompress(path.read_bytes()).decode(), re.MULTILINE
    )
    return {name for item in items for name in item.split(", ")}


def absent(kind: str) -> set[str]:
    """Return the parameters that our manual names as absent."""
    items = re.findall(rf"^\.It {kind} : Va (.*)$", SECTIONS["Parameters without a counterpart"], re.MULTILINE)
    return {name for item in items for name in item.split(" , ")}


@pytest.mark.parametrize("kind", translate.KINDS)
def test_every_parameter_of_postfix_is_supported_or_named_as_absent(kind: str) -> None:
    found = parameters(kind)
    assert len(found) >= 8, "the manual page was not understood"
    supported = dict(declared(map_class(translate._TYPES[kind]))).keys() - {"cache_size"}
    assert found - absent(kind) - translate.REWRITTEN[kind] - supported == set()
    assert absent(kind) & supported == set()


@pytest.mark.parametrize("kind", translate.KINDS)
def test_what_is_named_as_absent_is_what_convert_does_not_translate(kind: str) -> None:
    assert absent(kind) == translate.ABSENT[kind].keys()


@pytest.mark.parametrize("kind", translate.KINDS)
def test_every_supported_parameter_is_translated(kind: str) -> None:
    assert (
        parameters(kind) <= translate._READ[kind].keys() | translate.REWRITTEN[kind] | translate.ABSENT[kind].keys()
    )


def test_every_type_of_postfix_has_a_counterpart_or_is_named() -> None:
    known = subprocess.check_output([program("postconf", "postfix"), "-m"], text=True).split()
    lines = re.findall(r"^\.It (.*)$", SECTIONS["Types"], re.MULTILINE)
    assert set(known) <= {name for line in lines for name in line.split(" , ")}
