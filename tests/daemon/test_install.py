"""The commands ``install`` and ``uninstall`` below a directory; tests/machine has them on whole machines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefork_socketmap.daemon import cli, configfile, install
from prefork_socketmap.daemon.layout import Source
from prefork_socketmap.daemon.manifest import PLACE, digest
from tests.daemon.installation import COMMAND, TIMEOUT

CONFIG = "etc/prefork-socketmap/prefork-socketmap.toml"
UNIT = "usr/local/lib/systemd/system/prefork-socketmap.service"


def run(command: str, prefix: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, command, "--prefix", str(prefix), *arguments],
        capture_output=True, text=True, check=False, timeout=TIMEOUT,
    )  # fmt: skip


def files(prefix: Path) -> dict[str, bytes]:
    """Return what lies below *prefix*, of links the targets."""
    found = {path for path in prefix.rglob("*") if path.is_symlink() or path.is_file()}
    return {
        str(path.relative_to(prefix)): bytes(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in found
    }


def words(output: str) -> set[str]:
    """Return what was done, of all that was done."""
    return set(re.findall(r"^(.{11}) /", output, flags=re.MULTILINE))


def test_everything_that_a_unit_names_is_put_in_place(tmp_path: Path) -> None:
    assert run("install", tmp_path, "--systemd").returncode == 0
    found = files(tmp_path)
    unit = found[UNIT].decode()
    assert "/usr/bin/prefork-socketmap" not in unit
    assert f"ExecStart=/usr/local/bin/prefork-socketmap serve -c /{CONFIG}\n" in unit
    assert found["usr/local/bin/prefork-socketmap"] == bytes(Path(sys.executable).with_name("prefork-socketmap"))
    assert {path.name for path in Source.find().etc.glob("systemd/*")} == {
        path.name for path in (tmp_path / UNIT).parent.iterdir()
    }
    pages = {path.name for path in Source.find().man.glob("*.[1-8]")}
    assert pages == {path.name for path in (tmp_path / "usr/local/share/man").rglob("*.[1-8]")}


def test_the_configuration_is_closed_and_names_whom_workers_run_as(tmp_path: Path) -> None:
    run("install", tmp_path, "--init")
    for path in (tmp_path / CONFIG).parent.iterdir():
        assert path.stat().st_mode & 0o777 == 0o640
    lines = (tmp_path / CONFIG).read_text().splitlines()
    assert 'user = "prefork-socketmap"' in lines
    assert 'group = "prefork-socketmap"' in lines
    (tmp_path / CONFIG).write_text("\n".join(line for line in lines if not line.startswith(("user", "group"))))
    assert configfile.load(tmp_path / CONFIG).maps.keys() >= {"domains", "aliases", "transport"}


def test_the_init_script_runs_the_program_that_is_installed(tmp_path: Path) -> None:
    run("install", tmp_path, "--init")
    script = tmp_path / "etc/init.d/prefork-socketmap"
    assert os.access(script, os.X_OK)
    assert "DAEMON=/usr/local/bin/prefork-socketmap\n" in script.read_text()
    assert not (tmp_path / UNIT).exists()


def test_a_dry_run_tells_the_same_and_does_nothing(tmp_path: Path) -> None:
    told = run("install", tmp_path, "--systemd", "--dry-run").stdout
    assert files(tmp_path) == {}
    assert words(told) == {"not made   "}
    done = run("install", tmp_path, "--systemd").stdout
    assert told.replace("not made   ", "made       ") == done
    before = files(tmp_path)
    assert words(run("uninstall", tmp_path, "--dry-run").stdout) == {"not removed"}
    assert files(tmp_path) == before


def test_it_can_be_said_again(tmp_path: Path) -> None:
    run("install", tmp_path, "--systemd")
    before = files(tmp_path)
    again = run("install", tmp_path, "--systemd")
    assert again.returncode == 0
    assert words(again.stdout) == {"unchanged  "}
    assert files(tmp_path) == before


def test_what_was_changed_by_hand_is_kept_and_the_rest_is_brought_up_to_date(tmp_path: Path) -> None:
    run("install", tmp_path, "--systemd")
    wanted = files(tmp_path)
    # As if an older version had been installed, ...
    older = b"[Unit]\n"
    (tmp_path / UNIT).write_bytes(older)
    manifest = tmp_path / PLACE
    installed = json.loads(manifest.read_text())
    installed["files"][f"/{UNIT}"] = digest(older)
    manifest.write_text(json.dumps(installed))
    # ... and somebody had changed the configuration.
    (tmp_path / CONFIG).write_text("# mine\n")
    told = run("install", tmp_path, "--systemd").stdout
    assert f"kept        /{CONFIG}: it is not as it was installed\n" in told
    assert f"updated     /{UNIT}\n" in told
    assert files(tmp_path)[CONFIG] == b"# mine\n"
    assert files(tmp_path)[UNIT] == wanted[UNIT]


def test_a_file_that_was_there_before_is_kept(tmp_path: Path) -> None:
    (tmp_path / CONFIG).parent.mkdir(parents=True)
    (tmp_path / CONFIG).write_text("# older than we\n")
    run("install", tmp_path, "--systemd")
    assert (tmp_path / CONFIG).read_text() == "# older than we\n"
    run("uninstall", tmp_path)
    assert files(tmp_path) == {CONFIG: b"# older than we\n"}


def test_uninstall_takes_everything_back_but_what_was_changed(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    run("install", tmp_path, "--systemd")
    sample = (tmp_path / CONFIG).with_name("sample.py")
    sample.write_text("# mine\n")
    told = run("uninstall", tmp_path)
    assert told.returncode == 0
    assert f"kept        /{sample.relative_to(tmp_path)}: it is not as it was installed\n" in told.stdout
    assert files(tmp_path) == {str(sample.relative_to(tmp_path)): b"# mine\n"}
    assert not (tmp_path / "usr").exists()
    sample.unlink()
    assert run("uninstall", tmp_path).stdout == "nothing is installed here\n"


def test_a_broken_record_of_what_was_installed_is_told(tmp_path: Path) -> None:
    run("install", tmp_path, "--systemd")
    (tmp_path / PLACE).write_text("{")
    refused = run("uninstall", tmp_path)
    assert refused.returncode == os.EX_CONFIG
    assert "installed.json: is not what install has written" in refused.stderr


def test_what_root_goes_by_lies_where_no_worker_can_write(tmp_path: Path) -> None:
    run("install", tmp_path, "--systemd")
    unit = (tmp_path / UNIT).read_text()
    theirs = re.findall(r"^(Runtime|State|Cache|Logs)Directory=(\S+)", unit, flags=re.MULTILINE)
    assert ("State", "prefork-socketmap") in theirs
    assert (tmp_path / PLACE).exists()
    assert (tmp_path / PLACE).parent == tmp_path / "var/lib"


def test_one_has_to_say_for_which_init_system(tmp_path: Path) -> None:
    refused = run("install", tmp_path)
    assert refused.returncode == os.EX_USAGE
    assert "one of the arguments --systemd --init is required" in refused.stderr


def test_without_root_the_machine_itself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionError, match="only root can do this"):
        install.install(cli.parser().parse_args(["install", "--systemd"]))
