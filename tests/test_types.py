"""The types of all public names are known to other type checkers than ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prefork_socketmap"
# Where the public names are defined: whole modules, and single names.
PUBLIC = (
    "__all__",
    "client",
    "config",
    "server",
    "socketmap",
    "testing",
    "prefork.listener.Endpoint",
    "prefork.listener.ListenError",
    "prefork.reload.StartError",
    "settings.SettingError",
)


def test_the_types_of_all_public_names_are_known(tmp_path: Path) -> None:
    pyright = shutil.which("pyright", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not pyright:
        pytest.skip("pyright is not installed: pip install '.[lint]'")
    # As it is installed, since pyright does not look behind an editable installation.
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    checked = subprocess.run(
        [pyright, "--pythonpath", sys.executable, "--verifytypes", PACKAGE.name, "--ignoreexternal", "--outputjson"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    symbols = json.loads(checked.stdout)["typeCompleteness"]["symbols"]
    prefixes = tuple(f"{PACKAGE.name}.{name}" for name in PUBLIC)
    public = [each for each in symbols if f"{each['name']}.".startswith(tuple(f"{prefix}." for prefix in prefixes))]
    assert len(public) > 100
    assert [each["name"] for each in public if not each["isTypeKnown"] or each["isTypeAmbiguous"]] == []
