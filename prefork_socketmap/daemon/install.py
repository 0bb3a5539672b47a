"""The commands ``install`` and ``uninstall``: the server as a service of the machine, and back.

What is installed is told by layout.py, and what was installed by manifest.py. Below a prefix other than ``/``, as for
an image or a package, only files are made: no account, and no program runs.
"""

from __future__ import annotations

import argparse
import grp
import os
import pwd
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

from prefork_socketmap.daemon import layout
from prefork_socketmap.daemon.layout import ACCOUNT, COMMAND, CONFIG, SOCKET_DIRECTORY, SYSUSERS, Item, Source
from prefork_socketmap.daemon.manifest import Manifest, content_of, digest
from prefork_socketmap.settings import SettingError

_ROOT = Path("/")
_FAILED = 1
_UNKNOWN = 4  # what status exits with then
_UNITS = ("prefork-socketmap.socket", "prefork-socketmap.service")
_POSTFIX = "postfix"
# ProtectHome= of the unit hides them from the server.
_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))

_NEXT = {
    True: "systemctl enable --now prefork-socketmap.socket prefork-socketmap.service",
    False: "update-rc.d prefork-socketmap defaults && service prefork-socketmap start",
}


class Machine:
    """The machine below a prefix: what is done to it, each thing told in a line; with *dry_run*, told alone."""

    def __init__(self, prefix: Path, *, dry_run: bool) -> None:
        self.prefix = prefix
        self.is_real = prefix == _ROOT
        self.manifest = Manifest.read(prefix)
        self._dry_run = dry_run

    def put(self, item: Item) -> None:
        """Make *item*, or what differs from it; but not where an administrator has changed it."""
        path = self.at(item.path)
        there = content_of(path)
        if there == item.content:
            self._tell("unchanged", item.path)
        elif there is None or self.manifest.has(item.path, there):
            self._do("made" if there is None else "updated", item.path)
            if not self._dry_run:
                self._make_directory(item.path.parent)
                _write(path, item, self._group() if item.is_config else None)
                self.manifest.files[str(item.path)] = digest(item.content)
        else:
            self._tell("kept", item.path, "it is not as it was installed")

    def take(self, path: Path) -> bool:
        """Remove what was put at *path*, and return whether nothing is there now; not if somebody changed it."""
        there = content_of(self.at(path))
        if there is not None and not self.manifest.has(path, there):
            self._tell("kept", path, "it is not as it was installed")
            return False
        if there is not None:
            self._do("removed", path)
            if not self._dry_run:
                self.at(path).unlink()
        return True

    def take_directory(self, path: Path) -> None:
        """Remove a directory that was made, if it is empty."""
        directory = self.at(path)
        if directory.is_dir() and (self._dry_run or not any(directory.iterdir())):
            self._do("removed", path, "if it is empty" if self._dry_run else "")
            if not self._dry_run:
                directory.rmdir()

    def make_socket_directory(self) -> None:
        """Make the directory for the socket that a chrooted Postfix reaches; it is root's, and lets in Postfix."""
        if not SOCKET_DIRECTORY.parent.is_dir() or not _has_group(_POSTFIX):
            self._tell("left out", SOCKET_DIRECTORY, "there is no Postfix here; install again when there is")
        elif SOCKET_DIRECTORY.is_dir():
            self._tell("unchanged", SOCKET_DIRECTORY)
        else:
            self._do("made", SOCKET_DIRECTORY)
            if not self._dry_run:
                SOCKET_DIRECTORY.mkdir(mode=0o750)
                shutil.chown(SOCKET_DIRECTORY, 0, _POSTFIX)
                self.manifest.directories.append(str(SOCKET_DIRECTORY))

    def run(self, *command: str) -> None:
        """Run a program. Raises SettingError with what it said when it fails."""
        self._do("ran", " ".join(command))
        if self._dry_run:
            return
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603 - ours
        except FileNotFoundError:
            raise SettingError("", f"{command[0]} is missing; is --init or --systemd the right one here?") from None
        if done.returncode:
            raise SettingError("", f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")

    def save(self) -> None:
        """Keep what was done for the next time."""
        if not self._dry_run:
            self.manifest.write(self.prefix)

    def forget(self) -> None:
        """Nothing of what was done is left."""
        if not self._dry_run:
            self.manifest.remove(self.prefix)

    def at(self, path: Path) -> Path:
        """Return where *path* is from here."""
        return self.prefix / path.relative_to("/")

    def _group(self) -> int | None:
        return grp.getgrnam(ACCOUNT).gr_gid if self.is_real else None

    def _make_directory(self, path: Path) -> None:
        for parent in [*reversed(path.parents), path]:
            if not self.at(parent).is_dir():
                self.at(parent).mkdir(mode=0o755)
                self.at(parent).chmod(0o755)
                self.manifest.directories.append(str(parent))

    def _do(self, what: str, to: Path | str, why: str = "") -> None:
        self._tell(f"not {what}" if self._dry_run else what, to, why)

    @staticmethod
    def _tell(what: str, to: Path | str, why: str = "") -> None:
        print(f"{what:<11} {to}{f': {why}' if why else ''}")


def install(arguments: argparse.Namespace) -> int:
    """Put everything in its place; print what was done, and return the exit code."""
    systemd: bool = arguments.systemd
    machine = _machine(arguments)
    source, program = Source.find(), _program()
    if machine.is_real:
        _require_reachable(program, systemd=systemd)
    try:
        _put_everything(machine, source, program, systemd=systemd)
    finally:
        machine.save()
    print(f"\nYour maps belong into {CONFIG}/prefork-socketmap.toml. Then:\n    prefork-socketmap check")
    print(f"    {_NEXT[systemd]}")
    return os.EX_OK


def _put_everything(machine: Machine, source: Source, program: Path, *, systemd: bool) -> None:
    for item in layout.system_files(source, program, systemd=systemd):
        if item.path != COMMAND or not _is_program(machine.at(COMMAND), program):
            machine.put(item)
    if machine.is_real:
        _make_account(machine, systemd=systemd)
    for item in layout.config_files(source):
        machine.put(item)
    if machine.is_real:
        machine.make_socket_directory()
        if systemd and _runs_systemd():
            machine.run("systemctl", "daemon-reload")


def uninstall(arguments: argparse.Namespace) -> int:
    """Take back what ``install`` did, but for what was changed since; print it, and return the exit code."""
    machine = _machine(arguments)
    if not machine.manifest.files:
        print("nothing is installed here")
        return os.EX_OK
    if machine.is_real:
        if _serves():
            print("prefork-socketmap: the server runs; stop it, and its socket unit, first", file=sys.stderr)
            return _FAILED
        _switch_off(machine)
    gone = [machine.take(Path(path)) for path in machine.manifest.files]
    for path in reversed(machine.manifest.directories):
        machine.take_directory(Path(path))
    if machine.is_real:
        if _runs_systemd():
            machine.run("systemctl", "daemon-reload")
        if machine.manifest.account and all(gone) and _has_user():
            machine.run("userdel", ACCOUNT)
    machine.forget()
    return os.EX_OK


def _machine(arguments: argparse.Namespace) -> Machine:
    prefix: Path = arguments.prefix.absolute()
    if prefix == _ROOT and os.geteuid() != 0 and not arguments.dry_run:
        raise PermissionError("only root can do this; try --dry-run, or --prefix DIRECTORY")
    return Machine(prefix, dry_run=arguments.dry_run)


def _make_account(machine: Machine, *, systemd: bool) -> None:
    if _has_user():
        return
    if systemd:
        machine.run("systemd-sysusers", str(SYSUSERS))
    else:
        nowhere = ["--no-create-home", "--home-dir", "/", "--shell", "/usr/sbin/nologin"]
        machine.run("useradd", "--system", "--user-group", *nowhere, ACCOUNT)
    machine.manifest.account = True


def _switch_off(machine: Machine) -> None:
    """Have the machine not start what will be gone."""
    with_systemd = any(path.startswith(str(layout.UNITS)) for path in machine.manifest.files)
    if with_systemd and shutil.which("systemctl"):
        machine.run("systemctl", "disable", *_UNITS)
    elif not with_systemd and shutil.which("update-rc.d"):
        machine.run("update-rc.d", "-f", "prefork-socketmap", "remove")


def _serves() -> bool:
    """Whether the server of the installed configuration runs, or may run for all that is known."""
    if not (CONFIG / "prefork-socketmap.toml").exists() or not COMMAND.exists():
        return False
    status = subprocess.run([COMMAND, "status"], capture_output=True, check=False)  # noqa: S603 - what we installed
    return status.returncode in (os.EX_OK, _UNKNOWN)


def _write(path: Path, item: Item, gid: int | None) -> None:
    """Put *item* at *path*, whole or not at all, and never open to more users than it should be."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    if item.is_link:
        new.symlink_to(os.fsdecode(item.content))
    else:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123
            file.write(item.content)
            if gid is not None:
                os.fchown(file.fileno(), 0, gid)
            os.fchmod(file.fileno(), item.mode)
    new.replace(path)


def _program() -> Path:
    """Return the program that is installed beside the one that runs. Raises SettingError."""
    program = Path(sysconfig.get_path("scripts"), "prefork-socketmap")
    if not program.is_file():
        raise SettingError("", f"there is no {program}, which the service would run")
    return program


def _is_program(path: Path, program: Path) -> bool:
    """Whether somebody else, such as pipx, has made the command already."""
    return path.is_symlink() and path.readlink() != program and path.resolve() == program.resolve()


def _require_reachable(program: Path, *, systemd: bool) -> None:
    """Raise SettingError when the server's account could not run *program*."""
    advice = "install it into a venv that others can reach, such as /opt/prefork-socketmap"
    for path in (program.absolute(), Path(sys.executable).resolve()):
        for parent in path.parents:
            if systemd and parent in _HOMES:
                raise SettingError(str(path), f"the systemd unit hides {parent} from the server; {advice}")
            if not parent.stat().st_mode & stat.S_IXOTH:
                raise SettingError(str(path), f"only the owner of {parent} can get there; {advice}")


def _has_user() -> bool:
    return any(entry.pw_name == ACCOUNT for entry in pwd.getpwall())


def _has_group(name: str) -> bool:
    return any(entry.gr_name == name for entry in grp.getgrall())


def _runs_systemd() -> bool:
    """Whether systemd is the init system of the running machine; sd_booted(3)."""
    return Path("/run/systemd/system").is_dir()
