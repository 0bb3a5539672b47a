"""Who runs what: the master keeps root only to hand it over to nobody, workers have an account of their own."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys

import pytest

from prefork_socketmap.daemon.privileges import Account
from tests.daemon.installation import COMMAND, TIMEOUT, Installation
from tests.processes import process_status, process_title
from tests.waiting import eventually

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")

WHO = """
import os
AT_IMPORT = f"{os.geteuid()}:{os.getegid()}"
def who(key):
    return {"import": AT_IMPORT, "home": os.environ["HOME"]}[key]
"""
WHO_MAP = '[maps.who]\ntype = "python"\npath = ["."]\nfunction = "who:who"\n'


@as_root
@pytest.mark.parametrize("group", ["", "daemon"])
def test_workers_have_the_configured_uid_gid_and_groups(installation: Installation, group: str) -> None:
    user = pwd.getpwnam("nobody")
    gid = grp.getgrnam(group).gr_gid if group else user.pw_gid
    installation.configure('user = "nobody"\n' + (f'group = "{group}"\n' if group else ""))
    installation.start()
    for worker in installation.idle_workers():
        status = process_status(worker)
        # Real, effective, saved and file system ids: there is no way back to root.
        assert status["Uid"] == [str(user.pw_uid)] * 4
        assert status["Gid"] == [str(gid)] * 4
        assert sorted(map(int, status["Groups"])) == sorted(os.getgrouplist("nobody", gid))
        assert set(status["CapEff"] + status["CapPrm"]) == {"0" * 16}
    assert process_status(installation.pid)["Uid"] == ["0"] * 4


@as_root
def test_code_of_maps_is_imported_as_the_workers_user(installation: Installation) -> None:
    (installation.directory / "who.py").write_text(WHO)
    installation.configure('user = "nobody"\n', maps=WHO_MAP)
    installation.start()
    user = pwd.getpwnam("nobody")
    assert installation.lookup("who", "import") == f"{user.pw_uid}:{user.pw_gid}"
    assert installation.lookup("who", "home") == user.pw_dir


@as_root
def test_the_master_can_still_stop_workers_of_another_user(installation: Installation) -> None:
    installation.configure('user = "nobody"\n')
    process = installation.start()
    assert installation.run("reload").returncode == 0
    assert installation.run("stop").returncode == 0
    assert process.wait(30) == 0


@as_root
def test_workers_that_run_as_root_are_warned_about(installation: Installation) -> None:
    installation.start()
    assert f'set user = "..." in {installation.config}' in installation.logged("workers run as root")
    installation.run("stop")
    installation.log.unlink()
    installation.configure('user = "nobody"\n')
    installation.start()
    assert "workers run as root" not in installation.log.read_text()


@as_root
def test_another_user_than_our_own_is_refused_without_root() -> None:
    program = (
        "import os, pwd; from prefork_socketmap.daemon.privileges import Account;"
        "account = Account.find('daemon', None); os.setuid(pwd.getpwnam('nobody').pw_uid); account.assume()"
    )
    result = subprocess.run([COMMAND[0], "-c", program], capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert "user: only root can run workers as 'daemon', and this is not root" in result.stderr


def test_our_own_user_needs_no_change() -> None:
    own = pwd.getpwuid(os.geteuid()).pw_name
    before = dict(os.environ)
    Account.find(own, None).assume()
    assert os.environ == before


# What all types are based on: no library, and no code of a user. See daemon/worker.py; and daemon/caches.py.
BASE = {
    "prefork_socketmap.maps",
    *(
        f"prefork_socketmap.maps.{name}"
        for name in ("base", "backend", "ratelimit", "registry", "search", "setting", "template", "unavailable")
    ),
    *(f"prefork_socketmap.maps.{name}" for name in ("flight", "page", "store")),
}


def test_the_master_never_imports_a_map(installation: Installation) -> None:
    (installation.directory / "who.py").write_text(WHO)
    installation.configure(maps=WHO_MAP)
    program = (
        "import sys; from prefork_socketmap.daemon.cli import main;"
        "code = main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", "-c", installation.config],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    eventually((installation.runtime_dir / "state.json").exists, within=30)
    assert installation.lookup("who", "import")
    assert installation.run("reload").returncode == 0
    assert installation.run("stop").returncode == 0
    output, _ = process.communicate(timeout=30)
    modules = output.split()
    assert "prefork_socketmap.prefork.master" in modules
    found = {name for name in modules if name == "who" or name.startswith("prefork_socketmap.maps")}
    assert found <= BASE


def test_process_titles_tell_who_does_what(installation: Installation) -> None:
    process = installation.start()
    assert process_title(process.pid) == f"prefork-socketmap: master [{installation.config}]"
    assert set(map(process_title, installation.idle_workers())) == {"prefork-socketmap: worker, generation 1, idle"}
    assert installation.run("reload").returncode == 0
    assert process_title(process.pid) == f"prefork-socketmap: master [{installation.config}]"
    eventually(
        lambda: set(map(process_title, installation.workers())) == {"prefork-socketmap: worker, generation 2, idle"},
        what="only workers of the new generation",
    )
