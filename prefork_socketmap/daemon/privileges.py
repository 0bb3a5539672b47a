"""Users and groups: whom workers run as, and how a process becomes that account for good.

And what else a worker gives up before it loads the code of a map: for what that code may do it is not to be trusted.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
from collections.abc import Collection
from dataclasses import dataclass

from prefork_socketmap.settings import SettingError, shown

ENVIRONMENT = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "LC_*",
    "TZ",
    "TMPDIR",
    "JOURNAL_STREAM",
)
"""The variables that the code of maps has; LC_* are all that begin so."""

_UMASK = 0o077
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 24, 38  # prctl(2)
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITIES = 64  # more than any kernel has
_CAPABILITY_VERSION_3 = 0x20080522  # capget(2)
_libc = ctypes.CDLL(None, use_errno=True)


def find_user(key: str, name: str) -> pwd.struct_passwd:
    """Return the entry of the user *name*, or of the number; SettingError at *key* when there is none."""
    try:
        return pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        raise SettingError(key, f"there is no user {shown(name)}") from None


def find_group(key: str, name: str) -> grp.struct_group:
    """Return the entry of the group *name*, or of the number; SettingError at *key* when there is none."""
    try:
        return grp.getgrgid(int(name)) if name.isdecimal() else grp.getgrnam(name)
    except KeyError:
        raise SettingError(key, f"there is no group {shown(name)}") from None


@dataclass(frozen=True)
class Account:
    """A user with the groups that its processes have."""

    user: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @classmethod
    def find(cls, user: str, group: str | None) -> Account:
        """Look *user* up, with *group* or else its own as the primary group. Raises SettingError."""
        entry = find_user("user", user)
        gid = entry.pw_gid if group is None else find_group("group", group).gr_gid
        return cls(entry.pw_name, entry.pw_uid, gid, tuple(os.getgrouplist(entry.pw_name, gid)), entry.pw_dir)

    def assume(self) -> None:
        """Make this process run as the account. There is no way back. Raises SettingError when that is not allowed.

        It has no capability then, and nothing that it executes gets any, or becomes another user. A process that runs
        as the user already, as under systemd's ``User=``, is left as it is.
        """
        if os.geteuid() == self.uid:
            return
        _drop_bounding_set()
        try:
            os.setgroups(self.groups)
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)
        except PermissionError as error:
            raise SettingError("user", f"only root can run workers as {self.user!r}, and this is not root") from error
        drop_capabilities()
        # Client libraries look into the home directory for their settings (libpq for ~/.postgresql), and fail if
        # they may not read it.
        os.environ.update(HOME=self.home, USER=self.user, LOGNAME=self.user)


def _drop_bounding_set() -> None:
    """Empty the capability bounding set, as far as this process may; no_new_privs does without."""
    for capability in range(_CAPABILITIES):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def drop_capabilities() -> None:
    """Give up all capabilities, of every set, and the way to new privileges. Raises OSError."""
    # As a rule setresuid(2) has done it; but not for the inheritable ones, nor when securebits(7) say so.
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _require(_libc.capset(header, none))
    forbid_more()


def forbid_more() -> None:
    """Have nothing that this process executes get rights that it has not. Raises OSError."""
    _require(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def hide() -> None:
    """Keep other processes of the same user from this one's memory, and from the files that it makes."""
    os.umask(_UMASK)
    _require(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def clean_environment(keep: Collection[str]) -> None:
    """Remove from the environment what is neither of ENVIRONMENT nor named in *keep*."""
    prefixes = tuple(name[:-1] for name in ENVIRONMENT if name.endswith("*"))
    for name in list(os.environ):
        if not (name in ENVIRONMENT or name in keep or name.startswith(prefixes)):
            del os.environ[name]


def _require(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"the privileges of a worker cannot be given up: {os.strerror(number)}")
